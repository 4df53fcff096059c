"""EAGLE: one layer that extrapolates the target's features, fed with the token that was drawn.

version 1 (Li et al. 2024, arXiv:2401.15077): at row i the layer reads [embedding of token i + 1; feature i] through one
projection and its output is feature i + 1, from which the target's output head predicts token i + 2. EAGLE-2
(arXiv:2406.16858) is the same network under `tree=dynamic`.

version 3 (arXiv:2503.01840): features of a low, a middle and a high layer are fused by one projection; attention reads
[embedding; state] side by side; the output head is the drafter's own, over a draft vocabulary; later steps read the
drafter's own states, in training as in decoding (training-time test).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from foretoken.block import Attention, Mlp, OwnLayer, Size, linear, size_like
from foretoken.drafter import Feed, Needs
from foretoken.errors import UserError, at_least
from foretoken.feedback import Cell, Embedding, Recurrent, State
from foretoken.grow import Extend
from foretoken.heads import Config as Common
from foretoken.heads import opened
from foretoken.objective import Batch, Stage
from foretoken.plan import Plan, planned
from foretoken.published import is_published, read
from foretoken.saved import trees_in
from foretoken.target import Target, norm_of
from foretoken.tree import Draft
from foretoken.unembed import Unembedding

DEPTH = 6
"""Guesses on the longest path, if nothing says how many (arXiv:2406.16858, section 5)."""
DECAY = 0.8
"""Weight of a step's loss over the weight of the step before (EAGLE-3's code)."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """
    version               1 or 3 (2 is 1 with a dynamic tree)
    steps                 of training, each reading the states of the step before (1: no training-time test)
    features              version 3: the states that are fused: i is the input of layer i, from 0, or the final state;
                          none: a low, a middle and a high one
    vocabulary            version 3: tokens that can be guessed, the training text's most frequent (0: all)
    inner                 size of the MLP (0: the target's)
    norm_before_residual  version 3: the residual is the normed state
    norm_features         version 3.1: each layer's features are normed before they are fused
    norm_output           version 3.1: the next step reads the normed output
    """

    version: int = 3
    steps: int = 1
    features: tuple[int, ...] = ()
    vocabulary: int = 0
    inner: int = 0
    norm_before_residual: bool = False
    norm_features: bool = False
    norm_output: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", tuple(self.features))  # lists come from files
        at_least("eagle", steps=(self.steps, 1), vocabulary=(self.vocabulary, 0), inner=(self.inner, 0))
        if self.version not in (1, 3):
            raise UserError(f"eagle: version is {self.version}; it must be 1 or 3 (EAGLE-2 is 1 with tree=dynamic).")
        own = ("features", "vocabulary", "norm_before_residual", "norm_features", "norm_output")
        if self.version == 1 and (given := [name for name in own if getattr(self, name)]):
            raise UserError(f"eagle: {given[0]} belongs to version 3 and the version is 1; leave it out.")


@dataclass(frozen=True, slots=True)
class Config(Common):
    """
    nodes       guesses of a static or dynamic tree, the best ones (0: all)
    """

    nodes: int = 48


class First(nn.Module):
    """The layer of version 1: [embedding; feature] -> the next feature. Its attention reads states as they are."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * size.hidden, size.hidden)
        self.self_attn, self.mlp = Attention(size, size.hidden), Mlp(size)
        self.post_attention_layernorm = nn.RMSNorm(size.hidden, size.eps)

    def forward(self, states: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any) -> Tensor:
        states = self.fc(states)
        states = states + self.self_attn(states, turn, mask, cache)
        return states + self.mlp(self.post_attention_layernorm(states))


class Third(nn.Module):
    """The layer of version 3: attention reads [embedding; state], each normed; the residual is the state."""

    def __init__(self, size: Size, norm_before_residual: bool) -> None:
        super().__init__()
        self.normed = norm_before_residual
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = (
            nn.RMSNorm(size.hidden, size.eps) for _ in range(3)
        )
        self.self_attn, self.mlp = Attention(size, 2 * size.hidden), Mlp(size)

    def forward(self, states: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any) -> Tensor:
        embedded, state = states.chunk(2, -1)
        normed = self.hidden_norm(state)
        read = torch.cat([self.input_layernorm(embedded), normed], -1)
        state = (normed if self.normed else state) + self.self_attn(read, turn, mask, cache)
        return state + self.mlp(self.post_attention_layernorm(state))


class Network(nn.Module):
    """The layer and, of version 3, the fusion `fc`, norms, the output head [V', H] and the tokens [V'] it scores."""

    def __init__(self, architecture: Architecture, size: Size, norm: nn.Module, vocab: int) -> None:
        super().__init__()
        self.architecture, self.size = architecture, size
        a = architecture
        if a.version == 1:
            self.layer = First(size)
            return
        self.layer = Third(size, a.norm_before_residual)
        self.fc = linear(len(a.features) * size.hidden, size.hidden)
        self.norm = norm
        norms = len(a.features) if a.norm_features else 0
        self.fc_norms = nn.ModuleList(nn.RMSNorm(size.hidden, size.eps) for _ in range(norms))
        self.lm_head = linear(size.hidden, a.vocabulary or vocab)
        if a.vocabulary:
            self.register_buffer("vocabulary", torch.arange(a.vocabulary))

    def choose(self, tokens: Tensor, target: Target) -> None:
        """Make these tokens [V'] the draft vocabulary; their rows begin as the target's."""
        if self.architecture.vocabulary:
            cast(Tensor, self.vocabulary).copy_(tokens)
        with torch.no_grad():
            self.lm_head.weight.copy_(target.unembed.weight[tokens])

    def fused(self, features: Tensor) -> Tensor:
        """[B, T, H] of the features [B, T, layers * H] of version 3."""
        if self.fc_norms:
            parts = features.split(self.size.hidden, -1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norms, parts, strict=True)], -1)
        return self.fc(features)


