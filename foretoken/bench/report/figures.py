"""What a comparison's figures are: medians and quartiles, means over tasks, acceptance, forwards."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import median, quantiles
from typing import NamedTuple


class Place(NamedTuple):
    """A cell: what a speed-up is measured in."""

    method: str
    task: str
    temperature: float
    batch: int


class Group(NamedTuple):
    """Prompts decoded together once. With another method in its place, what it is compared with."""

    run: str
    round: str
    place: Place
    group: int
    repeat: int


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of n values and their quartiles, interpolated."""

    median: float
    low: float
    high: float
    n: int

    @staticmethod
    def of(values: Sequence[float]) -> "Spread | None":
        if not values:
            return None
        quarters = quantiles(values, method="inclusive") if len(values) > 1 else [*values] * 3
        return Spread(median(values), quarters[0], quarters[2], len(values))


@dataclass(frozen=True, slots=True)
class Cell:
    """A method in one task, temperature and batch size.

    rate            tokens per second, of all groups and repeats
    speedup         over plain decoding in the same round
    own             of a peer, over its own plain decoding
    tau             tokens per forward
    same, judged    prompts whose tokens are plain decoding's, of those where they should be; of the first repeat
    predicted       speed-up
    """

    place: Place
    rate: Spread
    speedup: Spread | None
    own: Spread | None
    tau: float | None
    same: int
    judged: int
    predicted: float | None


@dataclass(frozen=True, slots=True)
class Overall:
    """A speed-up over tasks: geometric means of their medians and quartiles, and the least and the greatest median."""

    mean: float
    low: float
    high: float
    least: float
    most: float
    tasks: int

    @staticmethod
    def of(spreads: Sequence[Spread]) -> "Overall | None":
        medians = [s.median for s in spreads]
        if not medians:
            return None
        mean, low, high = (geometric([getattr(s, name) for s in spreads]) for name in ("median", "low", "high"))
        return Overall(mean, low, high, min(medians), max(medians), len(medians))


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Of `forwards`, how many accepted a guess of each depth from 1."""

    forwards: int
    accepted: list[int]

    @property
    def unconditional(self) -> list[float]:
        """P(the first i guesses were accepted)."""
        return [n / self.forwards for n in self.accepted] if self.forwards else []

    @property
    def conditional(self) -> list[float | None]:
        """P(guess i was accepted | those before it were); None where they never were."""
        before = [self.forwards, *self.accepted]
        return [n / m if m else None for n, m in zip(self.accepted, before, strict=False)]


@dataclass(frozen=True, slots=True)
class Parts:
    """Where the seconds of groups went, as shares of them; what the target's forwards read, and memory.

    first      reading the prompts
    read_gb_s  the median
    memory     bytes, the most that the process held
    """

    first: float
    draft: float
    verify: float
    own: float
    read_gb_s: float | None
    memory: int | None


@dataclass(frozen=True, slots=True)
class Method:
    """What a method is, and its figures over all tasks at the smallest batch size, by temperature.

    share  its extra parameters over the target's
    """

    name: str
    drafter: str
    settings: dict[str, object]
    rule: str
    exact: bool
    peer: bool
    requires: str
    extra_parameters: int
    share: float
    extra_memory: int
    same: int
    judged: int
    tau: dict[float, float]
    acceptance: dict[float, Acceptance]
    parts: dict[float, Parts]


@dataclass(frozen=True, slots=True)
class Forwards:
    """Seconds of the target's forward over each width, for one batch size."""

    batch: int
    widths: list[int]
    seconds: list[float]

    @property
    def ratios(self) -> list[float | None]:
        """v(width)."""
        one = dict(zip(self.widths, self.seconds, strict=True)).get(1)
        return [s / one if one else None for s in self.seconds]


def geometric(values: Sequence[float]) -> float:
    """The geometric mean; 0 if a value is."""
    return exp(sum(map(log, values)) / len(values)) if min(values) > 0 else 0.0
