"""How long steps take, by the limit of their drafts."""

from collections import deque
from collections.abc import Collection

import numpy as np

from foretoken.survival import Vector, Whole

ENOUGH = 3
"""Timings from which on their median counts; of fewer the smallest, because the first ones are slow."""
RECENT = 31
"""Timings that are kept."""
EARLY, PLAIN = 4, 64
"""Drafted steps between the first plain step and the second, and between any others."""
OLD = 256
"""Steps after which a timing counts half."""
FAINT = 0.01
"""What a timing counts at least, however old: of nothing but vanishing weights no line could be drawn."""
POOLED = 30.0
"""Timings of a limit that count as much as the straight line through all."""


class Times:
    """Seconds of steps by limit, 0: plain ones, of batches of about one size.

    share  of the steps that asked for a draft, those that got one
    late   tokens that a drafter was told of late, those of long ago counting less
    over   plain steps that the steps which told it took longer
    need   plain steps that the account must hold for any limit, as they were last looked at
    """

    def __init__(self, like: "Times | None" = None) -> None:
        self.recent: dict[int, deque[float]] = {}
        self.typical: dict[int, float] = {} if like is None else dict(like.typical)
        self.share = 1.0 if like is None else like.share
        self.late, self.over = (0.0, 0.0) if like is None else (like.late, like.over)
        self.count, self.seen = 0, dict[int, int]()  # steps timed; which of them was a limit's last
        self.need = -np.inf
        self.plain, self.since = 0, 0  # plain steps timed; drafted ones since the last of them

    def note(self, limit: int, seconds: float) -> None:
        found = self.recent.setdefault(limit, deque(maxlen=RECENT))
        found.append(seconds)
        self.count += 1
        self.seen[limit] = self.count
        self.typical[limit] = typical(found, limit)
        if limit == 0:
            self.plain, self.since = self.plain + 1, 0
        else:
            self.since += 1

    @property
    def reading(self) -> float:
        """What a drafter needs to read a token that it was not told of, in plain steps."""
        return max(0.0, self.over / self.late) if self.late else 0.0

    def known(self, limit: int, times: int = 2) -> bool:
        """Whether it was timed often enough to be believed; the smaller of two is seldom an interrupted one."""
        return len(self.recent.get(limit, ())) >= times

    @property
    def due(self) -> bool:
        """Whether it is time for a plain step: the first two soon."""
        return self.since >= (0, EARLY, PLAIN)[min(self.plain, 2)]

    def ratios(self, limits: Whole) -> Vector:
        """Time of drafted steps over that of a plain one, never falling.

        In part what the limit itself took, in part what a straight line through all that were timed says: slow
        stretches of a machine fall on one limit or another, and a few steps of a limit are soon in one of them.
        """
        timed = sorted(self.typical)
        if len(timed) < 2 or timed[0] > 0:
            return np.ones(len(limits))
        took = np.array([self.typical[n] for n in timed]) / self.typical[0]
        weight = np.array([self.weight(n) for n in timed])
        line = straight(np.array(timed), took, np.array([1.0, *weight[1:]]), limits)
        known = np.isin(limits, timed)
        place = np.where(known, np.searchsorted(timed, limits), 0)
        own = np.where(known, weight[place], 0.0)
        return np.maximum.accumulate((own * took[place] + POOLED * line) / (own + POOLED))

    def weight(self, limit: int) -> float:
        """Timings that are kept of a limit, the less the older they are; one if they are another batch size's."""
        age = self.count - self.seen.get(limit, 0)
        return max(1, len(self.recent.get(limit, ()))) * max(FAINT, 0.5 ** (age / OLD))


def straight(x: Whole, y: Vector, weight: Vector, at: Whole) -> Vector:
    """The line of least squares through (0, 1), the first point, and the others, not falling and nowhere below 1.

    Through a single other point, it is half as steep from there on: what one level takes is in part what any draft
    takes.
    """
    total = weight.sum()
    middle, mean = weight @ x / total, weight @ y / total
    slope = max(0.0, float(weight @ ((x - middle) * (y - mean)) / (weight @ (x - middle) ** 2)))
    beyond = np.maximum(at - x[1], 0) * (slope / 2 if len(x) == 2 else 0.0)
    return np.maximum(1.0, mean + slope * (at - middle) - beyond)


def typical(seconds: Collection[float], limit: int) -> float:
    """The median, of few the smallest; of plain steps (limit 0) the lower quartile.

    Most of those that are timed follow drafted steps, whose memory they find in the caches in place of their own: on a
    processor they take some percent longer than in a row, and drafting must not look good beside that.
    """
    if len(seconds) < ENOUGH:
        return min(seconds)
    return sorted(seconds)[len(seconds) // (2 if limit else 4)]
