"""How deep the next drafts may be, from how past ones did: as many tokens per time as there are to be had.

A limit of d guesses on the longest path yields 1 + the sum of the chances that a guess of depth 1 to d survives, and
takes what steps of that limit took. For all rows of a batch there is one limit, that of the largest quotient; 0: no
draft. It depends on past steps alone, so nothing is selected by the value of a guess (docs/adaptive.md). What drafting
may lose against plain decoding is kept in an account, which no step may overdraw.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf
from time import perf_counter

import numpy as np

from foretoken.costs import same
from foretoken.drafter import Feed
from foretoken.survival import Prior, Survival
from foretoken.times import EMPTY, ENOUGH, Times

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
"""The same of a draft before which the drafter read prompts: what that takes has an account of its own."""
PAUSE = 3.0
"""A step that took so many times what is usual was interrupted, as was a choice so long: no more is charged."""
FIRST, LAST = 8, 32
"""Plain steps before drafting is tried again, at first and after many failures."""
HOPELESS, LONG = 0.9, 512
"""Of so little over plain decoding if all guesses were right, and so many plain steps before it is timed again."""
FARTHER = 4
"""A limit so many times as deep as the deepest that was timed may be tried."""
FAR = 8
"""Tokens behind from which on reading them can be told from chance."""
LATE = 0.8
"""Weight of a draft before which the drafter read what it was not told, over that of the next one."""
SEEN = 32
"""Drafts asked for that count for the share of them that came."""
NEAR = 0.99
"""Of limits that promise almost as much as the best one the deepest is taken: it shows what the others would bring."""
LOOK = 8
"""Of so many steps that are plain whatever is known, two are timed and looked at."""
KEPT = 3
"""Further steps for which a limit that pays stays: to think costs time as well."""


@dataclass(slots=True)
class Rows:
    """What the policy knows of the rows of one session.

    prior   the chances of all rows, the same object for all sessions
    limits  per row, that of its last draft; 0: there was none, -1: its drafter was never asked
    behind  tokens of a row that its drafter has not been told
    plain   plain steps that were asked for at once when it last chose
    news    limits and counts of committed tokens of the drafted steps that are yet to be learnt from
    """

    survival: Survival
    prior: Prior
    limits: list[int]
    behind: int = 0
    plain: int = 1
    news: list[tuple[list[int], list[int]]] = field(default_factory=list[tuple[list[int], list[int]]])

    @classmethod
    def new(cls, batch: int, prior: Prior) -> "Rows":
        return cls(Survival.none(batch, len(prior.chances)), prior, [-1] * batch)

    @property
    def fresh(self) -> bool:
        """Whether a row's drafter has not read its prompt."""
        return min(self.limits) < 0

    def made(self, feed: Feed) -> int:
        """Steps since it last chose: each commits a token, if they were plain."""
        return max(1, min(self.plain, max(feed.count)))

    def learn(self) -> None:
        """What survived, of rows that committed anything."""
        if not self.news:
            return
        limits, counts = (np.array(part) for part in zip(*self.news, strict=True))
        self.news = []
        limits = np.where(counts > 0, np.maximum(limits, 0), 0)
        some = limits.any(1)
        if some.any():
            self.survival.note(limits[some], counts[some] - 1)
            self.prior.note(limits[some], counts[some] - 1)

    def select(self, rows: list[int]) -> None:
        self.learn()
        self.survival.select(rows)
        self.limits = [self.limits[r] for r in rows]

    def join(self, other: "Rows") -> None:
        self.learn()
        other.learn()
        self.survival.join(other.survival)
        self.limits = self.limits + other.limits
        self.behind = max(self.behind, other.behind)


@dataclass(slots=True)
class Asked:
    """The last step of any session.

    texts    its rows
    moment   when its draft was asked for
    asked    whether a draft was asked for
    limit    of the draft, 0 if there was none
    behind   tokens that the drafter was told late
    prompts  whether it read prompts
    """

    texts: list[list[int]]
    moment: float
    asked: bool
    limit: int
    behind: int
    prompts: bool


