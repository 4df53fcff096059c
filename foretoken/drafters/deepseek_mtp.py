"""Multi-token prediction in a causal chain (DeepSeek-V3, arXiv:2412.19437, section 2.2).

Module k reads, at row i, the state that module k - 1 made there (the target's for k = 1) and the embedding of token
i + k, and predicts token i + k + 1 (equations 21 to 24): two norms, a projection of both halves, one block of the
target's kind, a norm, the target's output head. One module may serve every guess, trained for it by FastMTP
(arXiv:2509.18362): attention "shared" reads later guesses' rows in the first guess's cache, as servers do; "own" keeps
a cache for each guess, as DeepSeek trains.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from foretoken.branch import Branch, last_layers, neutral
from foretoken.drafter import Feed, Needs
from foretoken.errors import UserError, at_least, unknown
from foretoken.feedback import Cascade, Cell, Embedding, Recurrent, State
from foretoken.grow import Extend
from foretoken.heads import Config as Common
from foretoken.heads import opened
from foretoken.native import find
from foretoken.objective import Batch, Stage
from foretoken.plan import Plan, planned
from foretoken.target import UNNORMED, Target, norm_of
from foretoken.tree import Draft
from foretoken.unembed import Unembedding

CHOICES = {
    "attention": ("own", "shared"),
    "first": ("embedding", "state"),
    "enters": ("normed", "raw"),
    "onward": ("raw", "normed"),
    "start": ("kept", "blank"),
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """
    modules     D, those with weights of their own
    guesses     K, tokens guessed; guess k is module (k - 1) mod D's
    attention   own: each guess attends to rows of its own depth; shared: to the first guess's rows (one module only)
    first       which half comes first in the projection
    enters      the target's state as the first module reads it: after or before the target's final norm
    onward      a module's output as the next one reads it: before or after the module's final norm
    start       blank: nothing is embedded at position 0
    vocabulary  tokens that can be guessed, the training text's most frequent (0: all)
    """

    modules: int = 1
    guesses: int = 3
    attention: str = "own"
    first: str = "embedding"
    enters: str = "normed"
    onward: str = "raw"
    start: str = "kept"
    vocabulary: int = 0

    def __post_init__(self) -> None:
        at_least("deepseek_mtp", modules=(self.modules, 1), vocabulary=(self.vocabulary, 0))
        at_least("deepseek_mtp", guesses=(self.guesses, self.modules))
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown(f"{name} of deepseek_mtp", getattr(self, name), known)
        if self.attention == "shared" and self.modules > 1:
            raise UserError(
                f"attention 'shared' is for one module that serves every guess and there are {self.modules}; use 'own'."
            )


class Module(nn.Module):
    """What one module has of its own; the block is of the target's kind."""

    def __init__(self, block: nn.Module, norm: nn.Module, size: int) -> None:
        super().__init__()
        self.enorm, self.hnorm, self.norm = neutral(norm), neutral(norm), norm
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.block = block
        with torch.no_grad():
            self.eh_proj.weight.copy_(torch.eye(size).repeat(1, 2))  # the sum of both, at first


class Modules(nn.Module):
    """The modules, and the tokens [V'] that they guess if not all."""

    def __init__(self, architecture: Architecture, modules: list[Module]) -> None:
        super().__init__()
        self.architecture = architecture
        self.layers = nn.ModuleList(modules)
        if architecture.vocabulary:
            self.register_buffer("vocabulary", torch.arange(architecture.vocabulary))

    def choose(self, tokens: Tensor, target: Target) -> None:
        """Make these tokens [V'] the draft vocabulary."""
        cast(Tensor, self.vocabulary).copy_(tokens)


