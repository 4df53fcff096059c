"""How deep the next drafts may be, from how past ones did: as many tokens per time as there are to be had.

A limit of d guesses on the longest path yields 1 + the sum of the chances that a guess of depth 1 to d survives, and
takes what steps of that limit took. For all rows of a batch there is one limit, that of the largest quotient; 0: no
draft. It depends on past steps alone, so nothing is selected by the value of a guess (docs/adaptive.md). What drafting
may lose against plain decoding is kept in an account, which no step may overdraw.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from foretoken.costs import same
from foretoken.drafter import Feed

LIMITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Depths that are tried: close together where a level more matters, few, so that each is timed often."""
GRANT = 2.0
"""Plain steps that drafting may lose before it has brought anything."""
RATE = 0.02
"""Of the time spent, what drafting may lose; with the grant 5 % of 64 steps."""
MOST = 16.0
"""Plain steps that the account holds at most: what a good stretch can lend to a bad one."""
UNKNOWN = 1.5
"""Plain steps that a draft whose time is not known is expected to lose at most."""
NOMINAL = 1.0
"""The same of a draft before which the drafter read prompts, which is no part of decoding."""
ENOUGH = 3
"""Timings from which on their median counts; of fewer the smallest, because the first ones are slow."""
RECENT = 15
"""Timings that are kept."""
PAUSE = 3.0
"""A step that took so many times what is usual was interrupted: no more is charged."""
FORGET = 0.92
"""Weight of a row's last drafted step over that of the newest one: about 12 steps count."""
SHARED = 0.98
"""The same for what all rows share."""
LENT = 4.0
"""Steps that what all rows share counts for in a row of its own."""
ALIKE = 3.0
"""Steps that the depth before counts for in what is shared."""
HOPE = 0.8
"""Chance of a guess before anything is known."""
FIRST, LAST = 4, 64
"""Plain steps before drafting is tried again, at first and after many failures."""
FARTHER = 4
"""A limit so many times as deep as the deepest that was timed may be tried."""
EARLY, PLAIN = 4, 64
"""Drafted steps between the first plain step and the second, and between any others."""
FAR = 8
"""Tokens behind from which on reading them can be told from chance."""
LATE = 0.8
"""Weight of a draft before which the drafter read what it was not told, over that of the next one."""
SEEN = 32
"""Drafts asked for that count for the share of them that came."""
OLD = 256
"""Steps after which a timing says little."""

NEAR = 0.99
"""Of limits that promise almost as much as the best one the deepest is taken: it shows what the others would bring."""

Vector = NDArray[np.float64]
Whole = NDArray[np.int64]


@dataclass(slots=True)
class Survival:
    """How often guesses survived at each depth, weights of forgotten steps, rows first.

    risk  [B, D], steps in which the guess before was accepted and one of this depth was allowed
    hits  [B, D], those of them in which it was accepted
    """

    risk: Vector
    hits: Vector

    @classmethod
    def none(cls, batch: int, depth: int) -> "Survival":
        return cls(np.zeros((batch, depth)), np.zeros((batch, depth)))

    def note(self, limit: Whole, accepted: Whole) -> None:
        """Add a step that accepted [B] guesses of at most `limit` [B]; rows of limit 0 keep what they had."""
        depth = np.arange(1, self.risk.shape[1] + 1)
        keep = np.where(limit > 0, FORGET, 1.0)[:, None]
        self.risk = keep * self.risk + (depth <= np.minimum(limit, accepted + 1)[:, None])
        self.hits = keep * self.hits + (depth <= np.minimum(limit, accepted)[:, None])

    def chances(self, prior: Vector) -> Vector:
        """[B, D]: of a guess behind accepted ones, which is free of what the limits were; `prior` [D]."""
        return (self.hits + LENT * prior) / (self.risk + LENT)


class Prior:
    """The chances [D] of all rows' guesses, where a new row begins; deeper than was tried they are as before."""

    def __init__(self, depth: int) -> None:
        self.risk, self.hits = np.zeros(depth), np.zeros(depth)
        self.chances = np.full(depth, HOPE)

    def note(self, limit: Whole, accepted: Whole) -> None:
        """Add the mean of the rows that drafted."""
        depth, drafted = np.arange(1, len(self.risk) + 1), limit > 0
        limit, accepted = limit[drafted, None], accepted[drafted, None]
        self.risk = SHARED * self.risk + (depth <= np.minimum(limit, accepted + 1)).mean(0)
        self.hits = SHARED * self.hits + (depth <= np.minimum(limit, accepted)).mean(0)
        chance, weight, found = HOPE, 1.0, list[float]()
        for hits, risk in zip(self.hits.tolist(), self.risk.tolist(), strict=True):
            chance = (hits + weight * chance) / (risk + weight)
            found.append(chance)
            weight = ALIKE
        self.chances = np.array(found)


