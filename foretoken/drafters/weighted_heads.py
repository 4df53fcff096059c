"""Independent heads on the final state, or on a mixture of all layers' (Mehra et al. 2025, arXiv:2502.09419).

Head i = 2..n predicts token t + i by the target's output head on h + W2 SiLU(W1 h). With states "weighted" each head
has its own h = sum_l w_l h_l (weighted hidden states): w a softmax, each layer's state brought to the size of the final
one. The paper says only that weights are normalised; softmax, sizes and the heads' shape are ours. W2 begins at zero.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from foretoken.drafter import Feed, Needs, Stateless
from foretoken.errors import at_least, unknown
from foretoken.grow import Extend
from foretoken.heads import Config, known, last_states, opened
from foretoken.objective import Batch, Stage
from foretoken.plan import Plan, planned
from foretoken.target import Target
from foretoken.tree import Draft

FIRST = 4.0
"""How much larger the final layer's logit is at first."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """
    heads   n, the target's own head included
    states  final: heads read the final hidden state; weighted: each its own mixture of all layers
    hidden  inner size of each head (0: the target's hidden size)
    """

    heads: int = 4
    states: str = "weighted"
    hidden: int = 0

    def __post_init__(self) -> None:
        at_least("weighted_heads", heads=(self.heads, 2), hidden=(self.hidden, 0))
        if self.states not in ("final", "weighted"):
            raise unknown("states of weighted_heads", self.states, ("final", "weighted"))


class Head(nn.Module):
    """h + W2 SiLU(W1 h) on the final state or, with `layers` of them, on their mixture."""

    def __init__(self, size: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(size, hidden), nn.Linear(hidden, size, bias=False)
        nn.init.zeros_(self.outer.weight)
        self.size = size
        self.mixture = nn.Parameter(torch.zeros(layers)) if layers else None
        if self.mixture is not None:
            with torch.no_grad():
                self.mixture[-1] = FIRST

    def forward(self, states: Tensor) -> Tensor:
        """[B, T, H] of states [B, T, layers * H], the final one last."""
        if self.mixture is not None:
            layers = states.unflatten(-1, (-1, self.size))
            rms = layers.float().square().mean(-1, keepdim=True).sqrt().to(states.dtype)
            share = self.mixture.softmax(0).to(states.dtype)[:, None] * rms[..., -1:, :] / rms.clamp(min=1e-6)
            states = (share * layers).sum(-2)
        return states + self.outer(nn.functional.silu(self.inner(states)))


class Heads(nn.Module):
    def __init__(self, architecture: Architecture, size: int, layers: int) -> None:
        super().__init__()
        self.architecture = architecture
        hidden, mixed = architecture.hidden or size, layers if architecture.states == "weighted" else 0
        self.heads = nn.ModuleList(Head(size, hidden, mixed) for _ in range(architecture.heads - 1))


def fresh(target: Target, architecture: Architecture) -> Heads:
    """Heads before training: on the final state each says what the target says, on weighted ones nearly."""
    config = target.config
    return Heads(architecture, config.hidden_size, config.num_hidden_layers + 1).to(target.unembed.weight)


class WeightedHeads:
    def __init__(self, target: Target, heads: Heads, plan: Plan) -> None:
        self.target, self.heads, self.plan = target, heads, plan

    @property
    def needs(self) -> Needs:
        """All layers' states, the embedding first and the final state last; or the final one."""
        mixed = self.heads.architecture.states == "weighted"
        layers = (*range(self.target.config.num_hidden_layers), -1) if mixed else (-1,)
        return Needs(self.plan.nodes, layers)

    def stages(self, batch: Batch) -> list[Stage]:
        """Head i's label is token t + i."""
        unembed = self.target.unembed
        return [Stage(f"head {i}", i, 1.0, head, unembed) for i, head in enumerate(self.heads.heads, 2)]

    def mixtures(self) -> list[list[float]] | None:
        """Each head's weights of the embedding, of every layer and, last, of the final state; None if it reads that."""
        found = [cast(Head, head).mixture for head in self.heads.heads]
        return [mixture.detach().float().softmax(0).tolist() for mixture in found if mixture is not None] or None

    def start(self, batch: int, capacity: int) -> Stateless:
        return Stateless()

    def logits(self, feed: Feed, state: Stateless) -> Tensor:
        """[B, n - 1, V] at the last accepted token."""
        assert feed.features is not None
        last = last_states(feed, feed.features)
        return self.target.unembed(torch.cat([head(last) for head in self.heads.heads], 1))

    def begin(self, feed: Feed, state: Stateless) -> tuple[Tensor, Extend]:
        return known(self.logits(feed, state))

    def propose(self, feed: Feed, state: Stateless) -> Draft:
        return self.plan.draft(feed, *self.begin(feed, state))


def build(target: Target, config: Config) -> WeightedHeads:
    heads, trees = opened("weighted_heads", config, target, Architecture, fresh)
    return WeightedHeads(target, heads, planned(config, heads.architecture.heads - 1, trees, target=target))
