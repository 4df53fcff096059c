"""Every draft that a drafter could make, with what it would yield on known texts: the tuner's candidates.

What a drafter offers at each place is recorded once per kind of tree; every length, size and stop threshold of the kind
follows by walking the record.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from foretoken.bench.engine import Watch
from foretoken.bench.methods import label_of
from foretoken.bench.offers import Asked, Grown, Offers, Walk, ask, walk
from foretoken.decode import Request
from foretoken.drafter import Drafter
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.plan import Plan, Settings, planned
from foretoken.target import Target
from foretoken.tuned import TUNED, opened

DEEPEST = 8
"""Guesses on the longest path that is tried."""
PATHS = (2, 4, 8)
"""Paths that dynamic trees follow at each depth."""
SIZES = (2, 4, 6, 8, 12, 16, 24, 32, 48, 63)
"""Guesses of trees."""
STOPS = (0.0, 0.1, 0.2, 0.3, 0.5)
"""A chain stops behind a guess less likely than this."""
ALL = 1 << 10
"""More levels and nodes than any draft has."""
LAWLESS: dict[str, list[dict[str, Any]]] = {
    "suffix": [{"nodes": n} for n in (3, 7, 15, 31)],
    "prompt_lookup": [{"length": n} for n in (2, 4, 8, 16)],
    "jacobi": [{"length": n} for n in (3, 7)],
    "lookahead": [{"window": 4, "ngram": 3, "guesses": 4}, {}],
    "hybrid": [{"copies": n} for n in (4, 8)],
}
"""Settings of the methods that give no law over tokens."""
FROM_TEXT = ("suffix", "prompt_lookup", "hybrid")
"""Those whose guesses follow from the text; others depend on their earlier drafts, and only decoding shows them."""
TREE = frozenset({"tree", "depth", "width", "nodes", "stop"})
"""Settings that say what draft a law becomes: where one is given, the user has chosen."""


@dataclass(frozen=True, slots=True)
class Known:
    """Requests in groups that are decoded together, and the texts that plain decoding makes of them."""

    requests: list[list[Request]]
    texts: list[list[list[int]]]

    @property
    def tokens(self) -> int:
        """Tokens emitted behind the prompts' first."""
        pairs = zip(self.requests, self.texts, strict=True)
        return sum(len(t) - len(r.tokens) - 1 for rs, ts in pairs for r, t in zip(rs, ts, strict=True))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A drafter's settings, and what they yield.

    kind     candidates of one kind share a model of their time
    make     builds the drafter
    walks    per group of texts decoded together
    corner   whether it is to be timed, for the model of its kind
    """

    drafter: str
    kind: str
    settings: dict[str, Any]
    make: Callable[[], Drafter] = field(repr=False)
    walks: list[Walk] = field(repr=False)
    tokens: int
    corner: bool

    @property
    def tokens_per_forward(self) -> float:
        """Tokens emitted over the forwards of all texts, the prompts' own left out of both."""
        return self.tokens / sum(sum(w.forwards) for w in self.walks)

    @property
    def label(self) -> str:
        return label_of(self.drafter, {k: str(v) for k, v in self.settings.items()}, "match")


def candidates(
    target: Target, drafter: str, settings: dict[str, Any], known: Known, watch: Callable[[Drafter], list[Watch]]
) -> Iterator[Candidate]:
    """Every candidate of a drafter; only one where settings of its tree are given, or a file (@FILE) names it.

    watch: decodes the requests with a drafter, group by group.
    """
    decided = drafter.startswith(TUNED)
    drafter, settings = opened(drafter, settings)
    name = drafter.partition(":")[0]
    made = make_drafter(drafter, target, settings)
    lawful = hasattr(made, "plan")
    if decided or (lawful and TREE & settings.keys()):
        yield single(target, drafter, settings, lambda: made, known, watch)
        return
    if not lawful:
        yield from lawless(target, drafter, settings, known, watch)
        return
    base: Any = make_drafter(drafter, target, settings | {"depth": DEEPEST, "nodes": 0})
    if not isinstance(base.plan, Plan):
        raise UserError(f"{name} has a plan of its own kind, which cannot be tuned; leave it out.")
    yield from chains(target, drafter, settings, base, known)
    for width in PATHS:
        yield from dynamic(target, drafter, settings, base, known, width)
    yield from static(target, drafter, settings, base, known)


