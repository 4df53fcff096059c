"""Draft trees grown level by level: what is guessed next depends on what was guessed before.

A drafter gives the logits at the root and a function that reads further nodes. Trees for any drafter are built from
those two: the likeliest paths here, fixed trees in `paths`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from foretoken.drafter import Feed
from foretoken.tree import Draft, closure


@dataclass(frozen=True, slots=True)
class Growth:
    """The guesses that a drafter reads, root first, in topological order; not all that a draft will hold.

    tokens     [B, N] int64
    parent     [N] or [B, N] int64, the node before each; at the root -1
    ancestors  [B, N, N] bool, as in a draft
    first      the nodes from here on are to be read now; the drafter has read those before
    level      their depth
    """

    tokens: Tensor
    parent: Tensor
    ancestors: Tensor
    first: int
    level: int

    @property
    def fresh(self) -> Tensor:
        """[B, n]: the tokens to be read now."""
        return self.tokens[:, self.first :]

    @property
    def seen(self) -> Tensor:
        """[B, n, N] bool: the nodes that each of them sees, the root included."""
        return self.ancestors[:, self.first :]

    @property
    def depth(self) -> Tensor:
        """[B, n] int64: their depth."""
        return torch.full_like(self.fresh, self.level)

    @property
    def above(self) -> Tensor:
        """[B, n] int64: their parents."""
        return self.parent.expand_as(self.tokens)[:, self.first :]


Extend = Callable[[Growth], Tensor]
"""Reads the fresh nodes of a growth -> logits [B, n, V'] after each; or [B, 1, V'] where they are the same for all."""


class Pays(Protocol):
    """Says how many guesses of a tree to keep; `heat`: what logits are divided by for their probabilities."""

    heat: float

    def __call__(self, found: Tensor, ends: Tensor | None, level: int) -> int | None:
        """Of guesses down to `level` whose paths have log-probability `found` [B, C], `ends` [B, W] of which can go on
        (None: there is no further level); None: grow on."""
        ...


@dataclass(frozen=True, slots=True)
class Shape:
    """How a tree grows.

    depth  guesses on the longest path
    width  paths followed at each depth (1: a chain)
    nodes  guesses kept of all that were made, the likeliest (0: the paths followed, whole)
    stop   a row stops growing after a guess whose probability under the drafter is below this. The guess itself stays
           in the draft: dropping it would select on its value and bias the output under rejection rules
    """

    depth: int
    width: int = 1
    nodes: int = 0
    stop: float = 0.0

    @property
    def size(self) -> int:
        """Most nodes of a draft, the root included."""
        return 1 + (self.nodes or self.depth * self.width)


@dataclass(frozen=True, slots=True)
class Guessed:
    """All guesses made, in the order of their depth.

    tokens  [B, C] int64
    above   [B, C] int64, the guess before each, -1: the root
    joint   [B, C] log-probability of the path to each
    """

    tokens: Tensor
    above: Tensor
    joint: Tensor

    def more(self, tokens: Tensor, above: Tensor, joint: Tensor) -> "Guessed":
        return Guessed(
            torch.cat([self.tokens, tokens], 1), torch.cat([self.above, above], 1), torch.cat([self.joint, joint], 1)
        )


def grow(shape: Shape, feed: Feed, logits: Tensor, extend: Extend, pays: Pays | None = None) -> Draft:
    """The draft of the likeliest paths, from `logits` [B, 1, V'] at the root.

    Each level follows the `width` best continuations of the level before, by summed log-probability (with the target's
    noise, under `match`), and with `nodes` each of them offers `width` continuations, of which the likeliest are kept
    (EAGLE-2, Li et al. 2024, arXiv:2406.16858, sections 4.1 and 4.2). `pays` says how many of those, and when to stop.
    Guesses are chosen by their value, so under rules that draw guesses this is no draw: see `paths.planted`.
    """
    B, W, device = feed.batch, min(shape.width, logits.shape[-1]), logits.device
    tokens, parent = feed.root[:, None], torch.full((B, 1), -1, device=device)
    ancestors = torch.ones(B, 1, 1, dtype=torch.bool, device=device)
    joint = torch.zeros(B, 1, device=device)  # of the paths to the last level
    origin = torch.full((B, 1), -1, device=device)  # their place among the guesses
    empty = feed.root.new_empty(B, 0)
    found = Guessed(empty, empty, joint[:, :0])
    going = torch.ones(B, dtype=torch.bool, device=device)
    depth, nodes, heat = min(shape.depth, max(1, feed.budget - 1)), shape.nodes, 1.0 if pays is None else pays.heat
    for level in range(1, depth + 1):
        n = 1 if level == 1 else W  # nodes of the level before
        chance, choice = likeliest(feed.rank(feed.values(logits), level), n, W, heat)  # [B, n, W]
        total = (joint[..., None] + chance).flatten(1)
        joint, best = total.topk(W, -1)  # [B, W]
        if shape.nodes:
            offered = found.more(choice.flatten(1), origin.repeat_interleave(W, 1), total)
            origin, found = found.tokens.shape[1] + best, offered
        fresh, chance = (x.flatten(1).gather(1, best) for x in (choice, chance))
        first = tokens.shape[1] - n  # the first node of the level before
        above = first + best // W
        seen = ancestors.gather(1, above[..., None].expand(-1, -1, ancestors.shape[2]))
        ancestors = below(ancestors, seen)
        tokens = torch.cat([tokens, fresh], 1)
        parent = torch.cat([parent, above.masked_fill(~going[:, None], -1)], 1)
        if shape.stop > 0:
            going = going & (chance.amax(1).exp() >= shape.stop)
            if not bool(going.any()):
                depth = level
                break
        if pays is not None:
            kept = pays(found.joint, joint if level < depth else None, level)
            if kept is not None:
                depth, nodes = level, min(kept, nodes)
                break
        if level < depth:
            logits = extend(Growth(tokens, parent.clamp(min=0), ancestors, tokens.shape[1] - W, level))
    if shape.nodes:
        return pruned(feed.root, found, nodes, depth, chained=W == 1 or nodes == 0)
    return Draft(tokens, parent, ancestors, depth, W == 1)


def likeliest(ranked: Tensor, n: int, width: int, heat: float = 1.0) -> tuple[Tensor, Tensor]:
    """(log-probability, token) [B, n, width] of the best choices by `ranked` [B, n or 1, V'], divided by `heat`."""
    ranked = ranked if heat == 1 else ranked / heat
    values, choice = ranked.topk(width, -1)
    chance = (values - ranked.logsumexp(-1, keepdim=True)).clamp(max=0)  # never likelier than what it follows
    return chance.float().expand(-1, n, -1), choice.expand(-1, n, -1)


def below(ancestors: Tensor, seen: Tensor) -> Tensor:
    """`ancestors` [B, N, N] with W more nodes, each seeing `seen` [B, W, N] and itself."""
    B, W, N = seen.shape
    old = torch.cat([ancestors, ancestors.new_zeros(B, N, W)], 2)
    own = torch.eye(W, dtype=torch.bool, device=seen.device).expand(B, W, W)
    return torch.cat([old, torch.cat([seen, own], 2)], 1)


def pruned(root: Tensor, found: Guessed, nodes: int, height: int, *, chained: bool) -> Draft:
    """The draft of the `nodes` likeliest guesses. Of equals the earlier one stays, so each comes with its parent."""
    order = found.joint.sort(descending=True, stable=True).indices[:, :nodes].sort().values  # [B, m]
    place = torch.arange(order.shape[1] + 1, device=order.device)
    number = torch.zeros_like(found.tokens).scatter_(1, order, place[1:].expand_as(order))
    above = found.above.gather(1, order)
    parent = torch.where(above < 0, 0, number.gather(1, above.clamp(min=0)))
    tokens = torch.cat([root[:, None], found.tokens.gather(1, order)], 1)
    parent = torch.nn.functional.pad(parent, (1, 0), value=-1)
    return Draft(tokens, parent, closure(parent), height, chained)
