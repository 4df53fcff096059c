"""The engine: propose, judge, accept, commit, for rows of different length that join and leave."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch
from torch import Tensor

from foretoken.drafter import Drafter, Feed
from foretoken.errors import UserError
from foretoken.noise import Noise
from foretoken.rules import Match, Rule
from foretoken.sampling import Sampler, Sampling
from foretoken.step import Step
from foretoken.target import Target
from foretoken.text import TextStream
from foretoken.tree import Accepted, Draft, chain, fresh

RUN = 8
"""Plain steps that are made at once where nobody waits for each token: what asking for them takes is shared."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued.

    tokens          the prompt, at least one token
    number          names the request's noise, beside its seed: same number and seed, same sample
    max_new_tokens  most tokens to emit
    eos             tokens that end the output; the one that did is part of it
    stop            strings that end the output; the text is cut before them
    logprobs        whether to report each emitted token's log-probability under the unprocessed logits
    stream          whether the row keeps its text while it runs
    until           called with prompt and output after each token; True ends the output there
    """

    tokens: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    number: int = 0
    max_new_tokens: int = 128
    eos: Sequence[int] = ()
    stop: Sequence[str] = ()
    logprobs: bool = False
    stream: bool = False
    until: Callable[[list[int]], bool] | None = None


@dataclass(slots=True)
class Row:
    """What is known of a request on the host.

    text      prompt and output, the root included
    drafted   per emitted token, whether it was guessed before it was emitted
    accepted  per depth from 1, the forwards that accepted a guess of that depth
    forwards  target forwards after the prompt's
    finish    "eos", "stop" or "length"; None while running
    """

    request: Request
    text: list[int]
    drafted: list[bool] = field(default_factory=list[bool])
    accepted: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    forwards: int = 0
    finish: str | None = None
    stream: TextStream | None = None
    began: float = 0.0
    ended: float = 0.0

    @property
    def output(self) -> list[int]:
        return self.text[len(self.request.tokens) :]

    @property
    def emitted(self) -> int:
        """Tokens of the output so far."""
        return len(self.text) - len(self.request.tokens)

    @property
    def remaining(self) -> int:
        """Tokens that may still be emitted."""
        return 0 if self.finish is not None else self.request.max_new_tokens - self.emitted

    def take(self, tokens: list[int], guessed: int, logprobs: list[float] | None) -> list[int]:
        """Append the emitted `tokens`, the first `guessed` of which were drafted; returns those before a stop."""
        if self.finish is not None:
            return []
        if self.stream is not None or self.request.until is not None:
            tokens = self._until_stop(tokens)
        self.text += tokens
        guessed = min(guessed, len(tokens))
        self.drafted += [i < guessed for i in range(len(tokens))]
        self.accepted += [0] * (guessed - len(self.accepted))
        for depth in range(guessed):
            self.accepted[depth] += 1
        if logprobs is not None and self.request.logprobs:
            self.logprobs += logprobs[: len(tokens)]
        if self.finish is None and tokens and tokens[-1] in self.request.eos:
            self.finish = "eos"
        if self.finish is None and self.remaining == 0:
            self.finish = "length"
        if self.finish is not None:
            self.ended = perf_counter()
        return tokens

    def _until_stop(self, tokens: list[int]) -> list[int]:
        """The emitted tokens up to the one that completes a stop string or meets the caller's condition."""
        if self.stream is not None and not self.request.stop and self.request.until is None:
            self.stream.push(*tokens)
            return tokens
        for i, token in enumerate(tokens):
            stopped = self.stream is not None and self.stream.push(token)
            if stopped or (self.request.until is not None and self.request.until(self.text + tokens[: i + 1])):
                self.finish = "stop"
                return tokens[: i + 1]
        return tokens


