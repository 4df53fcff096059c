"""What the text repeats and what a trained drafter expects, in one tree: copying and novelty are both fast."""

from dataclasses import dataclass
from typing import Any

from foretoken.drafter import Drafter, Feed, Needs
from foretoken.drafters import configured, make_drafter, module_of
from foretoken.errors import UserError, at_least, unknown
from foretoken.target import Target
from foretoken.tree import Draft, merge

COPYING = {"suffix": "nodes", "prompt_lookup": "length"}
"""Methods that copy, each with its setting of how many tokens."""

NUMBERED = ("jacobi", "lookahead")
"""Methods that read what the target said at the nodes of their last draft, by number, which merging changes."""


@dataclass(frozen=True, slots=True)
class Config:
    """
    path    the trained drafter as NAME:PATH (or a built one)
    part    its settings, as key=value,key=value (or a dictionary)
    copy    what copies: suffix or prompt_lookup
    copies  most copied guesses of a draft (0: the method's default)
    """

    path: "str | Drafter" = ""
    part: "str | dict[str, Any]" = ""
    copy: str = "suffix"
    copies: int = 8

    def __post_init__(self) -> None:
        at_least("hybrid", copies=(self.copies, 0))
        if self.copy not in COPYING:
            raise unknown("method that copies", self.copy, COPYING)
        name = method_of(self.path)
        if name == "hybrid":
            raise UserError("A hybrid came as a part of a hybrid; name one trained drafter, such as hybrid:mtp:PATH.")
        if name in NUMBERED:
            raise UserError(
                f"{name} reads the target's answers at the nodes of its own draft, which a hybrid numbers anew; "
                "use a trained drafter, such as hybrid:mtp:PATH."
            )
        if name and isinstance(self.path, str):
            given = self.settings | ({"path": path} if (path := self.path.partition(":")[2]) else {})
            configured(module_of(name).Config, name, given)

    @property
    def settings(self) -> dict[str, Any]:
        """The trained drafter's."""
        if not isinstance(self.part, str):
            return self.part
        pairs = [text.partition("=") for text in self.part.split(",") if text]
        if not all(key.strip() and equals for key, equals, _ in pairs):
            raise UserError(f"hybrid: part is {self.part!r}; write it as key=value, several with commas between.")
        return {key.strip(): value.strip() for key, _, value in pairs}


def method_of(drafter: "str | Drafter") -> str:
    """The name of a drafter's method: what stands before the path, or the file of its class."""
    return drafter.partition(":")[0] if isinstance(drafter, str) else type(drafter).__module__.rpartition(".")[2]


@dataclass(slots=True)
class State:
    """The states of both parts."""

    trained: Any
    copying: Any

    def select(self, rows: list[int]) -> None:
        self.trained.select(rows)
        self.copying.select(rows)

    def join(self, other: "State") -> None:
        self.trained.join(other.trained)
        self.copying.join(other.copying)


class Hybrid:
    def __init__(self, trained: Drafter, copying: Drafter) -> None:
        self.trained, self.copying = trained, copying

    @property
    def needs(self) -> Needs:
        """Both drafts beside each other at one root, and what the trained part reads."""
        own = self.trained.needs
        return Needs(own.width + self.copying.needs.width - 1, own.features)

    def start(self, batch: int, capacity: int) -> State:
        return State(self.trained.start(batch, capacity), self.copying.start(batch, capacity))

    def propose(self, feed: Feed, state: State) -> Draft:
        """The trained part's nodes first: if they are drawn, copied ones that equal them are the same node."""
        trained = self.trained.propose(feed, state.trained)  # on a GPU it runs while the host copies
        return merge(trained, self.copying.propose(feed, state.copying))


def build(target: Target, config: Config) -> Hybrid:
    if not config.path:
        raise UserError("hybrid needs a trained drafter beside the one that copies; name it as hybrid:NAME:PATH.")
    most = {COPYING[config.copy]: config.copies} if config.copies else {}
    return Hybrid(make_drafter(config.path, target, config.settings), make_drafter(config.copy, target, most))