class Times:
    """Seconds of steps by limit, 0: plain ones, of batches of about one size.

    share  of the steps that asked for a draft, those that got one
    late   tokens that a drafter was told of late, those of long ago counting less
    over   plain steps that the steps which told it took longer
    """

    def __init__(self, like: "Times | None" = None) -> None:
        self.recent: dict[int, deque[float]] = {}
        self.typical: dict[int, float] = {} if like is None else dict(like.typical)
        self.share = 1.0 if like is None else like.share
        self.late, self.over = (0.0, 0.0) if like is None else (like.late, like.over)
        self.count, self.seen = 0, dict[int, int]()  # steps timed; which of them was a limit's last
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
        """Time of drafted steps over that of a plain one.

        One that was timed seldom, or long ago, is no slower than the others suggest: or it would not be tried again.
        """
        timed = [limit for limit in self.typical if limit]
        if not timed or 0 not in self.typical:
            return np.ones(len(limits))
        sure = [n for n in timed if self.known(n, ENOUGH) and self.count - self.seen[n] < OLD]
        if not sure:
            return self.line(timed, limits)
        found, own = self.line(sure, limits), self.line(timed, limits)
        return np.minimum(found, own)

    def line(self, timed: list[int], limits: Whole) -> Vector:
        """Through a plain step and these: never falling, straight between them and behind.

        Behind a single one half as steep, because what the first level takes is in part what any draft takes.
        """
        known = sorted([0, *timed])
        times = np.maximum.accumulate([self.typical[limit] / self.typical[0] for limit in known])
        slope = (times[-1] - times[-2]) / (known[-1] - known[-2]) / (2 if len(known) == 2 else 1)
        return np.interp(limits, known, times) + slope * np.maximum(limits - known[-1], 0)


