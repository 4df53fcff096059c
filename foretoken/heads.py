"""Drafts from heads that guess every depth from one hidden state, each without knowing the guesses before it.

A tree's nodes are paths of ranks: (0,) is the likeliest token of depth 1, (0, 2) the third likeliest of depth 2 behind
it. Which paths are worth a node is measured (Medusa, Cai et al. 2024, arXiv:2401.10774, section 2.3.3).
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from foretoken.drafter import Feed
from foretoken.errors import UserError, at_least
from foretoken.grow import Shape, grow
from foretoken.saved import load_weights, read, require_target, settle
from foretoken.target import Target
from foretoken.tree import Draft, closure
from foretoken.unembed import Unembedding

Paths = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Plan:
    """How guesses become a draft.

    shape  as `grow` keeps paths
    trees  fixed trees in place of it, parents before children, by the temperature that each is best at
    """

    shape: Shape
    trees: Mapping[float, Paths] = field(default_factory=dict[float, Paths])

    @property
    def nodes(self) -> int:
        """Most nodes of a draft, the root included."""
        return 1 + max((len(paths) for paths in self.trees.values()), default=self.shape.nodes - 1)

    def paths(self, temperature: float) -> Paths:
        """The tree measured nearest to `temperature`; none if there are no trees."""
        return self.trees[min(self.trees, key=lambda t: abs(t - temperature))] if self.trees else ()


def last_states(feed: Feed, states: Tensor) -> Tensor:
    """[B, 1, H] of states [B, M, H] at each row's last committed token."""
    place = (torch.tensor(feed.count, device=states.device) - 1).clamp(min=0)[:, None, None]
    return states.gather(1, place.expand(-1, -1, states.shape[2]))


def output_head(target: Target, own: nn.ParameterList, head: int) -> Unembedding:
    """The output head of guess `head`, from 0: its own weights [V, H], or the target's where heads have none."""
    return replace(target.unembed, weight=own[head]) if len(own) else target.unembed


def spread(plan: Plan, feed: Feed, logits: Tensor) -> Draft:
    """The draft from logits [B, D, V'] of depths 1 to D, whatever stands before them."""
    if paths := plan.paths(max(s.temperature for s in feed.sampler.settings)):
        return planted(paths, feed, logits)
    shape = replace(plan.shape, depth=min(plan.shape.depth, logits.shape[1]))

    def extend(tokens: Tensor, depth: Tensor, ancestors: Tensor, offset: int) -> Tensor:
        level = 1 + offset // tokens.shape[1]
        return logits[:, level : level + 1]

    return grow(shape, feed, logits[:, :1], extend)


def planted(paths: Paths, feed: Feed, logits: Tensor) -> Draft:
    """The draft whose nodes are `paths` of ranks; the same tree for every row."""
    plot, B = layout(tuple(tuple(path) for path in paths), logits.device), logits.shape[0]
    values = [feed.values(logits[:, d : d + 1]) for d in range(plot.height)]
    tokens = [feed.root[:, None]]
    for level, (value, ranks) in enumerate(zip(values, plot.ranks, strict=True), 1):
        order = feed.rank(value, level)[:, 0]
        best = order.topk(min(plot.widest[level - 1], order.shape[-1]), -1).indices  # [B, k]
        tokens.append(best[:, ranks.clamp(max=best.shape[1] - 1)])
    q = None
    if feed.samples:
        laws = [feed.law(value)[:, 0] for value in values]
        laws.append(torch.zeros_like(laws[0]))
        q = torch.stack([laws[level] for level in (0, *plot.levels)], 1)
    parent, ancestors = plot.parent.expand(B, -1), plot.ancestors.expand(B, -1, -1)
    return Draft(torch.cat(tokens, 1), parent, ancestors, plot.height, len(paths) == plot.height, q)


@dataclass(frozen=True, slots=True)
class Layout:
    """A tree of ranks as tensors, nodes numbered by depth, then path.

    levels     depth of each node after the root
    ranks      per depth, the ranks of its nodes
    widest     per depth, the choices that its nodes need
    parent     [N] int64
    ancestors  [1, N, N] bool
    """

    levels: list[int]
    ranks: list[Tensor]
    widest: list[int]
    parent: Tensor
    ancestors: Tensor

    @property
    def height(self) -> int:
        return len(self.ranks)


