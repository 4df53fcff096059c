"""The target's first layers draft for all of them, in the target's own cache (self-speculation, arXiv:2404.16710)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from foretoken.drafter import Feed, Needs, Stateless
from foretoken.errors import at_least
from foretoken.grow import Shape, grow
from foretoken.target import Target
from foretoken.tree import Draft


@dataclass(frozen=True, slots=True)
class Config:
    """
    layers  layers that draft (0: half of them)
    depth   guesses on the longest path
    width   paths kept at each depth (1: a chain)
    stop    stop behind a guess less likely than this under the first layers
    """

    layers: int = 0
    depth: int = 3
    width: int = 1
    stop: float = 0.0

    def __post_init__(self) -> None:
        at_least(
            "early_exit",
            layers=(self.layers, 0),
            depth=(self.depth, 1),
            width=(self.width, 1),
            stop=(self.stop, 0.0),
        )


class EarlyExit:
    """Needs no cache of its own: the committed tokens' keys and values in the first layers are the target's, and the
    nodes that it writes there are written again when the target judges them."""

    def __init__(self, part: Target, layers: int, shape: Shape) -> None:
        self.part, self.layers, self.shape = part, layers, shape

    @property
    def needs(self) -> Needs:
        return Needs(width=self.shape.nodes)

    def start(self, batch: int, capacity: int) -> Stateless:
        return Stateless()

    def propose(self, feed: Feed, state: Stateless) -> Draft:
        cache = feed.cache.first(self.layers)

        def extend(tokens: Tensor, depth: Tensor, ancestors: Tensor, offset: int) -> Tensor:
            seen = torch.nn.functional.pad(ancestors, (1, 0), value=True)  # the root is a node here
            return self.part.extend(tokens, depth + 1, seen, cache, offset=offset + 1).logits

        root = feed.root[:, None]
        alone = torch.ones(feed.batch, 1, 1, dtype=torch.bool, device=root.device)
        logits = self.part.extend(root, torch.zeros_like(root), alone, cache).logits
        return grow(self.shape, feed, logits, extend)


def build(target: Target, config: Config) -> EarlyExit:
    layers = config.layers or max(1, len(target.windows) // 2)
    return EarlyExit(target.shallow(layers), layers, Shape(config.depth, config.width, config.stop))
