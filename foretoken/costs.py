"""How many guesses pay on this machine: expected tokens per measured second.

A draft of n guesses behind L levels takes `once` + forward(n + 1) + (L - 1) * `level` seconds and yields 1 + the sum of
its guesses' probabilities. The best draft maximises the quotient (Sequoia, Chen et al. 2024, arXiv:2402.12374, section
3.3). Decoding's output never depends on these times, only which guesses are tried.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import exp
from statistics import median
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from foretoken.drafter import Feed
from foretoken.target import Target
from foretoken.tree import Draft, tree

WIDTHS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
MOST = WIDTHS[-1] - 1
"""Guesses of the widest draft that is timed."""
CONTEXT = 64
"""Committed tokens behind which forwards are timed."""
SECONDS = 1.0
"""After this time no further round of measurements begins."""
ROUNDS = 7
"""Of measurements, the first of which warms up."""
ENOUGH = 8
"""Timings before their median counts: the first ones are slow."""
RECENT = 64
"""Timings that are kept."""
HEAT = 0.7
"""What a drafter's logits are divided by at first."""
RATE = 0.02
"""How much a step changes that: with slopes of about 2 tokens per factor e, in about 25 steps."""
LEAST = 0.2
"""Its smallest value."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of drafting and judging.

    widths   of the drafts that were timed, ascending from 1
    forward  the target's forward over a draft of each of them
    level    every level of guesses behind the first
    once     everything else of a step, the first level included
    """

    widths: Sequence[int]
    forward: Sequence[float]
    level: float = 0.0
    once: float = 0.0

    @property
    def most(self) -> int:
        """Guesses of the widest draft that was timed."""
        return self.widths[-1] - 1

    def judging(self, width: Sequence[int] | range) -> Tensor:
        """[n] float64: seconds of a forward over each width, between the timed ones by a straight line, never falling
        as the width grows: a wide draft that was faster than a narrow one was lucky."""
        rising = np.maximum.accumulate(self.forward)
        return torch.from_numpy(np.interp(width, self.widths, rising))

    def rates(self, tokens: Tensor, levels: "Tensor | int") -> Tensor:
        """[n]: tokens per second of drafts of 0, 1, 2, ... guesses that yield `tokens` [n] behind `levels` levels."""
        seconds = self.once + self.judging(range(1, len(tokens) + 1)) + (levels - 1) * self.level
        return tokens.double() / seconds.to(tokens.device)


class Worth:
    """Decides, level by level of one draft, how many guesses pay (`grow.Pays`), and keeps what it expected.

    One host synchronisation per level.

    heat       what the drafter's logits are divided by for its guesses' probabilities
    predicted  of each row, the sum of the probabilities of the guesses that were kept
    levels     seconds of each level behind the first
    moment     when it was decided
    """

    def __init__(self, costs: Costs, heat: float = 1.0) -> None:
        self.costs, self.heat = costs, heat
        self.predicted: list[float] = []
        self.kept = 0
        self.levels: list[float] = []
        self.moment = perf_counter()

    def __call__(self, found: Tensor, ends: Tensor | None, level: int) -> int | None:
        """How many of the likeliest guesses to keep, or None: a further level may pay.

        found  [B, C] log-probability of every guess down to `level`, that of its whole path
        ends   [B, W] of those that can go on; None: there is no further level

        No guess is likelier than the one before it, so the best that a further level can bring is one for each of
        `ends`, as likely. If that would not pay for the level, it will not.
        """
        found, ends = found.exp(), None if ends is None else ends.exp()
        sums = summed(found, self.costs.most)
        best, kept = self.costs.rates(1 + sums.mean(0), level).max(0)
        if ends is not None:
            hoped = summed(torch.cat([found, ends], 1), self.costs.most)
            kept = torch.where(self.costs.rates(1 + hoped.mean(0), level + 1).max() > best, -1, kept)
        self.kept = int(kept)
        before, self.moment = self.moment, perf_counter()
        if level > 1:
            self.levels.append(self.moment - before)
        if self.kept < 0:
            return None
        self.predicted = sums[:, self.kept].tolist()
        return self.kept


