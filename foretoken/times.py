"""How long steps take, by the limit of their drafts."""

from collections import deque
from collections.abc import Collection, Sequence
from itertools import accumulate
from math import inf

ENOUGH = 3
"""Timings from which on their median counts; of fewer the smallest, because the first ones are slow."""
EMPTY = -1
"""Stands for the limit of steps for which a draft was asked for and there was none."""
RECENT = 31
"""Timings that are kept."""
CHANGED = 0.5
"""A step in so much of the usual time says that the machine has changed: what was timed before is forgotten."""
EARLY, PLAIN = 4, 64
"""Drafted steps for each plain one, between the first time that some are timed and the second, and from then on."""
OLD = 256
"""Steps after which a timing counts half."""
FAINT = 0.01
"""What a timing counts at least, however old: of nothing but vanishing weights no line could be drawn."""
POOLED = 30.0
"""Timings of a limit that count as much as the straight line through all."""


class Times:
    """Seconds of steps by limit, 0: plain ones, of batches of about one size and plain steps made `run` at once.

    share     of the steps that asked for a draft, those that got one; `without`: seconds of the others
    late      tokens that a drafter was told of late, those of long ago counting less
    over      plain steps that the steps which told it took longer
    need      plain steps that the account must hold for any limit, as they were last looked at
    hopeless  whether no limit would pay if all guesses were right, as it was last looked at
    idle      plain steps since the last drafted one
    """

    def __init__(self, like: "Times | None" = None, run: int = 1) -> None:
        self.run = run
        self.recent: dict[int, deque[float]] = {}
        self.typical: dict[int, float] = {} if like is None else dict(like.typical)
        self.share, self.without = (1.0, 0.0) if like is None else (like.share, like.without)
        self.late, self.over = (0.0, 0.0) if like is None else (like.late, like.over)
        self.count, self.seen = 0, dict[int, int]()  # steps timed; which of them was a limit's last
        self.need, self.hopeless, self.idle = -inf, False, 0
        self.plain, self.since = 0, 0  # plain steps timed; drafted ones since the last of them

    def note(self, limit: int, seconds: float) -> None:
        found = self.recent.setdefault(limit, deque(maxlen=RECENT))
        if limit > 0 and seconds < CHANGED * self.typical.get(limit, 0.0):
            found.clear()
        found.append(seconds)
        self.count += 1
        self.seen[limit] = self.count
        if limit == EMPTY:
            self.without = typical(found, 0)
            return
        self.typical[limit] = typical(found, limit)
        if limit == 0:
            self.plain, self.since = self.plain + 1, 0
        else:
            self.since += 1
            self.hopeless, self.idle = False, 0

    @property
    def reading(self) -> float:
        """What a drafter needs to read a token that it was not told of, in plain steps."""
        return max(0.0, self.over / self.late) if self.late else 0.0

    @property
    def empty(self) -> float:
        """What a step takes for which there was no draft, in plain steps: those may be made many at once."""
        return max(1.0, self.without / self.typical[0])

    def known(self, limit: int, times: int = 2) -> bool:
        """Whether it was timed often enough to be believed; the smaller of two is seldom an interrupted one."""
        return len(self.recent.get(limit, ())) >= times

    @property
    def due(self) -> bool:
        """Whether it is time for a plain step: the first two soon."""
        return self.since >= (0, EARLY * self.run, PLAIN * self.run)[min(self.plain, 2)]

    def ratios(self, limits: Sequence[int]) -> list[float]:
        """Time of drafted steps over that of a plain one, never falling.

        In part what the limit itself took, in part what a straight line through all that were timed says: slow
        stretches of a machine fall on one limit or another, and a few steps of a limit are soon in one of them.
        """
        timed = sorted(self.typical)
        if len(timed) < 2 or timed[0] > 0:
            return [1.0] * len(limits)
        took = {n: self.typical[n] / self.typical[0] for n in timed}
        weight = {n: self.weight(n) if n else 1.0 for n in timed}
        line = straight(took, weight, limits)
        own = (weight.get(n, 0.0) for n in limits)
        mixed = ((w * took.get(n, 0.0) + POOLED * x) / (w + POOLED) for n, w, x in zip(limits, own, line, strict=True))
        return [*accumulate(mixed, max)]

    def weight(self, limit: int) -> float:
        """Timings that are kept of a limit, the less the older they are; one if they are another batch size's."""
        age = self.count - self.seen.get(limit, 0)
        return max(1, len(self.recent.get(limit, ()))) * max(FAINT, 0.5 ** (age / OLD))


def straight(y: dict[int, float], weight: dict[int, float], at: Sequence[int]) -> list[float]:
    """The line of least squares through y[0] = 1, the first point, and the others, not falling and nowhere below 1.

    Through a single other point, it is half as steep from there on: what one level takes is in part what any draft
    takes.
    """
    total = sum(weight.values())
    middle, mean = (sum(w * v for w, v in zip(weight.values(), of, strict=True)) / total for of in (y, y.values()))
    off = {n: weight[n] * (n - middle) for n in y}
    slope = max(0.0, sum(off[n] * (y[n] - mean) for n in y) / sum(off[n] * (n - middle) for n in y))
    bend, less = max(y), slope / 2 if len(y) == 2 else 0.0
    return [max(1.0, mean + slope * (n - middle) - less * max(0, n - bend)) for n in at]


def typical(seconds: Collection[float], limit: int) -> float:
    """The median, of few the smallest; of plain steps (limit 0) the lower quartile.

    Most of those that are timed follow drafted steps, whose memory they find in the caches in place of their own: on a
    processor they take some percent longer than in a row, and drafting must not look good beside that.
    """
    if len(seconds) < ENOUGH:
        return min(seconds)
    return sorted(seconds)[len(seconds) // (2 if limit else 4)]
