"""What a forward's logits may be off by rounding, and whether they are.

At the place where two outputs part, the next token's logits are computed once more in float64 without a cache (the
truth, for these weights), and three times in the model's own dtype without any code of this package: one forward over
the text, one over the text and some padding, and transformers' own cached step. The largest distance of the three from
the truth is what honest rounding does here, at this token of this text. A forward of ours that rounds as honestly is
about as far off, whatever its width; it is suspicious if it is more than `FACTOR` times as far, either in the root mean
square over the vocabulary (what wrong attention changes: everything a little) or in the largest single difference (what
a wrong head or processor changes). docs/explain.md has what honest and wrong forwards measured. Without float64 the
distances between the three stand in for those from the truth.

What a run emitted needs no tolerance: it must be what its own logits give, by the sampling's definition. If all that
holds, the two tokens are within rounding of each other: a token that wins under logits at most e from the truth is at
most 2e behind in truth. An error smaller than rounding at this place is not seen; in float32 it is.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache

from foretoken.check import plain
from foretoken.decode import Request
from foretoken.noise import TARGET, Noise, vocabulary
from foretoken.rules import Rule
from foretoken.sampling import Sampler, Sampling
from foretoken.target import Target
from foretoken.tree import chain

FACTOR = 4.0
"""How many times as far from the truth as plain forwards a forward may be."""
FLOOR = 0.5
"""Roundings of a logit that any forward may be off; eight times as many where no float64 tells the truth."""
PADDING = 7
"""Tokens behind the text in the padded forward."""
PLAIN = ("no cache", "padded", "transformers")
"""Forwards without any of our code: over the text, with padding behind it, and transformers' own cached step."""
STEP, TRUTH = "width 1", "float64"


@dataclass(frozen=True, slots=True)
class Gap:
    """The two tokens that score best at one place, and by how much the first one does.

    gap  of logits; at temperature T > 0, of logits / T + the noise that decides
    """

    best: int
    second: int
    gap: float


def gap_of(contest: Tensor) -> Gap:
    """The two best of the scores [V]."""
    best = int(contest.argmax())  # of equal scores the first token's, as in decoding; topk promises no order of them
    others = contest.clone()
    others[best] = -torch.inf
    second = int(others.argmax())
    return Gap(best, second, float(contest[best] - contest[second]))


class Judge:
    """What decides the token behind a prompt and an output, from any logits [V]: apart from trees, caches and rules."""

    def __init__(
        self, target: Target, prompt: Sequence[int], output: Sequence[int], sampling: Sampling, number: int
    ) -> None:
        self.text, device = [*prompt, *output], target.device
        self.sampler = Sampler([sampling], Noise.of([sampling.seed], [number], device), target.vocab)
        for tokens, said in ((prompt, False), (output, True)):
            if tokens:
                count = torch.tensor([len(tokens)], device=device)
                self.sampler.observe(torch.tensor([list(tokens)], device=device), count, output=said)
        self.root = chain(torch.tensor([self.text[-1:]], device=device))
        self.position = torch.tensor([len(self.text)], device=device)
        self.temperature = sampling.temperature

    def contest(self, logits: Tensor) -> Tensor:
        """[V]: processed logits; at a temperature, those over it with the position's noise. The largest one wins."""
        scores = self.sampler.scores(logits[None, None], self.root, self.position, [self.text])
        if not self.sampler.sampled:
            return scores.values[0, 0]
        tokens = vocabulary(scores.values.shape[-1], scores.values.device)
        noise = scores.log_exponential(tokens, TARGET)
        race = torch.addcmul(scores.values, scores.temperature.to(scores.values.dtype), noise, value=-1)
        return race[0, 0] / self.temperature


@dataclass(frozen=True, slots=True)
class Place:
    """The forward in which a run emitted a token.

    token    what it emitted
    forward  number of the forward; 0 is the prompt's
    width    nodes of it
    node     the one behind which the token was decided, at `depth` below the root
    path     tokens from the root to that node
    guessed  whether the token was itself a node
    """

    token: int
    forward: int
    width: int
    node: int
    depth: int
    path: list[int]
    guessed: bool