class Policy:
    """Chooses limits, and keeps what is shared by all requests of a drafter.

    balance  plain steps that drafting may lose now
    prefill  plain steps that reading prompts may take now: below 0 a new request is left alone
    rest     plain steps before it is tried again, `wait` at the next failure
    least    smallest limit that a draft keeps to: some drafters know one length only
    reach    depth of the deepest draft; `short`: some were not as deep as they might
    won      whether the last step was drafted and brought more than it took
    rested   whether plain steps followed the last drafted one
    idle     steps since there is nothing to decide
    kept     further steps for which the `limit` of the last choice stays; `loss`: plain steps that one may lose
    """

    def __init__(self, depth: int) -> None:
        self.depth = min(depth, LIMITS[-1])
        self.limits = [*(n for n in LIMITS if n < self.depth), self.depth]
        self.prior, self.times = Prior(self.depth), dict[tuple[int, int], Times]()
        self.balance, self.prefill, self.rest, self.wait = GRANT, GRANT, 0, FIRST
        self.least, self.reach, self.short = 1, 0, False
        self.last: Asked | None = None
        self.won = self.rested = False
        self.kept, self.limit, self.loss = 0, 0, 0.0
        self.idle = 0

    def rows(self, batch: int) -> Rows:
        return Rows.new(batch, self.prior)

    def choose(self, feed: Feed, rows: Rows) -> int:
        """The limit of the next draft."""
        times, steps = self.times_of(feed), rows.made(feed)
        if max(rows.limits) <= 0:
            rows.behind += steps - 1
            self.rest, times.idle = max(0, self.rest - steps), times.idle + steps
        if self.barred(times, rows) and self.unseen(rows, steps):
            return 0
        now = perf_counter()
        if max(rows.limits) > 0:
            rows.news.append((rows.limits, list(feed.count)))
        last = self.last if self.last is not None and same(self.last.texts, feed.texts) else None
        self.won = last is not None and self.account(last, feed, times, now, steps)
        if last and self.kept and self.loss <= self.balance and not times.due:
            self.kept -= 1
        else:
            self.limit = self.decide(times, feed, rows) if feed.budget > 1 else 0
        self.last = Asked(feed.texts, now, self.limit > 0, 0, rows.behind, self.limit > 0 and rows.fresh)
        if not self.limit and times.plain:
            self.balance -= min((perf_counter() - now) / times.typical[0], PAUSE)  # to think costs time as well
        return min(self.limit, feed.budget - 1)

    def barred(self, times: Times, rows: Rows) -> bool:
        """Whether the accounts cover no draft at all, or none can pay."""
        hopeless = times.hopeless and times.idle < LONG
        return hopeless or self.balance < times.need or (rows.fresh and self.prefill < 0)

    def unseen(self, rows: Rows, steps: int) -> bool:
        """Whether what must be plain is neither timed nor learnt from; if so the last `steps` are booked as such."""
        self.idle += 1
        if max(rows.limits) > 0 or self.idle % LOOK < 2:
            return False
        self.last = None
        gain = RATE * steps
        self.balance, self.prefill = min(MOST, self.balance + gain), min(MOST, self.prefill + gain)
        return True

    def drafted(self, feed: Feed, rows: Rows, limit: int, height: int) -> None:
        """Note what the drafter made of its limit."""
        times = self.times_of(feed)
        rows.plain = 1 if limit else feed.run
        if not limit:
            rows.limits = [min(n, 0) for n in rows.limits]
            return
        times.share += (bool(height) - times.share) / SEEN
        self.reach, self.short = max(self.reach, height), self.short or 0 < height < limit
        if height > limit:
            self.least = limit = min(height, self.depth)
        limit = limit if height else 0
        rows.limits = [limit] * len(rows.limits)
        if self.last is not None:
            self.last.limit = limit

    def times_of(self, feed: Feed) -> Times:
        """Those of batches up to the same power of two and as many plain steps at once; at first as of the nearest."""
        kind = (feed.batch - 1).bit_length(), feed.run
        if kind not in self.times:
            near = min(self.times, key=lambda other: (abs(other[0] - kind[0]), other[1] != kind[1]), default=kind)
            self.times[kind] = Times(self.times.get(near), feed.run)
        return self.times[kind]

    def account(self, last: Asked, feed: Feed, times: Times, now: float, steps: int) -> bool:
        """Time the last steps, which were of the same rows, and book what they brought: whether more than they took."""
        seconds = (now - last.moment) / steps
        late = times.reading * last.behind * times.typical.get(0, 0.0) if last.limit else 0.0
        if not last.prompts and (last.limit == 0 or last.limit in self.limits):
            if last.limit and last.behind >= FAR and times.known(last.limit):
                over = (seconds - times.typical[last.limit]) / times.typical[0]
                times.late, times.over = LATE * times.late + last.behind, LATE * times.over + min(over, MOST)
            times.note(last.limit if last.limit or not last.asked else EMPTY, max(0.0, seconds - late))
        if not times.plain:
            return False
        took, brought = seconds / times.typical[0], float(steps)
        read = min(MOST, max(0.0, took - 1 - NOMINAL)) if last.prompts else 0.0
        if last.limit:
            usual = times.typical.get(last.limit, inf) / times.typical[0]
            took = min(took, PAUSE * usual + times.reading * last.behind)
            tokens = [n for n in feed.count if n]
            brought = sum(tokens) / max(1, len(tokens))
            if last.prompts:
                took = min(took, 1 + NOMINAL)
            elif not times.known(last.limit):
                took = min(took, 1 + UNKNOWN)
        else:
            took = brought * (times.empty if last.asked else 1.0)
        self.balance = min(MOST, self.balance + brought - took + RATE * took)
        self.prefill = min(MOST, self.prefill + max(0.0, brought - took) + RATE * took - read)
        return brought > took

    def decide(self, times: Times, feed: Feed, rows: Rows) -> int:
        """The limit of most tokens per time; now and then one although none pays."""
        self.kept = 0
        if self.barred(times, rows):
            return 0
        if rows.fresh:
            self.rest, self.wait = min(self.rest, FIRST), FIRST
        if times.due or self.rest > 0:
            self.rested = True
            return 0
        rows.learn()
        limits = self.candidates(times)
        ratios = times.ratios(limits)
        loss = self.losses(times, rows, limits, ratios)
        times.need, times.hopeless = loss[0], self.hopeless(times)
        if self.barred(times, rows):
            self.rested = True
            return 0
        extra = self.extra(feed, rows, limits)
        gains = self.gains(times, extra, ratios, loss)
        best = max(i for i, gain in enumerate(gains) if gain >= NEAR * max(gains))
        gain, limit = gains[best], limits[best]
        if gain > 1:
            self.rested, self.wait = False, FIRST
            self.kept, self.loss = KEPT * times.known(limit, ENOUGH), loss[best]
            return limit
        if gain > 0 and self.won:
            return limit
        if gain > 0 and self.rested:
            self.rest = FIRST if self.balance > MOST / 2 else self.wait  # there is something to spend
            self.rested, self.wait = False, min(LAST, 2 * self.wait)
            gains = self.gains(times, extra, hoped(times, limits, ratios), loss)
            return next((n for n, gain in zip(limits, gains, strict=True) if gain > 1), limit)
        self.rested, self.rest = True, max(self.rest, FIRST)
        return 0

    def candidates(self, times: Times) -> list[int]:
        """The limits that may be chosen: not much deeper than the deepest that was timed, or than drafts get."""
        if self.least > 1:
            return [self.least]
        near = sum(n <= FARTHER * max(times.typical) for n in self.limits)
        deep = sum(n <= self.reach for n in self.limits) + 1 if self.short else len(self.limits)
        return self.limits[: max(1, min(near, deep))]

    def hopeless(self, times: Times) -> bool:
        """Whether steps take so long that no limit would pay if every guess were right."""
        if times.idle >= LONG or not any(times.known(n, ENOUGH) for n in self.limits):
            return False
        limits = [self.least] if self.least > 1 else self.limits
        return all(1 + n < HOPELESS * ratio for n, ratio in zip(limits, times.ratios(limits), strict=True))

    def extra(self, feed: Feed, rows: Rows, limits: Sequence[int]) -> list[float]:
        """How many guesses of a draft of each limit survive."""
        running = np.array(feed.count) > 0  # a finished row commits nothing
        chances = rows.survival.chances(self.prior.chances)[running if running.any() else slice(None)]
        deeper = chances.cumprod(1).mean(0).cumsum().tolist()
        return [deeper[n - 1] for n in limits]

    def gains(
        self, times: Times, extra: Sequence[float], ratios: Sequence[float], loss: Sequence[float]
    ) -> list[float]:
        """Tokens per time of each limit over plain decoding; 0 where the account does not cover it."""
        share, without = times.share, (1 - times.share) * times.empty
        gains = ((1 + share * more) / (without + share * ratio) for more, ratio in zip(extra, ratios, strict=True))
        return [gain if lost <= self.balance else 0.0 for gain, lost in zip(gains, loss, strict=True)]

    def losses(self, times: Times, rows: Rows, limits: Sequence[int], ratios: Sequence[float]) -> list[float]:
        """How many plain steps longer than one each limit takes, never falling: what is lost if no guess is right."""
        late = min(times.reading * rows.behind, MOST / 2)  # or a slow reader never caught up
        most = [inf if times.known(n) else UNKNOWN for n in limits]
        over = [x - 1 if n in times.typical else UNKNOWN for n, x in zip(limits, ratios, strict=True)]
        return [late + x for x in accumulate(map(min, over, most), max)]


def hoped(times: Times, limits: Sequence[int], ratios: Sequence[float]) -> list[float]:
    """Times of steps if drafts deeper than any that was timed take no longer: whether they do must be seen."""
    timed = [ratio for n, ratio in zip(limits, ratios, strict=True) if n in times.typical]
    return [min([ratio, *timed[-1:]]) for ratio in ratios]