def usual_features(layers: int) -> tuple[int, ...]:
    """A low, a middle and a high one of so many layers: EAGLE-3's code has 2, the middle and the third from the end.

    Of fewer than eight those lie side by side and leave out the last layers: there a third, two thirds and all.
    """
    return (2, layers // 2, layers - 3) if layers >= 8 else tuple(sorted({layers // 3, 2 * layers // 3, layers}))


def fresh(target: Target, architecture: Architecture) -> Network:
    """A network before training: final norm and output head are the target's, of the features the highest passes."""
    a, layers = architecture, target.config.num_hidden_layers
    if a.vocabulary > target.vocab:
        raise UserError(
            f"A draft vocabulary of {a.vocabulary} was asked for and the target has {target.vocab} tokens; ask for "
            "fewer."
        )
    if outside := [i for i in a.features if not 0 <= i <= layers]:
        raise UserError(f"eagle: features name state {outside[0]} and the target has 0 to {layers}; choose others.")
    if a.version == 3 and not a.features:
        architecture = replace(a, features=usual_features(layers))
    norm = copy.deepcopy(norm_of(target)[1])
    network = Network(architecture, size_like(target, a.inner), norm, target.vocab).to(target.unembed.weight)
    if a.version == 3:
        network.choose(torch.arange(a.vocabulary or target.vocab), target)
        with torch.no_grad():
            network.fc.weight.zero_()[:, -target.config.hidden_size :].fill_diagonal_(1.0)
    return network


class Eagle:
    def __init__(self, target: Target, heads: Network, plan: Plan) -> None:
        self.target, self.heads, self.plan = target, cast(Any, heads), plan
        a = self.architecture = heads.architecture
        self.enter: Callable[[Tensor], Tensor] = heads.fused if a.version == 3 else nn.Identity()
        ready = heads.norm if a.version == 3 else nn.Identity()
        onward = ready if a.norm_output else nn.Identity()
        layer = OwnLayer(target, heads.layer, heads.size)
        self.network = Recurrent(target, Cell(beside, layer, onward, ready, self.unembed), Embedding(target))

    @property
    def needs(self) -> Needs:
        return Needs(self.plan.slots, self.architecture.features or (-1,))

    def unembed(self) -> Unembedding:
        """The target's output head, or the drafter's own of version 3."""
        if self.architecture.version == 1:
            return self.target.unembed
        tokens = self.heads.vocabulary if self.architecture.vocabulary else None
        return Unembedding(self.heads.lm_head.weight, tokens=tokens)

    def stages(self, batch: Batch) -> list[Stage]:
        """Step j's label at row i is token i + 2 + j; its loss weighs 0.8^j."""
        weights = [DECAY**step for step in range(self.architecture.steps)]
        return self.network.stages(batch, self.enter, weights)

    def start(self, batch: int, capacity: int) -> State:
        return self.network.start(batch, capacity, self.plan.slots)

    def begin(self, feed: Feed, state: State) -> tuple[Tensor, Extend]:
        assert feed.features is not None
        return self.network.begin(feed, state, self.enter(feed.features))

    def propose(self, feed: Feed, state: State) -> Draft:
        return self.plan.draft(feed, *self.begin(feed, state))


def beside(state: Tensor, embedded: Tensor) -> Tensor:
    return torch.cat([embedded, state], -1)


def adopted(target: Target, config: Config) -> Network:
    """A network that others published."""
    found = read(str(config.path), target, other_target=config.other_target)
    norm = nn.RMSNorm(found.size.hidden, found.size.eps)
    network = Network(Architecture(**found.settings), found.size, norm, target.vocab)
    found.fill(network)
    return network.to(target.device, target.dtype)


def build(target: Target, config: Config) -> Eagle:
    if config.path and not isinstance(config.path, nn.Module) and is_published(config.path):
        heads = adopted(target, config)
        trees = trees_in(Path(config.path), "eagle", target, required=config.tree == "static")
    else:
        heads, trees = opened("eagle", config, target, Architecture, fresh)
    return Eagle(target, heads, planned(config, config.depth or DEPTH, trees, usual="dynamic", target=target))
