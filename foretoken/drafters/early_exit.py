"""The target's first layers draft for all of them, in the target's own cache (self-speculation, arXiv:2404.16710)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from foretoken.drafter import Feed, Needs, Stateless
from foretoken.errors import at_least
from foretoken.grow import Extend, Growth
from foretoken.plan import Plan, Settings, planned
from foretoken.target import Target
from foretoken.tree import Draft


@dataclass(frozen=True, slots=True)
class Config(Settings):
    """
    layers  layers that draft (0: half of them)
    depth   guesses on the longest path
    """

    layers: int = 0
    depth: int = 3

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        at_least("early_exit", layers=(self.layers, 0), depth=(self.depth, 1))


class EarlyExit:
    """Needs no cache of its own: the committed tokens' keys and values in the first layers are the target's, and the
    nodes that it writes there are written again when the target judges them."""

    def __init__(self, part: Target, layers: int, plan: Plan) -> None:
        self.part, self.layers, self.plan = part, layers, plan

    @property
    def needs(self) -> Needs:
        return Needs(width=self.plan.slots)

    def start(self, batch: int, capacity: int) -> Stateless:
        return Stateless()

    def begin(self, feed: Feed, state: Stateless) -> tuple[Tensor, Extend]:
        """Read the root, the first node that is not committed."""
        cache = feed.cache.first(self.layers)

        def extend(growth: Growth) -> Tensor:
            return self.part.extend(growth.fresh, growth.depth, growth.seen, cache, offset=growth.first).logits

        root = feed.root[:, None]
        alone = torch.ones(feed.batch, 1, 1, dtype=torch.bool, device=root.device)
        return self.part.extend(root, torch.zeros_like(root), alone, cache).logits, extend

    def propose(self, feed: Feed, state: Stateless) -> Draft:
        return self.plan.draft(feed, *self.begin(feed, state))


def build(target: Target, config: Config) -> EarlyExit:
    layers = config.layers or max(1, len(target.windows) // 2)
    return EarlyExit(target.shallow(layers), layers, planned(config, config.depth, target=target))