def typical(seconds: Collection[float], limit: int) -> float:
    """The median, of few the smallest; of plain steps the lower quartile.

    Most of those that are timed follow drafted steps, whose memory they find in the caches in place of their own: on a
    processor they take some percent longer than in a row, and drafting must not look good beside that.
    """
    if len(seconds) < ENOUGH:
        return min(seconds)
    return median(seconds) if limit else sorted(seconds)[len(seconds) // 4]


@dataclass(slots=True)
class Rows:
    """What the policy knows of the rows of one session.

    limits  [B], that of each row's last draft; 0: there was none, -1: its drafter was never asked
    behind  tokens of a row that its drafter has not been told
    """

    survival: Survival
    limits: Whole
    behind: int = 0

    @property
    def fresh(self) -> bool:
        """Whether a row's drafter has not read its prompt."""
        return bool(self.limits.min() < 0)

    def select(self, rows: list[int]) -> None:
        self.survival = Survival(self.survival.risk[rows], self.survival.hits[rows])
        self.limits = self.limits[rows]

    def join(self, other: "Rows") -> None:
        mine, theirs = self.survival, other.survival
        self.survival = Survival(np.concatenate([mine.risk, theirs.risk]), np.concatenate([mine.hits, theirs.hits]))
        self.limits = np.concatenate([self.limits, other.limits])
        self.behind = max(self.behind, other.behind)


@dataclass(slots=True)
class Asked:
    """The last step of any session.

    texts    its rows
    moment   when its draft was asked for
    limit    of the draft, 0 if there was none
    behind   tokens that the drafter was told late
    prompts  whether it read prompts
    """

    texts: list[list[int]]
    moment: float
    limit: int
    behind: int
    prompts: bool


class Policy:
    """Chooses limits, and keeps what is shared by all requests of a drafter.

    balance  plain steps that drafting may lose now
    rest     plain steps before it is tried again, `wait` at the next failure
    least    smallest limit that a draft keeps to: some drafters know one length only
    reach    depth of the deepest draft; `short`: some were not as deep as they might
    won      whether the last step was drafted and brought more than it took
    rested   whether plain steps followed the last drafted one
    """

    def __init__(self, depth: int) -> None:
        self.depth = min(depth, LIMITS[-1])
        self.limits = np.array([*(n for n in LIMITS if n < self.depth), self.depth])
        self.prior, self.times = Prior(self.depth), dict[int, Times]()
        self.balance, self.rest, self.wait = GRANT, 0, FIRST
        self.least, self.reach, self.short = 1, 0, False
        self.last: Asked | None = None
        self.won = self.rested = False

    def rows(self, batch: int) -> Rows:
        return Rows(Survival.none(batch, self.depth), np.full(batch, -1))

    def choose(self, feed: Feed, rows: Rows) -> int:
        """The limit of the next draft."""
        now = perf_counter()
        times = self.times_of(feed.batch)
        if rows.limits.max() > 0:
            self.learn(feed.count, rows)
        self.account(feed, times, now)
        limit = self.decide(times, feed, rows) if feed.budget > 1 else 0
        self.last = Asked(feed.texts, now, 0, rows.behind, bool(limit) and rows.fresh)
        return min(limit, feed.budget - 1)

    def drafted(self, feed: Feed, rows: Rows, limit: int, height: int) -> None:
        """Note what the drafter made of its limit."""
        if not limit:
            rows.limits = np.minimum(rows.limits, 0)
            return
        times = self.times_of(feed.batch)
        times.share += (bool(height) - times.share) / SEEN
        self.reach, self.short = max(self.reach, height), self.short or 0 < height < limit
        if height > limit:
            self.least = limit = min(height, self.depth)
        limit = limit if height else 0
        rows.limits = np.full_like(rows.limits, limit)
        if self.last is not None:
            self.last.limit = limit

    def times_of(self, batch: int) -> Times:
        """Those of batches up to the same power of two; at first as of the nearest size."""
        size = (batch - 1).bit_length()
        if size not in self.times:
            near = min(self.times, key=lambda other: abs(other - size), default=size)
            self.times[size] = Times(self.times.get(near))
        return self.times[size]

    def learn(self, count: list[int], rows: Rows) -> None:
        """What survived of the last draft, of rows that committed anything."""
        committed = np.array(count)
        limits = np.where(committed > 0, np.maximum(rows.limits, 0), 0)
        if limits.any():
            rows.survival.note(limits, committed - 1)
            self.prior.note(limits, committed - 1)

    def account(self, feed: Feed, times: Times, now: float) -> None:
        """Time the last step and book what it brought, if it was of the same rows."""
        last, self.won = self.last, False
        if last is None or not same(last.texts, feed.texts):
            return
        seconds = now - last.moment
        late = times.reading * last.behind * times.typical.get(0, 0.0) if last.limit else 0.0
        if not last.prompts and (last.limit == 0 or last.limit in self.limits):
            if last.limit and last.behind >= FAR and times.known(last.limit):
                over = (seconds - times.typical[last.limit]) / times.typical[0]
                times.late, times.over = LATE * times.late + last.behind, LATE * times.over + min(over, MOST)
            times.note(last.limit, max(0.0, seconds - late))
        if not times.plain:
            return
        took, brought = seconds / times.typical[0], 1.0
        if last.limit:
            usual = times.typical.get(last.limit, np.inf) / times.typical[0]
            took = min(took, PAUSE * usual + times.reading * last.behind)
            tokens = [n for n in feed.count if n]
            brought = sum(tokens) / max(1, len(tokens))
            if last.prompts:
                took = min(took, 1 + NOMINAL)
            elif not times.known(last.limit):
                took = min(took, 1 + UNKNOWN)
        else:
            took = 1.0
        self.won = brought > took
        self.balance = min(MOST, self.balance + brought - took + RATE * took)

    def decide(self, times: Times, feed: Feed, rows: Rows) -> int:
        """The limit of most tokens per time; now and then one although none pays."""
        if self.rest > FIRST and rows.fresh:
            self.rest = FIRST
        if times.due:
            return 0
        if self.rest > 0:
            self.rest -= 1
            return 0
        limits = self.candidates(times)
        ratios = times.ratios(limits)
        gains, loss = self.gains(times, feed, rows, limits, ratios), self.losses(times, limits, ratios)
        loss += min(times.reading * rows.behind, MOST / 2)  # or a slow reader never caught up
        gains = np.where(loss <= self.balance, gains, 0.0)
        best = int(np.flatnonzero(gains >= NEAR * gains.max())[-1])
        if gains[best] > 1:
            self.rested, self.wait = False, FIRST
            return int(limits[best])
        if gains[best] > 0 and self.won:
            return int(limits[best])
        if gains[best] > 0 and self.rested:
            self.rested, self.rest, self.wait = False, self.wait, min(LAST, 2 * self.wait)
            return int(limits[best])
        self.rested, self.rest = True, max(self.rest, FIRST)
        return 0

    def candidates(self, times: Times) -> Whole:
        """The limits that may be chosen: not much deeper than the deepest that was timed, or than drafts get."""
        if self.least > 1:
            return np.array([self.least])
        near = int((self.limits <= FARTHER * max(times.typical)).sum())
        deep = int((self.limits <= self.reach).sum()) + 1 if self.short else len(self.limits)
        return self.limits[: max(1, min(near, deep))]

    def gains(self, times: Times, feed: Feed, rows: Rows, limits: Whole, ratios: Vector) -> Vector:
        """Tokens per time of each limit over plain decoding; steps without a draft are as plain ones."""
        running = np.array(feed.count) > 0  # a finished row commits nothing
        chances = rows.survival.chances(self.prior.chances)[running if running.any() else slice(None)]
        deeper = chances.cumprod(1).mean(0).cumsum()
        return (1 + times.share * deeper[limits - 1]) / (1 + times.share * (ratios - 1))

    def losses(self, times: Times, limits: Whole, ratios: Vector) -> Vector:
        """How many plain steps longer than one each limit takes, never falling: what is lost if no guess is right."""
        over = np.maximum(ratios - 1, 0)
        unsure = np.where([n in times.typical for n in limits], np.minimum(over, UNKNOWN), UNKNOWN)
        return np.maximum.accumulate(np.where([times.known(n) for n in limits], over, unsure))
