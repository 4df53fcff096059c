"""A target whose steps are compiled: one program for every batch, width, tree and length.

What the model does to the nodes of a draft is traced with a cache of slots that is written in place and attention by
position (`kernels.cpp`). Prompts are read by the model itself. A node gets the same bits whatever stands beside it, so
a compiled target says the same in every batch and tree even in bfloat16.
"""

import copy
import json
from collections.abc import Sequence
from threading import Lock, Thread
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim
from transformers.cache_utils import Cache, CacheLayerMixin

from foretoken.attention import NAME
from foretoken.cache import SlotCache
from foretoken.errors import UserError
from foretoken.kernels import DTYPES
from foretoken.program import Program, Progress, Recipe, program
from foretoken.target import Read, Target
from foretoken.tree import Draft

ops: Any = torch.ops


class PlannedLayer(CacheLayerMixin):
    """The slots [B, heads, S, D] of one layer while its model is traced."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, slot: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.slot = keys, values, slot
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("the slots are given")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, heads, N, D] keys and values; all slots."""
        assert self.keys is not None and self.values is not None
        ops.foretoken.write(self.keys, self.values, key_states, value_states, self.slot)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2]


class PlannedCache(Cache):
    """A `SlotCache` as a trace sees it: lengths and slots are tensors, and instead of masks there are plans."""

    def __init__(self, stores: list[Tensor], length: Tensor, windows: list[int | None]) -> None:
        super().__init__(layers=[])
        self.stores, self.length, self.windows = stores, length, windows

    def plan(
        self, depth: Tensor, ancestors: Tensor | None, offset: int, *_: object
    ) -> dict[int | None, Tensor]:
        """Per window [B, 1, n, 2 + M] int64 of each node: committed tokens, the window (0: none), whom of M it sees."""
        n = depth.shape[1]
        number = torch.arange(n, device=depth.device)
        if ancestors is None:
            ancestors = (number <= number[:, None]).expand(depth.shape[0], n, n)
        slot = self.length[:, None] + offset + number
        pairs = zip(self.stores[::2], self.stores[1::2], strict=True)
        self.layers = [PlannedLayer(keys, values, slot % keys.shape[2]) for keys, values in pairs]
        length = self.length[:, None, None].expand(-1, n, 1)
        plans: dict[int | None, Tensor] = {}
        for window in dict.fromkeys(self.windows):
            plans[window] = torch.cat([length, torch.full_like(length, window or 0), ancestors.long()], -1)[:, None]
        return plans

    def commit(self, path: None, count: Tensor) -> None:
        """Make the first `count` [B] nodes part of each row."""
        self.length = self.length + count

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens of every row."""
        self.length = self.length - count

    @property
    def begun(self) -> Tensor:
        """[B] bool: whether a row holds anything."""
        return self.length > 0


class Step(nn.Module):
    """What is traced: the nodes of a draft behind the committed tokens."""

    def __init__(self, target: Target, features: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.features = target.model, features
        self.target = target

    def forward(
        self, tokens: Tensor, depth: Tensor, ancestors: Tensor, length: Tensor, stores: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cache: Any = PlannedCache(stores, length, self.target.windows)
        read = self.target.extend(tokens, depth, ancestors, cache, features=self.features)
        return (read.logits,) if read.features is None else (read.logits, read.features)


class CompiledTarget(Target):
    """A target that compiles its step when a session first needs it."""

    def __init__(
        self, target: Target, *, wait: bool = True, inductor: bool = True, progress: Progress | None = None
    ) -> None:
        """The target, to be compiled.

        wait      compile before the first session; or else sessions that begin meanwhile decode eagerly
        inductor  fuse what lies between the kernels, which takes half a minute once; or else run the trace
        progress  told each stage of compiling
        """
        require_compilable(target)
        self.__dict__.update(target.__dict__)
        self.eager, self.wait, self.inductor, self.progress = target, wait, inductor, progress
        self.programs: dict[tuple[int, ...], Program] = {}
        self.begun: set[tuple[int, ...]] = set()
        self.lock = Lock()
        self.chains: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def settled(self, features: Sequence[int] = ()) -> Target:
        """This target if its program is there (waiting for it, if so asked), else the eager one."""
        key = tuple(features)
        if key not in self.programs and self.wait:
            self.compile(key)
        if key not in self.programs and key not in self.begun:
            self.begun.add(key)
            Thread(target=self.compile, args=(key,), daemon=True).start()
        return self if key in self.programs else self.eager

    def compile(self, features: tuple[int, ...]) -> None:
        """Make the program for these features, once."""
        with self.lock:
            if features not in self.programs:
                recipe = recipe_for(self.eager, features)
                self.programs[features] = program(recipe, self.progress, inductor=self.inductor)

    def judge(self, draft: Draft, cache: SlotCache, features: Sequence[int] = ()) -> Read:
        """Read a whole draft behind the committed tokens: logits and features at every node."""
        work = self.programs.get(tuple(features))
        if work is None:
            return super().judge(draft, cache, features)
        depth, ancestors = self.shape_of(draft)
        cache.require_room(draft.width)
        out = work(draft.tokens.contiguous(), depth, ancestors, cache.length, *cache.stores)
        return Read(out[0], out[1] if features else None)

    def shape_of(self, draft: Draft) -> tuple[Tensor, Tensor]:
        """(depth, ancestors) of a draft, contiguous; those of chains are kept."""
        if not draft.chained:
            return draft.depth, draft.ancestors.contiguous()
        B, N = draft.tokens.shape
        if (B, N) not in self.chains:
            node = torch.arange(N)
            self.chains[B, N] = (
                node.expand(B, N).contiguous(),
                (node <= node[:, None]).expand(B, N, N).contiguous(),
            )
        return self.chains[B, N]

    def shallow(self, layers: int) -> Target:
        return self.eager.shallow(layers)


def recipe_for(target: Target, features: tuple[int, ...]) -> Recipe:
    """How the target's step is compiled."""
    twin = traceable(target, {})
    B, N, S = 2, 4, 24
    length = torch.full((B,), 8)
    depth = torch.arange(N).expand(B, N).contiguous()
    ancestors = torch.ones(N, N, dtype=torch.bool).tril().expand(B, N, N).contiguous()
    tokens = torch.zeros(B, N, dtype=torch.int64)
    cache = target.cache(B, S, N)
    with torch.inference_mode(False), torch.no_grad():
        target.read(tokens, [1] * B, cache)
    batch, nodes, slots = Dim("batch"), Dim("nodes"), Dim("slots")
    ring = Dim("ring")
    by_layer = [{0: batch, 2: slots if w is None else ring} for w in target.windows for _ in range(2)]
    stores = [torch.zeros_like(s).repeat(1, 1, 2, 1) if s.shape[2] < S else torch.zeros_like(s) for s in cache.stores]
    dynamic = ({0: batch, 1: nodes}, {0: batch, 1: nodes}, {0: batch, 1: nodes, 2: nodes}, {0: batch}, by_layer)
    config = json.dumps(target.config.to_dict(), sort_keys=True, default=str)
    key = ("step", type(target.model).__name__, config, target.dtype, features, transformers.__version__)
    return Recipe(key, Step(twin, features).eval(), (tokens, depth, ancestors, length, stores), dynamic)


def traceable(target: Target, known: dict[int, Any]) -> Target:
    """A copy of the target over the same weights: tracing puts tensors without values into its modules.

    Its attention is ours, and its experts are picked without a look at how many tokens each has. known: what was
    copied, by `id`, as `copy.deepcopy` has it.
    """
    twin = copy.copy(target)
    twin.model = model = unshared(target.model, known)
    model.set_attn_implementation(NAME)
    if any(type(module).__name__.endswith("Experts") for module in model.modules()):
        model.set_experts_implementation("batched_mm")
    return twin


def unshared(module: nn.Module, known: dict[int, Any]) -> Any:
    """A copy of the module over the same weights."""
    known |= {id(x): x for x in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, known)


def require_compilable(target: Target) -> None:
    """`UserError` if the target's step cannot be compiled here."""
    if target.device.type != "cpu":
        raise UserError(f"The model is on {target.device}, and steps are compiled for processors; load it there.")
    if target.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise UserError(f"The model is in {target.dtype}, and steps are compiled in {names}; load it in one of them.")
    if not target.model._supports_attention_backend:  # pyright: ignore[reportPrivateUsage]
        raise UserError(
            f"{type(target.model).__name__} computes attention by itself, which cannot be compiled; decode it without."
        )