def summed(chance: Tensor, most: int) -> Tensor:
    """[B, n]: the sum of the largest 0, 1, 2, ... `most` of chance [B, C]."""
    best = chance.double().sort(-1, descending=True).values[:, :most]
    return torch.nn.functional.pad(best.cumsum(-1), (1, 0))


class Clock:
    """Costs on this machine by batch size, and how sure the drafter may be.

    Forwards are timed when first asked for, the rest as decoding goes on. A drafter trained on text is too modest about
    what one model will say next: dividing its logits by one number, `heat`, makes the sum of its guesses' probabilities
    what is accepted, at every depth. It is learnt from each step's difference.
    """

    def __init__(self, target: Target) -> None:
        self.target, self.heat = target, HEAT
        self.forwards: dict[int, Costs] = {}
        self.levels: dict[int, deque[float]] = {}
        self.rests: dict[int, deque[float]] = {}
        self.before: tuple[list[list[int]], Worth] | None = None  # the last draft's rows, and what was expected of it

    def __call__(self, feed: Feed) -> Worth:
        """What decides for the next draft; batches up to the same power of two are alike."""
        size = 1 << (feed.batch - 1).bit_length()
        self.learn(feed, size)
        if size not in self.forwards:
            self.forwards[size] = measure(self.target, size)
        level, once = (typical(seconds.get(size, ())) for seconds in (self.levels, self.rests))
        worth = Worth(replace(self.forwards[size], level=level, once=once), self.heat)
        self.before = feed.texts, worth
        return worth

    def learn(self, feed: Feed, size: int) -> None:
        """Note how the last draft went, if it was of the same rows."""
        if self.before is None or not same(self.before[0], feed.texts) or not (worth := self.before[1]).predicted:
            return
        rest = perf_counter() - worth.moment - float(worth.costs.judging([1 + worth.kept])[0])
        self.rests.setdefault(size, deque(maxlen=RECENT)).append(max(0.0, rest))
        self.levels.setdefault(size, deque(maxlen=RECENT)).extend(worth.levels)
        missed = [p - (n - 1) for p, n in zip(worth.predicted, feed.count, strict=True) if n]
        if missed:
            self.heat *= exp(RATE * sum(missed) / len(missed))
            self.heat = min(max(self.heat, LEAST), 1 / LEAST)


def same(before: list[list[int]], now: list[list[int]]) -> bool:
    """Whether these are the very same rows."""
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))


def typical(seconds: Collection[float]) -> float:
    """The median, or 0 before there are enough."""
    return median(seconds) if len(seconds) >= ENOUGH else 0.0


@torch.inference_mode()
def measure(target: Target, batch: int = 1, widths: Sequence[int] = WIDTHS, *, context: int = CONTEXT) -> Costs:
    """The target's forwards over drafts of each width, `batch` rows: the median of a few, in about a second.

    Of a large model that is one forward of each width, after one to warm up. context: committed tokens before them.
    """
    if target.context is not None:
        context = max(1, min(context, target.context - widths[-1]))
    cache = target.cache(batch, context + widths[-1], widths[-1])
    target.read(some_tokens(target, batch, context), [context] * batch, cache)
    drafts = [some_draft(target, batch, width) for width in widths]
    found: list[list[float]] = [[] for _ in widths]
    started = perf_counter()
    for number in range(ROUNDS):
        if number > 1 and perf_counter() - started > SECONDS:
            break
        for draft, seconds in zip(drafts, found, strict=True):
            finish(target)
            began = perf_counter()
            target.judge(draft, cache)
            finish(target)
            seconds.append(perf_counter() - began)
    return Costs(widths, [median(seconds[1:]) for seconds in found])


def some_tokens(target: Target, batch: int, count: int) -> Tensor:
    """[batch, count] int64, all different where the vocabulary allows."""
    return (torch.arange(batch * count, device=target.device).view(batch, count) * 7919) % target.vocab


def some_draft(target: Target, batch: int, width: int) -> Draft:
    """A tree of `width` nodes, two behind each."""
    parent = (torch.arange(width, device=target.device) - 1).div(2, rounding_mode="floor")
    return tree(some_tokens(target, batch, width), parent.expand(batch, width))


def finish(target: Target) -> None:
    """Wait for the device."""
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)
