"""What a drafter would guess at every place of a text that is known already, and so what any of its drafts would yield.

Plain decoding passes every place; the drafter is asked at each, and the text says which guesses are right. Decoding
with drafts visits only some places, which ones depends on what was accepted before: walking the known places gives the
number of forwards exactly, without one forward of the target. That holds for drafters that guess from the text alone;
of rows decoded together, but for the last guesses of those that end first (the longest row's budget is everybody's).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from foretoken.decode import Request, Session
from foretoken.drafter import Drafter, Feed, Needs
from foretoken.grow import Shape, grow
from foretoken.plan import Guesser
from foretoken.target import Target
from foretoken.tree import Draft, chain

NEVER = 1 << 20
"""The rank of a token that was not guessed."""


@dataclass(slots=True)
class Offer:
    """The guesses at one place.

    ranks    [D, D] int: of the right guess of depth d + 1, its place among all guesses of depth L + 1 or less, from 1
    counts   [D] int: guesses of depth L + 1 or less
    chances  [D]: the drafter's probability of its likeliest guess at each depth
    """

    ranks: NDArray[np.int64]
    counts: NDArray[np.int64]
    chances: NDArray[np.float64]

    def accepted(self, depth: int, nodes: int) -> int:
        """Guesses accepted of the `nodes` likeliest ones down to `depth`."""
        depth = min(depth, len(self.counts))
        return int((self.ranks[:depth, depth - 1] <= nodes).sum()) if depth else 0

    def levels(self, depth: int, stop: float) -> int:
        """Depths that are guessed where guessing stops behind a guess less likely than `stop`."""
        depth = min(depth, len(self.counts))
        low = np.flatnonzero(self.chances[:depth] < stop)
        return int(low[0]) + 1 if len(low) else depth

    def width(self, depth: int, nodes: int) -> int:
        """Nodes of the draft, the root included."""
        depth = min(depth, len(self.counts))
        return 1 + (min(nodes, int(self.counts[depth - 1])) if depth else 0)


@dataclass(slots=True)
class Walk:
    """Decoding known texts together with one kind of draft.

    forwards  per text
    widths    nodes of each step's draft, the widest of the rows
    levels    depths guessed in each step, the most of the rows
    """

    forwards: list[int] = field(default_factory=list[int])
    widths: list[int] = field(default_factory=list[int])
    levels: list[int] = field(default_factory=list[int])


Offers = list[list[Offer]]
"""Per text, the offer behind each of its emitted tokens but the last."""


def walk(offers: Offers, depth: int, nodes: int, stop: float = 0.0) -> Walk:
    """Steps of decoding these texts together with the `nodes` likeliest guesses down to `depth`."""
    done = Walk([0] * len(offers))
    places = [0] * len(offers)
    while any(place < len(text) for place, text in zip(places, offers, strict=True)):
        width, most = 1, 0
        for b, text in enumerate(offers):
            if places[b] < len(text):
                offer = text[places[b]]
                level = offer.levels(depth, stop) if stop > 0 else min(depth, len(offer.counts))
                width, most = max(width, offer.width(level, nodes)), max(most, level)
                done.forwards[b] += 1
                places[b] += 1 + offer.accepted(level, nodes)
        done.widths.append(width)
        done.levels.append(most)
    return done


class Asked:
    """Decodes plainly what is known already, and notes what the drafter would have guessed at each place."""

    def __init__(self, drafter: Drafter, texts: Sequence[Sequence[int]]) -> None:
        self.drafter, self.texts = drafter, texts
        self.offers: Offers = [[] for _ in texts]

    @property
    def needs(self) -> Needs:
        return self.drafter.needs

    def start(self, batch: int, capacity: int) -> Any:
        return self.drafter.start(batch, capacity)

    def propose(self, feed: Feed, state: Any) -> Draft:
        draft, joint = self.guess(feed, state)
        tokens, parent = draft.tokens.tolist(), draft.parent.tolist()
        for b, seen in enumerate(feed.texts):
            if len(seen) < len(self.texts[b]):
                ahead = self.texts[b][len(seen) :]
                self.offers[b].append(offer(tokens[b], parent[b], ahead, None if joint is None else joint[b]))
        return chain(feed.root[:, None])

    def guess(self, feed: Feed, state: Any) -> tuple[Draft, NDArray[np.float64] | None]:
        """The draft, and the log-probability of each guess's path where the drafter knows it."""
        return self.drafter.propose(feed, state), None


class Grown(Asked):
    """The same for a drafter with a law at every node, in the largest dynamic tree of `depth` and `width`."""

    def __init__(self, drafter: Guesser, texts: Sequence[Sequence[int]], depth: int, width: int) -> None:
        super().__init__(drafter, texts)  # pyright: ignore[reportArgumentType]
        self.guesser, self.shape = drafter, Shape(depth, width, width + (depth - 1) * width * width)
        self.heat, self.joint = 1.0, np.zeros((0, 0))

    def guess(self, feed: Feed, state: Any) -> tuple[Draft, NDArray[np.float64] | None]:
        logits, extend = self.guesser.begin(feed, state)
        draft = grow(self.shape, feed, logits, extend, self)
        return draft, self.joint

    def __call__(self, found: torch.Tensor, ends: torch.Tensor | None, level: int) -> int | None:
        """`grow` asks how many guesses pay: all of them, so that they stay in the order in which they were made."""
        self.joint = found.double().cpu().numpy()
        return None if ends is not None else found.shape[1]


def offer(
    tokens: Sequence[int], parent: Sequence[int], ahead: Sequence[int], joint: NDArray[np.float64] | None
) -> Offer:
    """One row's draft, root first, against the tokens that will be emitted. Without `joint`, earlier is likelier."""
    depth, right = [0] * len(tokens), [True] + [False] * (len(tokens) - 1)
    place = list[int]()  # of the right guess of each depth
    for node in range(1, len(tokens)):
        if (above := parent[node]) < 0:
            continue
        level = depth[node] = depth[above] + 1
        if right[above] and level <= len(ahead) and tokens[node] == ahead[level - 1] and len(place) < level:
            right[node] = True
            place.append(node - 1)
    levels = np.array(depth[1:])
    order = -np.arange(len(levels), dtype=float) if joint is None else joint[: len(levels)]
    D = int(levels.max(initial=0))
    ranks, counts, chances = np.full((D, D), NEVER), np.zeros(D, dtype=np.int64), np.ones(D)
    for last in range(1, D + 1):
        among = (levels > 0) & (levels <= last)
        counts[last - 1] = among.sum()
        for d, node in enumerate(place[:last]):
            ranks[d, last - 1] = 1 + (among & beats(order, node)).sum()
    if joint is not None:
        best = np.array([order[levels == d].max() for d in range(1, D + 1)])
        chances = np.exp(np.diff(best, prepend=0.0))
    return Offer(ranks, counts, chances)


def beats(order: NDArray[np.float64], node: int) -> NDArray[np.bool_]:
    """Which guesses are likelier than `node`; of equals the earlier."""
    earlier = np.arange(len(order)) < node
    return (order > order[node]) | ((order == order[node]) & earlier)


def ask(target: Target, asked: Asked, requests: Sequence[Request]) -> Offers:
    """What the drafter offers in these requests, whose texts are known."""
    session = Session(target, asked, requests)
    session.run()
    return asked.offers