@lru_cache(maxsize=64)
def layout(paths: tuple[tuple[int, ...], ...], device: torch.device) -> Layout:
    """The layout of a tree, made once for all steps."""
    levels, ranks, parent = laid_out(paths)
    by_depth = [[r for r, at in zip(ranks, levels, strict=True) if at == d] for d in range(1, max(levels) + 1)]
    with torch.inference_mode(False):
        above = torch.tensor([-1, *parent], device=device)
        rows = [torch.tensor(row, device=device) for row in by_depth]
        return Layout(levels, rows, [max(row) + 1 for row in by_depth], above, closure(above[None]))


def laid_out(paths: Paths) -> tuple[list[int], list[int], list[int]]:
    """(depth, rank, parent node) of each path's node, nodes numbered from 1 by depth, then rank."""
    ordered = sorted((tuple(path) for path in paths), key=lambda p: (len(p), p))
    number = {(): 0} | {path: i for i, path in enumerate(ordered, 1)}
    if orphan := next((p for p in ordered if p[:-1] not in number or not p), None):
        raise UserError(f"The tree has the path {list(orphan)} without its parent; give every path's parent too.")
    return [len(p) for p in ordered], [p[-1] for p in ordered], [number[p[:-1]] for p in ordered]


def best_paths(accuracy: Tensor, nodes: int) -> list[list[int]]:
    """The `nodes` paths of largest expected yield, by accuracy [D, R]: P(token of depth d + 1 has rank r).

    A path's value is the product along it; values fall along siblings and down paths, so taking the best path at the
    border again and again is optimal, and the draft yields 1 + the sum of values (arXiv:2401.10774, section 2.3.3).
    """
    gain = accuracy.double().tolist()
    border: list[tuple[float, tuple[int, ...]]] = [(-gain[0][0], (0,))]
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


@dataclass(frozen=True, slots=True)
class Config:
    """
    path          the folder that `foretoken train` wrote
    depth         guesses on the longest path (0: one of every head)
    width         paths kept at each depth (1: a chain; 0: the calibrated trees, or a chain if there are none)
    nodes         guesses of a calibrated tree, the best ones (0: all)
    other_target  use heads that were trained on other weights; the output stays exact, fewer guesses survive
    """

    path: "str | nn.Module" = ""
    depth: int = 0
    width: int = 0
    nodes: int = 16
    other_target: bool = False

    def __post_init__(self) -> None:
        at_least("heads", depth=(self.depth, 0), width=(self.width, 0), nodes=(self.nodes, 0))


class Ahead(Protocol):
    """A drafter whose guesses of all depths come from one state: what calibration measures."""

    plan: Plan

    def start(self, batch: int, capacity: int) -> Any: ...

    def logits(self, feed: Feed, state: Any) -> Tensor: ...


def planned(config: Config, trees: dict[str, list[list[int]]], heads: int) -> Plan:
    """The plan that `config` asks for, of `heads` guesses at most, with the trees that travel with the heads."""
    depth = min(config.depth or heads, heads)
    shape = Shape(depth, config.width or 1)
    if config.width:
        return Plan(shape)
    cut = {float(t): [path for path in paths if len(path) <= depth] for t, paths in trees.items()}
    return Plan(shape, {t: paths[: config.nodes] if config.nodes else paths for t, paths in cut.items()})


def opened(
    method: str, config: Config, target: Target, architecture: type, fresh: Callable[[Target, Any], nn.Module]
) -> tuple[Any, dict[str, list[list[int]]]]:
    """The heads that `config` names, beside the target, and their trees; heads in memory are taken as they are."""
    if isinstance(config.path, nn.Module):
        return config.path, {}
    if not config.path:
        raise UserError(
            f"{method} needs trained heads; name them as {method}:PATH, or train some with `foretoken train`."
        )
    folder = Path(config.path)
    saved = read(folder, method)
    if not config.other_target:
        require_target(saved, target, folder)
    heads = fresh(target, settle(architecture, saved, folder))
    load_weights(folder, heads)
    return heads.to(target.device, target.dtype), saved.trees