def lawless(
    target: Target, drafter: str, settings: dict[str, Any], known: Known, watch: Callable[[Drafter], list[Watch]]
) -> Iterator[Candidate]:
    """The settings worth trying of a method without a law, each once."""
    tried = list[dict[str, Any]]()
    for own in LAWLESS.get(drafter.partition(":")[0], [{}]):
        if (given := own | settings) not in tried:
            tried.append(given)
            yield single(target, drafter, given, partial(make_drafter, drafter, target, given), known, watch)


def single(
    target: Target,
    drafter: str,
    settings: dict[str, Any],
    make: Callable[[], Drafter],
    known: Known,
    watch: Callable[[Drafter], list[Watch]],
) -> Candidate:
    """These settings as they are, a kind of their own."""
    if drafter.partition(":")[0] in FROM_TEXT:
        walks = [walk(offers, ALL, ALL) for offers in recorded(target, known, lambda texts: Asked(make(), texts))]
    else:
        walks = [Walk([r.forwards for r in w.rows], w.widths, [1] * len(w.widths)) for w in watch(make())]
    return Candidate(drafter, f"{drafter} {settings}", settings, make, walks, known.tokens, True)


def chains(target: Target, drafter: str, settings: dict[str, Any], base: Any, known: Known) -> Iterator[Candidate]:
    """Chains of every length, with and without stopping early."""
    deepest = base.plan.shape.depth
    offers = recorded(target, known, lambda t: Grown(with_plan(base, tree="chain"), t, deepest, 1))
    for depth in range(1, deepest + 1):
        for stop in STOPS if depth > 1 else STOPS[:1]:
            own: dict[str, Any] = {"tree": "chain", "depth": depth} | ({"stop": stop} if stop else {})
            walks = [walk(o, depth, ALL, stop) for o in offers]
            corner = depth in (1, deepest) and not stop
            yield of_plan(drafter, "chain", settings, own, base, walks, known, corner)


def dynamic(
    target: Target, drafter: str, settings: dict[str, Any], base: Any, known: Known, width: int
) -> Iterator[Candidate]:
    """Dynamic trees of every depth and size that follow `width` paths."""
    deepest = base.plan.shape.depth
    twin = with_plan(base, tree="dynamic", width=width, nodes=ALL)
    offers = recorded(target, known, lambda t: Grown(twin, t, deepest, width))
    for depth in range(1, deepest + 1):
        sizes = [n for n in SIZES if depth < n <= width + (depth - 1) * width * width]
        for nodes in sizes:
            own: dict[str, Any] = {"tree": "dynamic", "depth": depth, "width": width, "nodes": nodes}
            walks = [walk(o, depth, nodes) for o in offers]
            corner = depth in (1, 2, deepest) and nodes in (sizes[0], sizes[-1])
            yield of_plan(drafter, f"dynamic {width}", settings, own, base, walks, known, corner)


def static(target: Target, drafter: str, settings: dict[str, Any], base: Any, known: Known) -> Iterator[Candidate]:
    """The best paths of the calibrated tree, if there is one."""
    most = len(base.plan.paths(known.requests[0][0].sampling.temperature))
    sizes = [n for n in SIZES if n <= most]
    for nodes in sizes:
        own: dict[str, Any] = {"tree": "static", "nodes": nodes}
        twin = with_plan(base, **own)
        walks = [walk(o, ALL, ALL) for o in recorded(target, known, lambda t, twin=twin: Asked(twin, t))]
        yield of_plan(drafter, "static", settings, own, base, walks, known, nodes in (sizes[0], sizes[-1]))


def of_plan(
    drafter: str,
    kind: str,
    settings: dict[str, Any],
    own: dict[str, Any],
    base: Any,
    walks: list[Walk],
    known: Known,
    corner: bool,
) -> Candidate:
    return Candidate(
        drafter, f"{drafter} {kind}", settings | own, lambda: with_plan(base, **own), walks, known.tokens, corner
    )


def with_plan(base: Any, **own: Any) -> Any:
    """The drafter with another tree; its weights are shared."""
    twin = copy.copy(base)
    trees = {f"{t:g}": paths for t, paths in base.plan.trees.items()}
    twin.plan = replace(planned(Settings(**own), base.plan.shape.depth, trees or None), candidates=base.plan.candidates)
    return twin


def recorded(target: Target, known: Known, asked: Callable[[Sequence[Sequence[int]]], Asked]) -> list[Offers]:
    """What a drafter offers, group by group."""
    return [ask(target, asked(texts), rs) for rs, texts in zip(known.requests, known.texts, strict=True)]
