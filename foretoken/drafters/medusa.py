"""Medusa: residual heads on the final hidden state (Cai et al. 2024, arXiv:2401.10774).

Head k = 1..K predicts token t + k + 1 by softmax(W2 (h + SiLU(W1 h + b))); W1 and b begin at zero and W2 as the
target's output head, so that an untrained head says what the target says. K heads guess K tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foretoken.drafter import Feed, Needs, Stateless
from foretoken.errors import at_least, unknown
from foretoken.grow import Extend
from foretoken.heads import Config, known, last_states, opened, output_head
from foretoken.objective import Batch, Stage
from foretoken.plan import Plan, planned
from foretoken.target import Target
from foretoken.tree import Draft
from foretoken.unembed import Unembedding


@dataclass(frozen=True, slots=True)
class Architecture:
    """
    heads        K, the tokens guessed
    layers       residual blocks of each head
    unembedding  own: a copy of the target's output head for each; shared: the target's itself
    """

    heads: int = 4
    layers: int = 1
    unembedding: str = "own"

    def __post_init__(self) -> None:
        at_least("medusa", heads=(self.heads, 1), layers=(self.layers, 1))
        if self.unembedding not in ("own", "shared"):
            raise unknown("unembedding of medusa", self.unembedding, ("own", "shared"))


class Block(nn.Module):
    """h + SiLU(W h + b), W and b zero at first."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        return states + nn.functional.silu(self.linear(states))


class Heads(nn.Module):
    """The blocks of each head and, unless shared, its output head [V, H]."""

    def __init__(self, architecture: Architecture, size: int, outputs: list[Tensor]) -> None:
        super().__init__()
        self.architecture = architecture
        self.blocks = nn.ModuleList(
            nn.Sequential(*(Block(size) for _ in range(architecture.layers))) for _ in range(architecture.heads)
        )
        self.outputs = nn.ParameterList([nn.Parameter(output) for output in outputs])


def fresh(target: Target, architecture: Architecture) -> Heads:
    """Heads before training: each says what the target says."""
    weight = target.unembed.weight
    own = architecture.heads if architecture.unembedding == "own" else 0
    outputs = [weight.detach().clone() for _ in range(own)]
    return Heads(architecture, target.config.hidden_size, outputs).to(weight)


class Medusa:
    def __init__(self, target: Target, heads: Heads, plan: Plan) -> None:
        self.target, self.heads, self.plan = target, heads, plan

    @property
    def needs(self) -> Needs:
        return Needs(self.plan.nodes, (-1,))

    def unembed(self, head: int) -> Unembedding:
        """The output head of guess `head`, from 0."""
        return output_head(self.target, self.heads.outputs, head)

    def stages(self, batch: Batch) -> list[Stage]:
        """Head k's label is token t + k + 1 and its loss weighs 0.8^k (arXiv:2401.10774, section 2.2.1)."""
        return [
            Stage(f"head {k}", k + 1, 0.8**k, block, self.unembed(k - 1))
            for k, block in enumerate(self.heads.blocks, 1)
        ]

    def start(self, batch: int, capacity: int) -> Stateless:
        return Stateless()

    def logits(self, feed: Feed, state: Stateless) -> Tensor:
        """[B, K, V] at the last accepted token."""
        assert feed.features is not None
        last = last_states(feed, feed.features)
        return torch.cat([self.unembed(k)(block(last)) for k, block in enumerate(self.heads.blocks)], 1)

    def begin(self, feed: Feed, state: Stateless) -> tuple[Tensor, Extend]:
        return known(self.logits(feed, state))

    def propose(self, feed: Feed, state: Stateless) -> Draft:
        return self.plan.draft(feed, *self.begin(feed, state))


def build(target: Target, config: Config) -> Medusa:
    heads, trees = opened("medusa", config, target, Architecture, fresh)
    return Medusa(target, heads, planned(config, heads.architecture.heads, trees, target=target))
