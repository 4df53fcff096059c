"""What the target itself knows of tokens further ahead: it drafts from sums over those between (arXiv:2502.09419)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from foretoken.drafter import Feed, Needs, Stateless
from foretoken.errors import UserError, at_least
from foretoken.grow import Extend
from foretoken.heads import known, last_states
from foretoken.marginal import law_of, nucleus
from foretoken.plan import Plan, Settings, planned
from foretoken.target import Target
from foretoken.tree import Draft


@dataclass(frozen=True, slots=True)
class Config(Settings):
    """
    depth  guesses on the longest path; each takes a forward of the target over `most` tokens
    mass   of every next-token law that is summed over
    most   most paths summed over at each depth, the likeliest
    """

    depth: int = 2
    mass: float = 0.99
    most: int = 64

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        at_least("marginal", depth=(self.depth, 1), most=(self.most, 1))
        if not 0 < self.mass <= 1:
            raise UserError(f"marginal: mass is {self.mass}; it must be above 0 and at most 1.")


@dataclass(frozen=True, slots=True)
class Paths:
    """The paths of one length that are summed over.

    tokens    [B, W] int64, the last token of each
    weight    [B, W], the probability of each under the target; 0 of those that only fill up
    sees      [B, W, N] bool, which of the nodes read so far lie on each
    """

    tokens: Tensor
    weight: Tensor
    sees: Tensor


class Marginal:
    """The law of the token i places behind the root, given the text before the root and nothing of the root itself.

    This is what a head that guesses without being told the guesses before it can know at best (methods such as
    `blockwise`, `medusa`, `mtp`), found without training. It reads the target itself, so it saves forwards and no time.
    """

    def __init__(self, target: Target, config: Config, plan: Plan) -> None:
        self.target, self.config, self.plan = target, config, plan

    @property
    def needs(self) -> Needs:
        return Needs(max(self.plan.slots, self.config.depth * self.config.most), (-1,))

    def start(self, batch: int, capacity: int) -> Stateless:
        return Stateless()

    def logits(self, feed: Feed, state: Stateless) -> Tensor:
        """[B, D, V]: the logarithms of the truncated sums, at temperature 1, each divided by the mass it has kept."""
        assert feed.features is not None
        law = law_of(self.target.unembed(last_states(feed, feed.features)))  # [B, 1, V], of the root
        B, cache = feed.batch, feed.cache.first(len(self.target.windows))
        paths = Paths(feed.root[:, None], torch.ones_like(law[..., 0]), law.new_zeros(B, 1, 0, dtype=torch.bool))
        found: list[Tensor] = []
        for level in range(min(self.config.depth, max(1, feed.budget - 1))):
            offset = paths.sees.shape[2]
            paths = self.longer(paths, law)
            own = torch.eye(paths.tokens.shape[1], dtype=torch.bool, device=law.device).expand(B, -1, -1)
            sees = torch.cat([paths.sees, own], 2)
            depth = torch.full_like(paths.tokens, level)
            law = law_of(self.target.extend(paths.tokens, depth, sees, cache, offset=offset).logits)
            total = (paths.weight[..., None] * law).sum(1)
            found.append((total / paths.weight.sum(1, keepdim=True)).log())
            paths = Paths(paths.tokens, paths.weight, sees)
        return torch.stack(found, 1)

    def longer(self, paths: Paths, law: Tensor) -> Paths:
        """The likeliest paths of one token more, from the laws [B, W, V] behind each."""
        each = nucleus(law, self.config.mass, self.config.most)
        weight = (paths.weight[..., None] * each.chance).flatten(1)
        best = weight.topk(min(self.config.most, weight.shape[1]))
        above = best.indices // each.tokens.shape[-1]
        sees = paths.sees.gather(1, above[..., None].expand(-1, -1, paths.sees.shape[2]))
        return Paths(each.tokens.flatten(1).gather(1, best.indices), best.values, sees)

    def begin(self, feed: Feed, state: Stateless) -> tuple[Tensor, Extend]:
        return known(self.logits(feed, state))

    def propose(self, feed: Feed, state: Stateless) -> Draft:
        return self.plan.draft(feed, *self.begin(feed, state))


def build(target: Target, config: Config) -> Marginal:
    return Marginal(target, config, planned(config, config.depth, target=target))
