"""Files of `foretoken analyze heads` as arrays, and of `foretoken analyze marginal` what they are compared with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import normpath

import numpy as np

from foretoken.analysis.enumeration import head_floor
from foretoken.analysis.summary import Estimate, Floats, Whole, columns, within
from foretoken.report.drawing import MOST, Key
from foretoken.study.rows import Row, Rows
from foretoken.study.views.series import groups, matrix, vector

LINES, CEILING = MOST - 1, MOST - 1
"""Drafters in one figure, and the style that is kept for the marginal law."""
Place = tuple[int, int, int]
"""Document, position, context."""


class Measured:
    """A file's rows as arrays [N, K], with the names it goes by."""

    def __init__(self, file: Rows) -> None:
        self.head, self.rows, self.end = file.head, file.rows, file.end or {}
        self.drafter: str = file.head.settings["drafter"]
        self.target = file.head.label.removesuffix(self.drafter).strip()
        self.trained_on: str = file.head.settings["trained_on"]
        self.depths = [offset - 1 for offset in file.head.settings["offsets"]]

    @property
    def told(self) -> bool:
        """Whether its guesses know the tokens before them."""
        return bool(self.end["told"])

    @cached_property
    def groups(self) -> Whole:
        return groups(self.rows)

    @cached_property
    def rank(self) -> Floats:
        """Infinite where the draft vocabulary lacks the token."""
        found = matrix(self.rows, "rank")
        return np.where(np.isnan(found), np.inf, found)

    @cached_property
    def overlap(self) -> Floats:
        return matrix(self.rows, "overlap")

    @cached_property
    def agrees(self) -> Floats:
        return matrix(self.rows, "agrees")

    @cached_property
    def kl(self) -> Floats:
        return matrix(self.rows, "kl")

    @cached_property
    def places(self) -> list[Place]:
        return [place(row) for row in self.rows]

    def means(self, values: Floats) -> dict[int, Estimate | None]:
        """The estimate of each column of [N, K], by guess."""
        return dict(zip(self.depths, columns(values, self.groups), strict=True))


Values = Callable[[Measured], Floats]
"""A number for each position and guess [N, K]."""


def place(row: Row) -> Place:
    return row["document"], row["position"], row["context"]


def top(best: int) -> Values:
    return lambda m: within(m.rank, best)


def overlap(m: Measured) -> Floats:
    return m.overlap


def agreement(m: Measured) -> Floats:
    return m.agrees


def survival(m: Measured) -> Floats:
    """Whether this guess and all before it, made from the same state, are the target's likeliest tokens."""
    return np.multiply.accumulate(m.agrees, axis=1)


class Marginal:
    """The marginal laws of a model on a text, its depth k brought to the number of the guess of the same token, k - 1.

    rank     [N, K - 1], of the text's token
    overlap  [N, K - 1], with the model's law behind tokens drawn from it
    floor    [N], what Pinsker's inequality promises of guess 1
    """

    def __init__(self, file: Rows) -> None:
        self.head, self.rows = file.head, file.rows
        self.groups, self.places = groups(file.rows), [place(row) for row in file.rows]
        self.rank = matrix(file.rows, "rank")[:, 1:]
        self.overlap = matrix(file.rows, "overlap")
        nats = vector(file.rows, "information")
        self.floor = np.array([np.nan if np.isnan(n) else head_floor(n) for n in nats])

    def matches(self, m: Measured) -> bool:
        """Whether these are of the same model and text."""
        return normpath(self.head.model) == normpath(m.head.model) and self.head.data == m.head.data


@dataclass(frozen=True, slots=True)
class Group:
    """Drafters of one target on one text, and the marginal laws of these, if they were measured."""

    target: str
    text: str
    name: str
    members: list[Measured]
    marginal: Marginal | None

    @property
    def where(self) -> str:
        return f"{self.target} on {self.text}"

    @property
    def drawn(self) -> list[Measured]:
        return self.members[:LINES]

    def keys(self, members: Sequence[Measured]) -> list[Key]:
        return [Key(m.drafter, self.drawn.index(m)) for m in members]
