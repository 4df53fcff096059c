"""From the target's logits to the law it samples from, per node, with that node's own prefix.

Order: logit bias, penalties, the caller's processors, then temperature, top-k, top-p, min-p (the order of transformers'
`generate`). Temperature is never divided by for emission: argmax(scores + T * gumbel) is a draw from
softmax(scores / T) for T > 0 and greedy decoding for T = 0, row by row in one batch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from foretoken.errors import UserError
from foretoken.noise import LOWEST, RARE, TARGET, Noise, vocabulary
from foretoken.tree import Draft

Processor = Callable[[Tensor, Tensor], Tensor]
"""transformers' `LogitsProcessor`: (input_ids [n, L] int64, scores [n, V]) -> scores [n, V]."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one request is sampled.

    temperature          0 is greedy decoding
    top_k                0: off
    top_p, min_p         1 and 0: off; both act on the law after temperature, min_p is relative to its peak
    repetition_penalty   divides positive and multiplies negative logits of tokens in prompt and output (1: off)
    presence_penalty     subtracted once from logits of tokens in the output
    frequency_penalty    subtracted per occurrence in the output
    logit_bias           token -> added to its logit
    processors           transformers `LogitsProcessor`s, each called with the whole prefix of the node
    seed                 together with the request's number, the key of its noise
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    processors: Sequence[Processor] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        limits = [
            ("temperature", self.temperature, 0.0 <= self.temperature < math.inf, "0 or more (0 is greedy)"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0 and at most 1 (off)"),
            ("min_p", self.min_p, 0.0 <= self.min_p < 1.0, "from 0 (off) to below 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0,
                "above 0 (1 is off)",
            ),
            ("presence_penalty", self.presence_penalty, math.isfinite(self.presence_penalty), "a finite number"),
            ("frequency_penalty", self.frequency_penalty, math.isfinite(self.frequency_penalty), "a finite number"),
        ]
        for name, value, good, need in limits:
            if not good:
                raise UserError(f"{name} is {value}; it must be {need}.")

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def truncated(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True)
class Scores:
    """The target's view of a draft.

    values       [B, N, V], the law at node n is softmax(values / T); greedy where T = 0
    temperature  [B, 1, 1] float32
    noise        the requests' noise
    position     [B] int64, position of the token that the root emits
    sampled      whether any row has T > 0
    """

    draft: Draft
    values: Tensor
    temperature: Tensor
    noise: Noise
    position: Tensor
    sampled: bool

    @cached_property
    def emitted(self) -> Tensor:
        """[B, N] int64: what the target says after each node: argmax of values + T * gumbel at the node's position."""
        if not self.sampled:
            return self.values.argmax(-1)
        tokens = self.contenders()
        noise = self.log_exponential(tokens, TARGET)
        values = self.values if len(tokens) == self.values.shape[-1] else self.values[..., tokens]
        return tokens[torch.addcmul(values, self.temperature.to(values.dtype), noise, value=-1).argmax(-1)]

    def contenders(self) -> Tensor:
        """[I] int64: the tokens that can still win somewhere.

        The winner scores at least peak + T * LOWEST, so a token below peak - T * (RARE - LOWEST) needs noise above
        RARE: logarithms are taken for few tokens. On a GPU they are cheap, and a number of tokens that depends on their
        values is not: there, all of them.
        """
        everything = vocabulary(self.values.shape[-1], self.values.device)
        if self.values.device.type != "cpu":
            return everything
        floor = self.values.amax(-1, keepdim=True) - self.temperature.to(self.values.dtype) * (RARE - LOWEST)
        near = (self.values - floor).flatten(0, 1).amax(0) >= 0
        if 4 * int(near.sum()) > len(everything):
            return everything
        return (near | self.noise.rare(self.positions, everything)).nonzero().squeeze(-1)

    @property
    def positions(self) -> Tensor:
        """[B, D] int64: the position of the token emitted at each depth of the draft."""
        depths = self.draft.width if self.draft.chained else self.draft.height + 1
        return self.position[:, None] + torch.arange(depths, device=self.values.device)

    def law(self) -> Tensor:
        """[B, N, V]: the target's probabilities at each node."""
        return law_of(self.values, self.temperature)

    def log_exponential(self, tokens: Tensor, stream: int) -> Tensor:
        """[B, N, I]: minus the Gumbel noise of each node's position, computed once per depth."""
        noise = self.noise.log_exponential(self.positions, tokens, stream)
        if self.draft.chained:  # depth is the node's number
            return noise.to(self.values.dtype)
        rows = torch.arange(len(noise), device=noise.device)[:, None]
        return noise[rows, self.draft.depth.clamp(max=self.draft.height)].to(self.values.dtype)


def law_of(values: Tensor, temperature: Tensor) -> Tensor:
    """[B, N, V]: softmax(values / T) for values [B, N, V] and T [B, 1, 1]; one-hot where T = 0."""
    greedy = torch.zeros_like(values).scatter(-1, values.argmax(-1, keepdim=True), 1.0)
    warm = (values / temperature.clamp(min=1e-6).to(values.dtype)).softmax(-1)
    return torch.where(temperature > 0, warm, greedy)


class Sampler:
    """The sampling of B requests: their settings as tensors, their noise, and the counts that penalties need."""

    def __init__(self, settings: list[Sampling], noise: Noise, vocab: int) -> None:
        self.settings, self.noise, self.vocab = settings, noise, vocab
        self.counts: Tensor | None = None  # [2, B, V] float32: occurrences in the prompt; in the output
        self._tabulate()
        if self.penalised:
            self.counts = torch.zeros(2, len(settings), vocab, device=noise.key.device)

    def _tabulate(self) -> None:
        device = self.noise.key.device

        def column(name: str) -> Tensor:
            return torch.tensor([getattr(s, name) for s in self.settings], device=device)[:, None, None]

        self.temperature = column("temperature").float()
        self.sampled = any(s.temperature > 0 for s in self.settings)
        self.truncated = any(s.truncated for s in self.settings)
        self.penalised = any(s.penalised for s in self.settings)
        self.top_k, self.top_p, self.min_p = column("top_k"), column("top_p"), column("min_p")
        self.repetition, self.presence, self.frequency = (
            column(f"{name}_penalty") for name in ("repetition", "presence", "frequency")
        )
        self.bias: Tensor | None = None
        if any(s.logit_bias for s in self.settings):
            self.bias = torch.zeros(len(self.settings), 1, self.vocab, device=device)
            for b, s in enumerate(self.settings):
                for token, value in s.logit_bias.items():
                    if not 0 <= token < self.vocab:
                        raise UserError(f"logit_bias names token {token}; the vocabulary has 0 to {self.vocab - 1}.")
                    self.bias[b, 0, token] = value
        special = self.penalised or self.truncated or self.bias is not None
        self.plain = not special and not any(s.processors for s in self.settings)

    def observe(self, tokens: Tensor, count: Tensor, *, output: bool) -> None:
        """Count the first `count[b]` of `tokens` [B, M] as prompt or output text."""
        if self.counts is not None:
            valid = torch.arange(tokens.shape[1], device=tokens.device) < count[:, None]
            self.counts[int(output)].scatter_add_(1, tokens, valid.float())

    def select(self, rows: list[int]) -> None:
        self.settings = [self.settings[i] for i in rows]
        self.noise = self.noise.select(rows)
        self.counts = self.counts[:, rows] if self.counts is not None else None
        self._tabulate()

    def join(self, other: "Sampler") -> None:
        self.settings = self.settings + other.settings
        mine, theirs = (
            s.counts if s.counts is not None else torch.zeros(2, len(s.noise.key), s.vocab, device=s.noise.key.device)
            for s in (self, other)
        )
        either = self.counts is not None or other.counts is not None
        self.counts = torch.cat([mine, theirs], 1) if either else None
        self.noise = self.noise.join(other.noise)
        self._tabulate()

    def scores(self, logits: Tensor, draft: Draft, position: Tensor, texts: list[list[int]]) -> Scores:
        """The target's view of `draft` from its logits [B, N, V].

        position [B] is the position of the token that the root emits; `texts` holds prompt and output of each row, the
        root included.
        """
        values = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        values = self._biased(values)
        if self.penalised:
            values = self._penalise(values, draft)
        if any(s.processors for s in self.settings):
            values = self._process(values, draft, texts)
        if self.truncated:
            values = self._truncate(values)
        return Scores(draft, values, self.temperature, self.noise, position, self.sampled)

    def shape(self, values: Tensor) -> Tensor:
        """A drafter's logits [B, n, V'] with the target's bias and truncation, so that guesses stay in its support."""
        values = self._biased(values)
        return self._truncate(values) if self.truncated else values

    def _biased(self, values: Tensor) -> Tensor:
        return values if self.bias is None else values + self.bias[..., : values.shape[-1]].to(values.dtype)

    def _penalise(self, values: Tensor, draft: Draft) -> Tensor:
        assert self.counts is not None
        B, N = draft.tokens.shape
        on_path = draft.ancestors.to(self.counts.dtype)
        on_path[:, :, 0] = 0  # the root is counted already
        output = self.counts[1, :, None].repeat(1, N, 1)
        output.scatter_add_(2, draft.tokens[:, None].expand(B, N, N), on_path)
        seen = (output + self.counts[0, :, None]) > 0
        repetition = self.repetition.to(values.dtype)
        values = torch.where(seen, torch.where(values > 0, values / repetition, values * repetition), values)
        values = values - (self.presence * (output > 0)).to(values.dtype)
        return values - (self.frequency * output).to(values.dtype)

    def _process(self, values: Tensor, draft: Draft, texts: list[list[int]]) -> Tensor:
        """Call the caller's processors on every node, those of equal prefix length together."""
        values = values.clone()
        tokens, ancestors = draft.tokens.tolist(), draft.ancestors.tolist()
        groups: dict[tuple[int, int], list[tuple[int, int, list[int]]]] = {}
        for b, settings in enumerate(self.settings):
            if not settings.processors:
                continue
            for n, seen in enumerate(ancestors[b]):
                prefix = texts[b] + [t for t, s in zip(tokens[b][1:], seen[1:], strict=True) if s]
                groups.setdefault((id(settings.processors), len(prefix)), []).append((b, n, prefix))
        for members in groups.values():
            b, n = [m[0] for m in members], [m[1] for m in members]
            prefixes = torch.tensor([m[2] for m in members], device=values.device)
            scores = values[b, n]
            for processor in self.settings[b[0]].processors:
                scores = processor(prefixes, scores)
            values[b, n] = scores.to(values.dtype)
        return values

    def _truncate(self, values: Tensor) -> Tensor:
        """`values` with -inf outside top-k, then top-p, then min-p; ties at a threshold all stay."""
        scaled = values / self.temperature.clamp(min=1e-6).to(values.dtype)  # at T = 0 the peak alone matters
        if (k := max(s.top_k for s in self.settings)) > 0:
            k = min(k, values.shape[-1])
            top = scaled.topk(k, -1).values
            last = (self.top_k.clamp(min=1, max=k) - 1).expand(-1, values.shape[1], 1)
            scaled = scaled.masked_fill((scaled < top.gather(-1, last)) & (self.top_k > 0), -torch.inf)
        if any(s.top_p < 1 for s in self.settings):
            scaled = scaled.masked_fill(scaled < nucleus_edge(scaled, self.top_p), -torch.inf)
        if any(s.min_p > 0 for s in self.settings):
            edge = scaled.amax(-1, keepdim=True) + self.min_p.to(values.dtype).log()
            scaled = scaled.masked_fill(scaled < edge, -torch.inf)
        return values.masked_fill(scaled == -torch.inf, -torch.inf)


def nucleus_edge(scores: Tensor, top_p: Tensor) -> Tensor:
    """[B, N, 1]: the lowest score in the smallest set of most likely tokens whose mass reaches top_p [B, 1, 1].

    Sorts the few most likely tokens, and more only where they do not hold the mass (a host decision).
    """
    V = scores.shape[-1]
    total = scores.logsumexp(-1, keepdim=True)
    size = min(V, 128)
    while True:
        top = scores.topk(size, -1).values
        mass = (top - total).exp().cumsum(-1)
        if size == V or bool((mass[..., -1:] >= top_p).all()):
            break
        size = min(V, size * 8)
    before = mass - (top - total).exp()
    kept = (before < top_p).sum(-1, keepdim=True).clamp(min=1)
    edge = top.gather(-1, kept - 1)
    return torch.where(top_p < 1, edge, -torch.inf)
