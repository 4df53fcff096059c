"""Multi-token prediction: heads on a shared trunk (Gloeckle et al. 2024, arXiv:2404.19737).

Head 1 is the target itself: the trunk and its last layer. Head i = 2..n predicts token t + i from the same trunk, so n
heads guess n - 1 tokens. A head is a transformer layer with a cache of its own; all share the final norm and the
output head. Verifying and predicting are one forward: what the target computed at the accepted tokens feeds the heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foretoken.branch import Branch, last_layers
from foretoken.cache import SlotCache
from foretoken.drafter import Feed, Needs
from foretoken.errors import UserError, at_least, unknown
from foretoken.grow import Extend
from foretoken.heads import Config, known, last_states, opened, output_head
from foretoken.objective import Batch, Stage
from foretoken.plan import Plan, planned
from foretoken.target import Target, norm_of
from foretoken.tree import Draft
from foretoken.unembed import Unembedding

KINDS = ("parallel", "causal", "anticausal", "linear")


@dataclass(frozen=True, slots=True)
class Architecture:
    """
    heads        n, the target's own head included
    kind         parallel: each head a layer on the trunk; causal: head i a layer on head i - 1; anticausal: head i - 1
                 a layer on head i, all of them the target's last layers; linear: each head a matrix on the final state
    unembedding  shared: the target's output head; own: a copy for each ("replicated", for small vocabularies)
    """

    heads: int = 4
    kind: str = "parallel"
    unembedding: str = "shared"

    def __post_init__(self) -> None:
        at_least("mtp", heads=(self.heads, 2))
        if self.kind not in KINDS:
            raise unknown("kind of mtp", self.kind, KINDS)
        if self.unembedding not in ("shared", "own"):
            raise unknown("unembedding of mtp", self.unembedding, ("shared", "own"))


class Heads(nn.Module):
    """What heads 2..n have of their own: `layers` (none if anticausal) and `outputs` [V, H] each (none if shared)."""

    def __init__(self, architecture: Architecture, layers: nn.ModuleList, outputs: list[Tensor]) -> None:
        super().__init__()
        self.architecture, self.layers = architecture, layers
        self.outputs = nn.ParameterList([nn.Parameter(output) for output in outputs])


def fresh(target: Target, architecture: Architecture) -> Heads:
    """Heads before training: copies of the target's last layer (identity matrices if linear) and of its output head."""
    guesses, weight = architecture.heads - 1, target.unembed.weight
    if architecture.kind == "anticausal":
        if guesses >= target.config.num_hidden_layers:
            raise UserError(
                f"{architecture.heads} anticausal heads are the target's last layers and it has "
                f"{target.config.num_hidden_layers}; ask for fewer heads."
            )
        layers = nn.ModuleList()
    elif architecture.kind == "linear":
        size = target.config.hidden_size
        layers = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(guesses)).to(weight)
        for layer in layers:
            nn.init.eye_(layer.weight)  # pyright: ignore[reportArgumentType]
    else:
        layers = last_layers(target, guesses)
    own = guesses if architecture.unembedding == "own" else 0
    return Heads(architecture, layers, [weight.detach().clone() for _ in range(own)])


@dataclass(slots=True)
class State:
    """A cache of one layer for each head that attends."""

    caches: list[SlotCache]

    def select(self, rows: list[int]) -> None:
        for cache in self.caches:
            cache.select(rows)

    def join(self, other: "State") -> None:
        for mine, theirs in zip(self.caches, other.caches, strict=True):
            mine.join(theirs)


class Mtp:
    def __init__(self, target: Target, heads: Heads, plan: Plan) -> None:
        self.target, self.heads, self.plan = target, heads, plan
        self.kind = heads.architecture.kind
        self.count = heads.architecture.heads - 1  # of guesses
        self.norm = norm_of(target)[1]
        attends = self.kind in ("parallel", "causal")
        self.branches = [Branch(target, [layer]) for layer in heads.layers] if attends else []

    @property
    def needs(self) -> Needs:
        """Parallel heads read what the last layer reads, anticausal ones the last layers, others the final state."""
        own = {"parallel": (-2,), "anticausal": tuple(range(-2, -2 - self.count, -1))}
        return Needs(self.plan.nodes, own.get(self.kind, (-1,)))

    def unembed(self, head: int) -> Unembedding:
        """The output head of guess `head`, from 0."""
        return output_head(self.target, self.heads.outputs, head)

    def stages(self, batch: Batch) -> list[Stage]:
        """Parallel and linear heads beside each other; causal ones behind each other; label of head i: token t + i."""
        forest: list[Stage] = []
        for head in reversed(range(self.count)):
            ready = None if self.kind == "linear" else self.norm
            follower = tuple(forest) if self.kind == "causal" else ()
            stage = Stage(f"head {head + 2}", head + 2, 1.0, self._run(head), self.unembed(head), ready, follower)
            forest = [stage] if self.kind == "causal" else [stage, *forest]
        return forest

    def _run(self, head: int) -> Callable[[Tensor], Tensor]:
        """What guess `head`, from 0, makes of the features, or of the output of the head before it."""
        if self.kind == "linear":
            return self.heads.layers[head]
        if self.kind == "anticausal":
            size = self.target.config.hidden_size

            def part(states: Tensor) -> Tensor:
                return states[..., head * size : (head + 1) * size]

            return part
        return self.branches[head]

    def start(self, batch: int, capacity: int) -> State:
        return State([branch.cache(batch, capacity) for branch in self.branches])

    def logits(self, feed: Feed, state: State) -> Tensor:
        """[B, n - 1, V] of the heads at the last accepted token, whose states their caches now hold."""
        assert feed.features is not None
        if self.kind == "linear":
            last = last_states(feed, feed.features)
            hidden = [layer(last) for layer in self.heads.layers]
        elif self.kind == "anticausal":
            parts = last_states(feed, feed.features).split(self.target.config.hidden_size, -1)
            hidden = [self.norm(part) for part in parts]
        else:
            hidden, given = [], feed.features
            for branch, cache in zip(self.branches, state.caches, strict=True):
                output = branch.read(given, feed.count, cache)
                hidden.append(self.norm(last_states(feed, output)))
                given = output if self.kind == "causal" else given
        return torch.cat([self.unembed(i)(h) for i, h in enumerate(hidden)], 1)

    def begin(self, feed: Feed, state: State) -> tuple[Tensor, Extend]:
        return known(self.logits(feed, state))

    def propose(self, feed: Feed, state: State) -> Draft:
        return self.plan.draft(feed, *self.begin(feed, state))


def build(target: Target, config: Config) -> Mtp:
    heads, trees = opened("mtp", config, target, Architecture, fresh)
    return Mtp(target, heads, planned(config, heads.architecture.heads - 1, trees, target=target))