@dataclass(frozen=True, slots=True)
class Reading:
    """One computation of the logits at the place where the outputs part.

    logits      of the two tokens
    best, gap   the winner and by how much, in the units that decide; `second` is next
    lead        of token a over token b in those units
    largest     difference from the truth of any logit, and `rms` over the vocabulary; None where nothing is known
    """

    width: int
    logits: tuple[float, float]
    best: int
    second: int
    gap: float
    lead: float
    largest: float | None = None
    rms: float | None = None


class Evidence:
    """All computations of the logits at the place where the outputs part.

    logits   [V] float64 by name
    allowed  largest single distance and root mean square from the truth that rounding explains
    """

    def __init__(
        self, target: Target, request: Request, output: list[int], found: dict[str, tuple[Place, Tensor]]
    ) -> None:
        self.prompt, text = request.tokens, [*request.tokens, *output]
        self.places = {name: where for name, (where, _) in found.items()}
        self.notes: list[str] = []
        self.logits = {name: logits for name, (_, logits) in found.items()}
        self.logits[STEP] = stepped(target, request, output)
        self.logits |= plainly(target, text)
        if (truth := exactly(target, text, self.notes)) is not None:
            self.logits[TRUTH] = truth
        self.judge = Judge(target, request.tokens, output, request.sampling, request.number)
        self.temperature = request.sampling.temperature
        self.widths = {PLAIN[0]: len(text), PLAIN[1]: len(text) + padding(target, text), TRUTH: len(text)}
        best = self.logits[PLAIN[0]].double()
        self.scale = size(best)
        self.allowed = self._allowed(torch.finfo(target.dtype).eps)

    def _allowed(self, eps: float) -> tuple[float, float]:
        """What rounding explains, of the largest difference and of the root mean square."""
        names = [name for name in PLAIN if name in self.logits]
        known = TRUTH in self.logits
        pairs = [(n, TRUTH) for n in names] if known else [(n, m) for i, n in enumerate(names) for m in names[:i]]
        apart = [distance(self.logits[n], self.logits[m]) for n, m in pairs]
        floor = FLOOR * eps * (1 if known else 8)
        largest, rms = (max(floor * self.scale[i], *(d[i] for d in apart)) for i in (0, 1))
        return FACTOR * largest, FACTOR * rms

    def off(self, name: str) -> tuple[float, float]:
        """How far a computation is from the truth, or else from the nearest plain forward."""
        others = [TRUTH] if TRUTH in self.logits else [n for n in PLAIN if n in self.logits and n != name]
        return min(distance(self.logits[name], self.logits[other]) for other in others)

    def verdict(self, rule: Rule) -> tuple[str, str]:
        """The verdict and its reason."""
        if not rule.exact:
            return "lossy", f"The rule {rule.name!r} may emit what the target would not."
        if rule.samples and self.temperature > 0:
            return "another sample", (
                f"The rule {rule.name!r} draws another sample of the same law: equal tokens are not expected."
            )
        for name in ("b", "a", STEP):
            largest, rms = self.off(name)
            if not (largest <= self.allowed[0] and rms <= self.allowed[1]):
                return "bug", (
                    f"The logits of {described(name)} are {largest:.3g} from the truth (rms {rms:.3g}); rounding "
                    f"explains {self.allowed[0]:.3g} ({self.allowed[1]:.3g})."
                )
        for name in ("b", "a"):
            token, contest = self.places[name].token, self.judge.contest(self.logits[name])
            if not contest[token] >= contest.max():
                due = int(contest.argmax())
                return "bug", f"{described(name).capitalize()} emitted token {token} where its own logits give {due}."
        return "numerical tie", self.tie()

    def tie(self) -> str:
        """What the tie consists of."""
        step = self.reading(STEP)
        which = ""
        if TRUTH in self.logits:
            best = self.reading(TRUTH).best
            side = next((n for n in ("a", "b") if self.places[n].token == best), None)
            which = f"; float64 sides with {side}" if side else f"; float64 sides with neither and says token {best}"
        shift = abs(step.lead - self.reading("b").lead)
        return (
            f"At width 1 the two tokens are {abs(step.lead):.3g} apart, and the widths move them by {shift:.3g}, which "
            f"rounding explains{which}."
        )

    def readings(self) -> dict[str, Reading]:
        return {name: self.reading(name) for name in self.logits}

    def reading(self, name: str) -> Reading:
        logits = self.logits[name]
        contest, tokens = self.judge.contest(logits), [self.places[n].token for n in ("a", "b")]
        gap = gap_of(contest)
        largest, rms = (None, None) if name == TRUTH else self.off(name)
        width = self.places[name].width if name in self.places else self.widths.get(name, 1)
        return Reading(
            width=width,
            logits=(float(logits[tokens[0]]), float(logits[tokens[1]])),
            best=gap.best,
            second=gap.second,
            gap=gap.gap,
            lead=float(contest[tokens[0]] - contest[tokens[1]]),
            largest=largest,
            rms=rms,
        )


