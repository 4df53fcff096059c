"""The interface between the engine and whatever guesses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from foretoken.cache import SlotCache
from foretoken.noise import DRAFT, TARGET, vocabulary
from foretoken.sampling import Sampler, law_of
from foretoken.step import Step
from foretoken.tree import Draft


@dataclass(frozen=True, slots=True)
class Needs:
    """What a drafter asks of the engine.

    width     most nodes of a draft, the root included
    features  target layers whose outputs it reads (0 the embedding, -1 the final hidden state)
    """

    width: int
    features: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Feed:
    """What happened since the last proposal, rows first.

    tokens    [B, M] int64, committed since then, of which `count[b]` are real; the whole prompt at first
    count     M at most, per row, on the host
    features  [B, M, F] at `tokens`, or None
    root      [B] int64, the token emitted last, not yet read by the target
    length    [B] int64, committed tokens = position of the root
    texts     prompt and output of each row, root included, on the host; not to be changed
    budget    most tokens that any row may still emit
    sampler   the requests' sampling: their noise, temperature and truncation
    samples   whether the rule needs guesses drawn from q with noise of their own
    emitted   [B, N] what the target said at every node of the last draft (after the prompt: at its last token)
    last      [B] int64, the last accepted node of that draft, where `root` was emitted
    cache     the target's cache
    run       most plain steps that the target may make at once
    """

    tokens: Tensor
    count: list[int]
    features: Tensor | None
    root: Tensor
    length: Tensor
    texts: list[list[int]]
    budget: int
    sampler: Sampler
    samples: bool
    emitted: Tensor
    last: Tensor
    cache: SlotCache
    run: int = 1

    @property
    def batch(self) -> int:
        return self.root.shape[0]

    @property
    def step(self) -> Step:
        """What the last step left."""
        return Step(self.tokens, self.count, self.features, self.root, self.emitted, self.last)

    def values(self, logits: Tensor) -> Tensor:
        """A drafter's logits [B, n, V'] cut to the target's vocabulary and truncated as the target's will be."""
        logits = logits[..., : self.sampler.vocab].float()
        return self.sampler.shape(logits)

    def law(self, values: Tensor) -> Tensor:
        """[B, n, V']: the drafter's law at the request's temperature."""
        return law_of(values, self.sampler.temperature)

    def rank(self, values: Tensor, level: int) -> Tensor:
        """[B, n, V']: values + T * gumbel for guesses at depth `level`; their order is the order of drafting.

        Under `match` the noise is the target's own at that position: the drafter may look at it, because the output
        does not depend on the draft. Under rejection rules it is the drafter's own, fresh every round.
        """
        if not self.sampler.sampled:
            return values
        tokens = vocabulary(values.shape[-1], values.device)
        if self.samples:
            where, stream = (self.length[:, None] << 12) + level, DRAFT
        else:
            where, stream = self.length[:, None] + level, TARGET
        race = self.sampler.noise.log_exponential(where, tokens, stream)
        return torch.addcmul(values, self.sampler.temperature, race, value=-1)


class State(Protocol):
    """A drafter's run state, rows first."""

    def select(self, rows: list[int]) -> None: ...

    def join(self, other: Self) -> None: ...


class Drafter(Protocol):
    """Whatever guesses. Holds weights and settings only; everything of a run is in its state."""

    @property
    def needs(self) -> Needs: ...

    def start(self, batch: int, capacity: int) -> Any: ...

    def propose(self, feed: Feed, state: Any) -> Draft: ...


class Stateless:
    """The state of a drafter that keeps nothing."""

    def select(self, rows: list[int]) -> None:
        pass

    def join(self, other: "Stateless") -> None:
        pass