def fresh(target: Target, architecture: Architecture) -> Modules:
    """Modules before training: copies of the target's last block and final norm, behind the sum of what they read."""
    if architecture.vocabulary > target.vocab:
        raise UserError(
            f"A draft vocabulary of {architecture.vocabulary} was asked for and the target has {target.vocab} tokens; "
            "ask for fewer."
        )
    size, (_, norm) = target.config.hidden_size, norm_of(target)
    blocks = last_layers(target, architecture.modules)
    modules = [Module(block, copy.deepcopy(norm), size) for block in blocks]
    return Modules(architecture, modules).to(target.unembed.weight)


class DeepseekMtp:
    def __init__(self, target: Target, heads: Modules, plan: Plan) -> None:
        self.target, self.heads, self.plan = target, cast(Any, heads), plan
        a = self.architecture = heads.architecture
        embedding = Embedding(target, blank=a.start == "blank")
        cells = [self._cell(module) for module in heads.layers]
        if a.attention == "shared":
            self.network = Recurrent(target, cells[0], embedding)
        else:
            self.network = Cascade(target, [cells[k % a.modules] for k in range(a.guesses)], embedding)

    @property
    def needs(self) -> Needs:
        return Needs(self.plan.slots, (UNNORMED if self.architecture.enters == "raw" else -1,))

    def _cell(self, module: Any) -> Cell:
        def join(state: Tensor, embedded: Tensor) -> Tensor:
            halves = [module.enorm(embedded), module.hnorm(state)]
            return module.eh_proj(torch.cat(halves if self.architecture.first == "embedding" else halves[::-1], -1))

        onward = module.norm if self.architecture.onward == "normed" else nn.Identity()
        return Cell(join, Branch(self.target, [module.block]), onward, module.norm, self.unembed)

    def unembed(self) -> Unembedding:
        """The target's output head, or its rows of the draft vocabulary."""
        whole = self.target.unembed
        return whole.limited(self.heads.vocabulary) if self.architecture.vocabulary else whole

    def stages(self, batch: Batch) -> list[Stage]:
        """Module k's label at row i is token i + k + 1; all weigh the same: 1 / K each (equation 25)."""
        K = self.architecture.guesses
        return self.network.stages(batch, nn.Identity(), [1 / K] * K)

    def start(self, batch: int, capacity: int) -> State:
        return self.network.start(batch, capacity, self.plan.slots)

    def begin(self, feed: Feed, state: State) -> tuple[Tensor, Extend]:
        assert feed.features is not None
        return self.network.begin(feed, state, feed.features)

    def propose(self, feed: Feed, state: State) -> Draft:
        return self.plan.draft(feed, *self.begin(feed, state))


def native(target: Target, settings: Mapping[str, Any], depth: int = 0) -> Modules:
    """The modules in the target's own checkpoint, with these settings of the architecture over theirs.

    One module serves three guesses over shared rows, as servers let it, and D make D; or `depth`, if that is more.
    """
    found = find(target)
    usual: dict[str, Any] = {"guesses": max(3 if found.count == 1 else found.count, depth)}
    usual["attention"] = "shared" if found.count == 1 else "own"
    size, (_, norm) = target.config.hidden_size, norm_of(target)
    own = [Module(block, copy.deepcopy(norm), size) for block in found.blocks()]
    for module in own:
        module.eh_proj.to(target.unembed.weight)  # the rest is as the target keeps it, some weights in float32
    modules = Modules(Architecture(**(usual | found.settings | dict(settings))), own)
    found.fill(modules)
    return modules


@dataclass(frozen=True, slots=True)
class Config(Common):
    """
    start  of a published model's own modules, used if no path is given: blank embeds nothing at position 0, as vLLM
           does; kept, or nothing, embeds the token there
    """

    start: str = ""


def build(target: Target, config: Config) -> DeepseekMtp:
    if config.path:
        heads, trees = opened("deepseek_mtp", config, target, Architecture, fresh)
    else:
        heads, trees = native(target, {"start": config.start} if config.start else {}, config.depth), {}
    a = heads.architecture
    deepest = a.guesses if a.attention == "own" else max(a.guesses, config.depth)
    return DeepseekMtp(target, heads, planned(config, deepest, trees, target=target))