def described(name: str) -> str:
    return {"a": "run a", "b": "run b", STEP: "the step of width 1"}[name]


def distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """(largest, root mean square) of the differences of logits [V]; -inf in both is no difference."""
    a, b = a.double(), b.double()
    apart = torch.where(a == b, 0, (a - b).abs())
    return float(apart.max()), float(apart.square().mean().sqrt())


def size(logits: Tensor) -> tuple[float, float]:
    """(largest, root mean square) of finite logits [V]."""
    finite = logits[logits.isfinite()].abs()
    return float(finite.max()), float(finite.square().mean().sqrt())


def stepped(target: Target, request: Request, output: Sequence[int]) -> Tensor:
    """[V]: the logits behind the output, each of its tokens read in a step of its own: bit for bit plain decoding."""
    cache = target.cache(1, len(request.tokens) + request.max_new_tokens + 1, 1)  # attention reads as many slots
    read = target.read(torch.tensor([list(request.tokens)], device=target.device), [len(request.tokens)], cache)
    for token in output:
        read = target.judge(chain(torch.tensor([[token]], device=target.device)), cache)
        cache.commit(None, [1])
    return read.logits[0, 0]


def plainly(target: Target, text: list[int]) -> dict[str, Tensor]:
    """[V] by name: the logits behind the text from transformers alone."""
    found = {PLAIN[0]: plain(target, text)[-1]}
    if (more := padding(target, text)) > 0:
        found[PLAIN[1]] = plain(target, text + text[-1:] * more)[len(text) - 1]
    if len(text) > 1:
        ids, cache = torch.tensor([text], device=target.device), DynamicCache(config=target.model.config)
        target.model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
        found[PLAIN[2]] = target.model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[0, -1]
    return found


def padding(target: Target, text: list[int]) -> int:
    """How many tokens are put behind the text: as many as the context holds, up to `PADDING`."""
    return PADDING if target.context is None else min(PADDING, target.context - len(text))


def exactly(target: Target, text: list[int], notes: list[str]) -> Tensor | None:
    """[V]: the logits behind the text in float64, of the same weights; None, with a note, where that cannot be."""
    if target.dtype == torch.float64:
        return plain(target, text)[-1]
    needed = 10 * sum(p.numel() for p in target.model.parameters())
    on_gpu = target.device.type == "cuda"
    free = torch.cuda.mem_get_info(target.device)[0] if on_gpu else psutil.virtual_memory().available
    if needed > free // 2:
        notes.append(f"Left out float64: it takes {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free.")
        return None
    twin = copy.copy(target)
    twin.model = copy.deepcopy(target.model).double()
    twin.model.set_experts_implementation("eager")  # torch has no grouped product in float64
    try:
        return plain(twin, text)[-1]
    except (RuntimeError, NotImplementedError, TypeError) as error:
        notes.append(f"Left out float64: the model cannot compute in it ({str(error).splitlines()[0]}).")
        return None
