"""How often guesses survive at each depth, whatever the limits under which that was seen."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FORGET = 0.94
"""Weight of a row's last drafted step over that of the newest one: about 16 steps count."""
SHARED = 0.98
"""The same for what all rows share."""
LENT = 6.0
"""Steps that what all rows share counts for in a row of its own."""
ALIKE = 3.0
"""Steps that the depth before counts for in what is shared."""
HOPE = 0.8
"""Chance of a guess before anything is known."""

Vector = NDArray[np.float64]
Whole = NDArray[np.int64]


@dataclass(slots=True)
class Survival:
    """That of rows, steps weighted by how long ago they were.

    risk  [B, D], steps in which the guess before was accepted and one of this depth was allowed
    hits  [B, D], those of them in which it was accepted
    """

    risk: Vector
    hits: Vector

    @classmethod
    def none(cls, batch: int, depth: int) -> "Survival":
        return cls(np.zeros((batch, depth)), np.zeros((batch, depth)))

    def note(self, limit: Whole, accepted: Whole) -> None:
        """Add S steps that accepted [S, B] guesses of at most `limit` [S, B]; a step of limit 0 is none of the row."""
        drafted = limit > 0
        later = drafted[::-1].cumsum(0)[::-1] - drafted
        weight, keep = FORGET**later, (FORGET ** drafted.sum(0))[:, None]
        allowed, right = seen(limit, accepted, self.risk.shape[1])
        self.risk = keep * self.risk + (weight[..., None] * allowed).sum(0)
        self.hits = keep * self.hits + (weight[..., None] * right).sum(0)

    def chances(self, prior: Vector) -> Vector:
        """[B, D]: of a guess behind accepted ones, which is free of what the limits were; `prior` [D]."""
        return (self.hits + LENT * prior) / (self.risk + LENT)

    def select(self, rows: list[int]) -> None:
        self.risk, self.hits = self.risk[rows], self.hits[rows]

    def join(self, other: "Survival") -> None:
        self.risk = np.concatenate([self.risk, other.risk])
        self.hits = np.concatenate([self.hits, other.hits])


class Prior:
    """The chances [D] of all rows' guesses, where a new row begins; deeper than was tried they are as before."""

    def __init__(self, depth: int) -> None:
        self.risk, self.hits = np.zeros(depth), np.zeros(depth)
        self.chances = np.full(depth, HOPE)

    def note(self, limit: Whole, accepted: Whole) -> None:
        """Add S steps [S, B], of each the mean of the rows that drafted; in each there is one."""
        weight = SHARED ** np.arange(len(limit) - 1, -1, -1) / (limit > 0).sum(1)
        keep, (allowed, right) = SHARED ** len(limit), seen(limit, accepted, len(self.risk))
        self.risk = keep * self.risk + weight @ allowed.sum(1)
        self.hits = keep * self.hits + weight @ right.sum(1)
        chance, weight, found = HOPE, 1.0, list[float]()
        for hits, risk in zip(self.hits.tolist(), self.risk.tolist(), strict=True):
            chance = (hits + weight * chance) / (risk + weight)
            found.append(chance)
            weight = ALIKE
        self.chances = np.array(found)


def seen(limit: Whole, accepted: Whole, depth: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """[S, B, D]: (which guesses were allowed behind accepted ones, which of these were accepted), of [S, B] steps."""
    level = np.arange(1, depth + 1)
    return level <= np.minimum(limit, accepted + 1)[..., None], level <= np.minimum(limit, accepted)[..., None]
