"""Draft trees fixed in advance: their nodes are paths of ranks, whatever the tokens turn out to be.

(0,) is the likeliest token of depth 1, (0, 2) the third likeliest of depth 2 behind it. Which paths are worth a node is
measured (Medusa, Cai et al. 2024, arXiv:2401.10774, section 2.3.3).
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from foretoken.drafter import Feed
from foretoken.errors import UserError
from foretoken.grow import Extend, Growth
from foretoken.tree import Draft, closure

Path = tuple[int, ...]
Paths = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Level:
    """The nodes of one depth.

    ranks    [n] int64, the place of each among its parent's choices
    source   [n] int64, its parent among those of the level before that have children
    parents  how many those are
    inner    [m] int64, those that have children themselves
    widest   choices that its parents need
    """

    ranks: Tensor
    source: Tensor
    parents: int
    inner: Tensor
    widest: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A tree of ranks as tensors, nodes numbered by depth, then path.

    levels     from depth 1
    parent     [N] int64
    ancestors  [1, N, N] bool
    inner      [M] int64, the nodes with children, root first: what a drafter reads
    """

    levels: list[Level]
    parent: Tensor
    ancestors: Tensor
    inner: Tensor

    @property
    def height(self) -> int:
        return len(self.levels)

    def growth(self, tokens: Tensor, level: int) -> Growth:
        """The inner nodes [B, M'] read so far, those of depth `level` last."""
        B, M = tokens.shape
        inner = self.inner[:M]
        number = torch.zeros_like(self.parent).scatter_(0, inner, torch.arange(M, device=inner.device))
        ancestors = self.ancestors[0, inner][:, inner].expand(B, M, M)
        parent = number[self.parent[inner].clamp(min=0)]
        return Growth(tokens, parent, ancestors, M - len(self.levels[level - 1].inner), level)


def planted(paths: Paths, feed: Feed, logits: Tensor, extend: Extend, stop: float = 0.0) -> Draft:
    """The draft whose nodes are `paths`, from `logits` [B, 1, V'] at the root; the same tree for every row.

    Under rules that draw guesses, the choices of a node are a draw from its law without replacement, in order. `stop`
    as in `Shape`.
    """
    plot, B = layout(tuple(tuple(path) for path in paths), logits.device), feed.batch
    tokens, read, laws = [feed.root[:, None]], feed.root[:, None], list[Tensor]()
    parent, going = [plot.parent[:1].expand(B, 1)], torch.ones(B, 1, dtype=torch.bool, device=logits.device)
    start = 1
    for number, level in enumerate(plot.levels, 1):
        values = feed.values(logits)
        ranked = feed.rank(values, number)
        best = ranked.topk(min(level.widest, ranked.shape[-1]), -1).indices  # [B, n, k]
        source = level.source if best.shape[1] > 1 else torch.zeros_like(level.source)
        fresh = best[:, source, level.ranks.clamp(max=best.shape[2] - 1)]
        tokens.append(fresh)
        parent.append(plot.parent[start : start + len(source)].expand(B, -1).masked_fill(~going, -1))
        start += len(source)
        law = feed.law(values) if feed.samples or stop > 0 else None
        if law is not None and feed.samples:
            laws.append(law.expand(-1, level.parents, -1))
        if law is not None and stop > 0:
            going = going & (law[:, source].gather(2, fresh[..., None]).amax(1) >= stop)
        if number < plot.height:
            read = torch.cat([read, fresh[:, level.inner]], 1)
            logits = extend(plot.growth(read, number))
    q = None
    if laws:
        q = torch.cat(laws, 1)
        q = q.new_zeros(B, len(plot.parent), q.shape[2]).index_copy_(1, plot.inner, q)
    chained = len(paths) == plot.height
    return Draft(torch.cat(tokens, 1), torch.cat(parent, 1), plot.ancestors.expand(B, -1, -1), plot.height, chained, q)


def star(width: int, depth: int) -> list[Path]:
    """`width` guesses at the root, each going on alone to `depth`."""
    return [(first, *(0,) * behind) for behind in range(depth) for first in range(width)]


def shallow(paths: Paths, depth: int) -> Paths:
    """The tree without what is deeper."""
    return [path for path in paths if len(path) <= depth]


@lru_cache(maxsize=64)
def layout(paths: tuple[Path, ...], device: torch.device) -> Layout:
    """The layout of a tree, made once for all steps."""
    ordered = sorted(paths, key=lambda p: (len(p), p))
    number = {(): 0} | {path: i for i, path in enumerate(ordered, 1)}
    if orphan := next((p for p in ordered if p[:-1] not in number or not p), None):
        raise UserError(f"The tree has the path {list(orphan)} without its parent; give every path's parent too.")
    inner = [path for path in ((), *ordered) if any(p[:-1] == path for p in ordered)]
    with torch.inference_mode(False):

        def whole(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        levels: list[Level] = []
        for depth in range(1, len(ordered[-1]) + 1):
            here = [p for p in ordered if len(p) == depth]
            above = [p for p in inner if len(p) == depth - 1]
            levels.append(
                Level(
                    whole([p[-1] for p in here]),
                    whole([above.index(p[:-1]) for p in here]),
                    len(above),
                    whole([i for i, p in enumerate(here) if p in inner]),
                    max(p[-1] for p in here) + 1,
                )
            )
        parent = whole([-1, *(number[p[:-1]] for p in ordered)])
        return Layout(levels, parent, closure(parent[None]), whole([number[p] for p in inner]))


def best_paths(accuracy: Tensor, nodes: int) -> list[list[int]]:
    """The `nodes` paths of largest expected yield, by accuracy [D, R]: P(token of depth d + 1 has rank r).

    A path's value is the product along it; values fall along siblings and down paths, so taking the best path at the
    border again and again is optimal, and the draft yields 1 + the sum of values (arXiv:2401.10774, section 2.3.3).
    The product is a path's chance if how often a guess is right, behind right ones, does not depend on which choices
    those were. The best n paths begin with the best n - 1.
    """
    gain = accuracy.double().tolist()
    border: list[tuple[float, Path]] = [(-gain[0][0], (0,))]
    chosen: list[list[int]] = []
    while border and len(chosen) < nodes:
        value, path = heapq.heappop(border)
        if value == 0.0:
            break
        chosen.append(list(path))
        depth, rank = len(path), path[-1]
        if rank + 1 < len(gain[0]):
            sibling = gain[depth - 1][rank + 1] * value / gain[depth - 1][rank]
            heapq.heappush(border, (sibling, (*path[:-1], rank + 1)))
        if depth < len(gain):
            heapq.heappush(border, (value * gain[depth][0], (*path, 0)))
    return chosen


def expected(accuracy: Tensor, paths: Paths) -> float:
    """Tokens per forward of a tree under accuracy [D, R]: 1 + the sum over paths of the product along each."""
    gain = accuracy.double().tolist()
    total = 1.0
    for path in paths:
        value = 1.0
        for depth, rank in enumerate(path):
            value *= gain[depth][rank]
        total += value
    return total
