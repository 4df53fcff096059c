"""From a drafter's guesses to a draft: which tree, and whether its tokens are drawn or the likeliest."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from foretoken.costs import MOST, Clock
from foretoken.drafter import Feed, Needs
from foretoken.errors import UserError, at_least, unknown
from foretoken.grow import Extend, Pays, Shape, grow
from foretoken.paths import Paths, planted, shallow, star
from foretoken.target import Target
from foretoken.tree import Draft

TREES = ("auto", "chain", "beam", "dynamic", "static", "hardware")
CANDIDATES = ("auto", "sampled", "top")
WIDTH = 8
"""Paths that a dynamic tree follows, if nothing says how many."""
COLD = 0.6
"""Below this temperature the likeliest tokens survive rejection more often than drawn ones."""


class Guesser(Protocol):
    """A drafter whose guesses at a node are a law over tokens: any tree can be built of them."""

    plan: "Plan"

    @property
    def needs(self) -> Needs: ...

    def start(self, batch: int, capacity: int) -> Any: ...

    def begin(self, feed: Feed, state: Any) -> tuple[Tensor, Extend]:
        """Take in what was committed; logits [B, 1, V'] at the root and the function that reads further nodes."""
        ...


@dataclass(frozen=True, slots=True)
class Settings:
    """
    tree        chain; beam: the `width` likeliest paths at each depth; dynamic: the `nodes` likeliest guesses of all
                that `width` paths offer (EAGLE-2); static: the tree that `foretoken calibrate` measured; hardware: as
                dynamic, with as many nodes and levels as pay on this machine, which is timed; auto: chain or beam if
                a width is given, else dynamic for eagle, static for others if there is one, or a chain
    depth       guesses on the longest path (0: as many as there are)
    width       paths followed at each depth (0: as the tree needs; of a dynamic one, its nodes by its depth)
    nodes       guesses of a static or dynamic tree, the best ones (0: all)
    stop        stop behind a guess less likely than this under the drafter
    candidates  sampled: as the target will draw them, or under rejection rules drawn from the drafter's law; top: its
                likeliest tokens; auto: sampled, but top under rejection rules at temperatures up to 0.6
    """

    tree: str = "auto"
    depth: int = 0
    width: int = 0
    nodes: int = 16
    stop: float = 0.0
    candidates: str = "auto"

    def __post_init__(self) -> None:
        at_least("the tree", depth=(self.depth, 0), width=(self.width, 0), nodes=(self.nodes, 0), stop=(self.stop, 0.0))
        for what, name, known in (("tree", self.tree, TREES), ("candidates", self.candidates, CANDIDATES)):
            if name not in known:
                raise unknown(what, name, known)


@dataclass(frozen=True, slots=True)
class Plan:
    """How guesses become a draft.

    shape       as `grow` follows paths
    trees       fixed trees in place of it, parents before children, by the temperature that each is best at; beside a
                shape that keeps guesses by their value, for drawn guesses only
    candidates  as in `Settings`
    worth       what decides how many guesses pay, for each draft
    """

    shape: Shape
    trees: Mapping[float, Paths] = field(default_factory=dict[float, Paths])
    candidates: str = "auto"
    worth: Callable[[Feed], Pays] | None = None

    @property
    def nodes(self) -> int:
        """Most nodes of a draft, the root included."""
        fixed = max((1 + len(paths) for paths in self.trees.values()), default=1 + self.shape.depth * self.shape.width)
        return fixed if self.trees and not self.shape.nodes else max(fixed, self.shape.size)

    @property
    def slots(self) -> int:
        """Most nodes that a draft holds or its drafter reads, the root included."""
        return max(self.nodes, 1 + self.shape.depth * self.shape.width)

    def paths(self, temperature: float) -> Paths:
        """The tree measured nearest to `temperature`; none if there are no trees."""
        return self.trees[min(self.trees, key=lambda t: abs(t - temperature))] if self.trees else ()

    def draft(self, feed: Feed, logits: Tensor, extend: Extend) -> Draft:
        """The draft of guesses that begin with `logits` [B, 1, V'] and go on with `extend`."""
        hottest = max(s.temperature for s in feed.sampler.settings)
        if self.candidates == "top" or (self.candidates == "auto" and feed.samples and hottest <= COLD):
            feed = blind(feed)
        deepest = max(1, feed.budget - 1)
        if (paths := self.paths(hottest)) and (feed.samples or not self.shape.nodes):
            return planted(shallow(paths, deepest), feed, logits, extend)
        if feed.samples:
            paths = star(self.shape.width, min(self.shape.depth, deepest))
            return planted(paths, feed, logits, extend, self.shape.stop)
        return grow(self.shape, feed, logits, extend, None if self.worth is None else self.worth(feed))


def blind(feed: Feed) -> Feed:
    """The feed of a drafter that draws nothing and does not see the target's noise."""
    quiet = copy.copy(feed.sampler)
    quiet.sampled = False
    return replace(feed, sampler=quiet, samples=False)


def planned(
    settings: Settings,
    deepest: int,
    trees: Mapping[str, Paths] | None = None,
    usual: str = "chain",
    target: Target | None = None,
) -> Plan:
    """The plan that `settings` ask for, of `deepest` guesses at most, with the trees calibrated for the drafter.

    usual: the method's own tree, where nothing says which; target: timed for a hardware tree.
    """
    s, depth = settings, min(settings.depth or deepest, deepest)
    kind = s.tree
    if kind == "auto":
        given = {0: "static" if trees and usual == "chain" else usual, 1: "chain"}
        kind = given.get(s.width, "beam")
    if kind == "static" and not trees:
        raise UserError("A static tree was asked for and none is calibrated; run `foretoken calibrate` first.")
    cut = {float(t): [path for path in paths if len(path) <= depth] for t, paths in (trees or {}).items()}
    fixed = {t: paths[: s.nodes] if s.nodes else paths for t, paths in cut.items()}
    if kind == "static":
        return Plan(Shape(depth), fixed, s.candidates)
    if kind == "hardware":
        if target is None:
            raise UserError("This method does not say whose forwards to time; use another tree than hardware.")
        return Plan(Shape(depth, s.width or WIDTH, MOST, s.stop), fixed, s.candidates, Clock(target))
    if kind == "dynamic":
        width = s.width or max(2, round(s.nodes / depth) if s.nodes else WIDTH)
        return Plan(Shape(depth, width, s.nodes or depth * width, s.stop), fixed, s.candidates)
    return Plan(Shape(depth, 1 if kind == "chain" else s.width or 4, 0, s.stop), candidates=s.candidates)
