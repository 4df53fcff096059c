"""Blockwise parallel decoding: one layer makes the states of all heads (Stern et al. 2018, arXiv:1811.03115).

y_i = z + (W2 relu(W1 z + b1) + b2)_i, and the target's own output head on each. Head 1 is the target itself, which the
paper sends through the layer too and so changes; heads 2..k guess k - 1 tokens. W2 and b2 begin at zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foretoken.drafter import Feed, Needs, Stateless
from foretoken.errors import at_least
from foretoken.grow import Extend
from foretoken.heads import Config, known, last_states, opened
from foretoken.objective import Batch, Stage
from foretoken.plan import Plan, planned
from foretoken.target import Target
from foretoken.tree import Draft


@dataclass(frozen=True, slots=True)
class Architecture:
    """
    heads   k, the target's own head included
    hidden  inner size of the layer for each head (0: the target's hidden size)
    """

    heads: int = 4
    hidden: int = 0

    def __post_init__(self) -> None:
        at_least("blockwise", heads=(self.heads, 2), hidden=(self.hidden, 0))


class Heads(nn.Module):
    """W1 [(k - 1) h, H] and W2 [(k - 1) H, (k - 1) h]."""

    def __init__(self, architecture: Architecture, size: int) -> None:
        super().__init__()
        self.architecture, self.size, guesses = architecture, size, architecture.heads - 1
        inner = guesses * (architecture.hidden or size)
        self.inner = nn.Linear(size, inner)
        self.outer = nn.Linear(inner, guesses * size)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def shared(self, states: Tensor) -> Tensor:
        """[B, T, H + (k - 1) h] of states [B, T, H]: the states themselves and the inner layer."""
        return torch.cat([states, nn.functional.relu(self.inner(states))], -1)

    def output(self, shared: Tensor, head: int) -> Tensor:
        """[B, T, H], the state of guess `head`, from 0."""
        states, inner = shared.split([self.size, shared.shape[-1] - self.size], -1)
        mine = slice(head * self.size, (head + 1) * self.size)
        return states + nn.functional.linear(inner, self.outer.weight[mine], self.outer.bias[mine])


def fresh(target: Target, architecture: Architecture) -> Heads:
    """Heads before training: each says what the target says."""
    return Heads(architecture, target.config.hidden_size).to(target.unembed.weight)


class Blockwise:
    def __init__(self, target: Target, heads: Heads, plan: Plan) -> None:
        self.target, self.heads, self.plan = target, heads, plan
        self.count = heads.architecture.heads - 1  # of guesses

    @property
    def needs(self) -> Needs:
        return Needs(self.plan.nodes, (-1,))

    def stages(self, batch: Batch) -> list[Stage]:
        """Head i's label is token t + i; the loss is the mean over all k heads (arXiv:1811.03115, section 6)."""

        def head(i: int) -> Stage:
            weight = 1 / self.heads.architecture.heads
            return Stage(f"head {i}", i, weight, lambda x: self.heads.output(x, i - 2), self.target.unembed)

        guesses = tuple(head(i) for i in range(2, self.count + 2))
        return [Stage("inner", 0, 0.0, self.heads.shared, None, None, guesses)]

    def start(self, batch: int, capacity: int) -> Stateless:
        return Stateless()

    def logits(self, feed: Feed, state: Stateless) -> Tensor:
        """[B, k - 1, V] at the last accepted token."""
        assert feed.features is not None
        shared = self.heads.shared(last_states(feed, feed.features))
        return self.target.unembed(torch.cat([self.heads.output(shared, i) for i in range(self.count)], 1))

    def begin(self, feed: Feed, state: Stateless) -> tuple[Tensor, Extend]:
        return known(self.logits(feed, state))

    def propose(self, feed: Feed, state: Stateless) -> Draft:
        return self.plan.draft(feed, *self.begin(feed, state))


def build(target: Target, config: Config) -> Blockwise:
    heads, trees = opened("blockwise", config, target, Architecture, fresh)
    return Blockwise(target, heads, planned(config, heads.architecture.heads - 1, trees, target=target))