class Session:
    """Rows being decoded together. `step` advances every running row by at least one token."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        requests: Sequence[Request],
        *,
        rule: Rule | None = None,
        capacity: int | None = None,
        on_read: Callable[[int, int], None] | None = None,
    ) -> None:
        """Read the prompts and emit one token for each.

        capacity: tokens per row, by default what the requests need; rows that join later must need no more.
        on_read: told the prompt tokens read so far, and of how many, after each chunk of the longest prompt.
        """
        self.target, self.drafter, self.rule = target.settled(drafter.needs.features), drafter, rule or Match()
        for request in requests:
            check_request(target, request)
        self.rows = [Row(self._fitted(r), list(r.tokens), began=perf_counter()) for r in requests]
        self.capacity = capacity or capacity_for(target, drafter, requests)
        self.cache = target.cache(len(requests), self.capacity, drafter.needs.width)
        self.state = drafter.start(len(requests), self.capacity)
        noise = Noise.of([r.sampling.seed for r in requests], [r.number for r in requests], target.device)
        self.sampler = Sampler([r.sampling for r in requests], noise, target.vocab)
        for row in self.rows:
            if row.request.stop or row.request.stream:
                if target.tokenizer is None:
                    raise UserError("Stop strings and streaming need text; load the model with its tokenizer.")
                row.stream = TextStream(target.tokenizer, row.request.stop, row.request.tokens)
        self._eos = self._eos_table()
        self._mode = torch.inference_mode()  # one for all steps
        with self._mode:
            self.last = self._prefill(on_read)

    def _fitted(self, request: Request) -> Request:
        """The request, with no more new tokens than the context holds."""
        context = self.target.context
        room = request.max_new_tokens if context is None else context - len(request.tokens)
        return replace(request, max_new_tokens=min(request.max_new_tokens, room))

    def _eos_table(self) -> Tensor:
        """[B, E] int64: each row's end tokens, padded with -1."""
        E = max((len(row.request.eos) for row in self.rows), default=0)
        table = [[*row.request.eos, *[-1] * (E - len(row.request.eos))] for row in self.rows]
        return torch.tensor(table, dtype=torch.int64, device=self.target.device).view(len(table), E)

    def _prefill(self, on_read: Callable[[int, int], None] | None) -> Step:
        """The prompts as chains accepted whole: the first tokens are what the target says after them."""
        prompts = [list(row.request.tokens) for row in self.rows]
        longest = max(len(p) for p in prompts)
        tokens = torch.tensor([p + p[-1:] * (longest - len(p)) for p in prompts], device=self.target.device)
        count = [len(p) for p in prompts]
        read = self.target.read(tokens, count, self.cache, self.drafter.needs.features, on_read)
        counts = torch.tensor(count, device=self.target.device)
        self.sampler.observe(tokens, counts, output=False)
        draft = chain(tokens.gather(1, counts[:, None] - 1))
        scores = self.sampler.scores(read.logits, draft, self.cache.length, prompts)
        accepted = self.rule(draft, scores)
        self._hand_out(accepted.next[:, None], accepted, read.logits)
        return Step(tokens, count, read.features, accepted.next, scores.emitted, torch.zeros_like(accepted.next))

    @property
    def running(self) -> list[int]:
        """Indices of the rows that are not finished."""
        return [i for i, row in enumerate(self.rows) if row.finish is None]

    def step(self) -> list[list[int]]:
        """A step for all rows, if any is running. Returns the tokens that each emitted, none for finished ones.

        It is one forward, or several plain ones where the drafter asked for that and nobody waits for each token.
        """
        if not self.running:
            return [[] for _ in self.rows]
        with self._mode:
            feed = self.feed()
            draft = self.drafter.propose(feed, self.state)
            if draft.times > feed.run:
                draft = replace(draft, times=feed.run)
            return self._at_once(draft) or self._by_parts(draft)

    @property
    def longest_run(self) -> int:
        """Plain steps that may be made in one call: one where somebody waits for each token."""
        waits = any(r.stream is not None or r.request.until is not None or r.request.logprobs for r in self.rows)
        return 1 if waits or not self.target.repeats(self.sampler, self.rule) else RUN

    def run(self) -> None:
        """Steps until no row is running."""
        while self.running:
            self.step()

    def _at_once(self, draft: Draft) -> list[list[int]] | None:
        """The step in one call of the target, if it can do that; the tokens that each row emitted."""
        if any(row.request.logprobs for row in self.rows):
            return None
        limits = [row.remaining for row in self.rows]
        features = self.drafter.needs.features
        made = self.target.advance(draft, self.cache, self.sampler, self.rule, limits, self._eos, features)
        if made is None:
            return None
        self.last, told = made
        return self._give(told)[1]

    def _by_parts(self, draft: Draft) -> list[list[int]]:
        """The step as forward, scores, rule and commit; the tokens that each row emitted."""
        read = self.target.judge(draft, self.cache, self.drafter.needs.features)
        texts = [row.text for row in self.rows]
        scores = self.sampler.scores(read.logits, draft, self.cache.length + 1, texts)
        accepted = self.rule(draft, scores)
        new = fresh(draft, accepted)
        committed, emitted = self._hand_out(new, accepted, read.logits)
        path = accepted.path[:, : max(committed)]
        last = path.gather(1, (torch.tensor(committed, device=path.device) - 1).clamp(min=0)[:, None]).squeeze(1)
        root = torch.tensor([row.text[-1] for row in self.rows], device=path.device)
        features = None
        if read.features is not None:
            features = read.features.gather(1, path[..., None].expand(-1, -1, read.features.shape[2]))
        self.last = Step(draft.tokens.gather(1, path), committed, features, root, scores.emitted, last)
        self.cache.commit(None if draft.chained else path, committed)
        return emitted

    def feed(self) -> Feed:
        """What the drafter is told before the next step."""
        step = self.last
        return Feed(
            tokens=step.tokens,
            count=step.count,
            features=step.features,
            root=step.root,
            length=self.cache.length,
            texts=[row.text for row in self.rows],
            budget=max(row.remaining for row in self.rows),
            sampler=self.sampler,
            samples=self.rule.samples,
            emitted=step.emitted,
            last=step.last,
            cache=self.cache,
            run=self.longest_run,
        )

    def _hand_out(self, new: Tensor, accepted: Accepted, logits: Tensor) -> tuple[list[int], list[list[int]]]:
        """Clip each row's `new` tokens [B, N] at its limits and give them to it: the one host synchronisation.

        Returns the number of nodes that each row commits and the tokens that it emitted.
        """
        limit = torch.tensor([row.remaining for row in self.rows], device=new.device)
        count = torch.minimum(accepted.count, limit)
        place = torch.arange(new.shape[1], device=new.device)
        if self._eos.shape[1]:
            ends = (new[..., None] == self._eos[:, None]).any(-1) & (place < count[:, None])
            count = torch.where(ends.any(-1), ends.to(torch.uint8).argmax(-1) + 1, count)
        self.sampler.observe(new, count, output=True)
        host: list[list[int]] = torch.cat([new, count[:, None], accepted.count[:, None]], 1).tolist()
        logprobs: list[list[float]] | None = None
        if any(row.request.logprobs for row in self.rows):
            rows = torch.arange(len(new), device=new.device)[:, None]
            at_path = logits[rows, accepted.path[:, : new.shape[1]]].float().log_softmax(-1)
            logprobs = at_path.gather(-1, new[..., None]).squeeze(-1).tolist()
        return self._give(host, logprobs)

    def _give(
        self, told: list[list[int]], logprobs: list[list[float]] | None = None
    ) -> tuple[list[int], list[list[int]]]:
        """Give each row what it was told: new tokens, how many of them to emit, and 1 + the accepted guesses.

        Returns the number of nodes that each row commits and the tokens that it emitted.
        """
        counts, emitted = [row[-2] for row in told], list[list[int]]()
        for b, row in enumerate(self.rows):
            if row.finish is None and row.emitted > 0:
                row.forwards += max(1, counts[b] - (told[b][-1] - 1))  # each emits a token that was not guessed
            emitted.append(row.take(told[b][: counts[b]], told[b][-1] - 1, None if logprobs is None else logprobs[b]))
        return counts, emitted

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order; the others leave."""
        self.rows = [self.rows[i] for i in rows]
        self.cache.select(rows)
        self.sampler.select(rows)
        self.state.select(rows)
        self.last = self.last.select(rows)
        self._eos = self._eos_table()

    def join(self, other: "Session") -> None:
        """Append the rows of `other`: same target, drafter and rule, same capacity."""
        if other.capacity != self.capacity:
            raise UserError(
                f"A session of capacity {other.capacity} cannot join one of {self.capacity}; give both one capacity."
            )
        self.rows = self.rows + other.rows
        self.cache.join(other.cache)
        self.sampler.join(other.sampler)
        self.state.join(other.state)
        self.last = self.last.join(other.last)
        self._eos = self._eos_table()


def capacity_for(target: Target, drafter: Drafter, requests: Sequence[Request]) -> int:
    """Cache slots that each row needs: the longest request and one draft behind it."""
    needed = max(len(r.tokens) + r.max_new_tokens for r in requests)
    if target.context is not None:
        needed = min(needed, target.context)
    return needed + drafter.needs.width


def check_request(target: Target, request: Request) -> None:
    """`UserError` for a request that cannot run."""
    n, context = len(request.tokens), target.context
    if n == 0:
        raise UserError("The prompt is empty; give at least one token.")
    if context is not None and n >= context:
        raise UserError(
            f"The prompt has {n} tokens and the model's context is {context}; shorten it to {context - 1} or fewer."
        )
    if request.max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {request.max_new_tokens}; ask for at least 1.")
    if bad := next((t for t in request.tokens if not 0 <= t < target.vocab), None):
        raise UserError(
            f"The prompt has token {bad}; the model's vocabulary is 0 to {target.vocab - 1}: use its own tokenizer."
        )
