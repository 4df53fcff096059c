"""The operators of a planned step wherever `cpu/kernels.cpp` is not: plain torch for any device, Triton for CUDA.

`foretoken::attend` reads a cache of slots by a plan and `foretoken::write` fills it. The plain functions here say what
they mean, slot by slot; the fast ones are tested against them.
"""

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from foretoken.kernels import SHAPES, load_kernels

SCHEMAS = {
    "write": "(Tensor(a!) keys, Tensor(b!) values, Tensor new_keys, Tensor new_values, Tensor slot) -> ()",
    "attend": "(Tensor query, Tensor keys, Tensor values, Tensor plan, float scale, float cap, Tensor? sinks) "
    "-> Tensor",
}
"""Of the operators that a planned cache needs, as `cpu/kernels.cpp` has them."""

LIBRARIES: list[torch.library.Library] = []
"""What was registered here; torch forgets an operator with its library."""

ops: Any = torch.ops


@lru_cache(maxsize=1)
def provide() -> None:
    """Make `write` and `attend` available: on CUDA at once, elsewhere by building `cpu/kernels.cpp`."""
    if not hasattr(ops.foretoken, "attend") and not torch.cuda.is_available():
        load_kernels()
    library = torch.library.Library("foretoken", "FRAGMENT")
    LIBRARIES.append(library)
    if not hasattr(ops.foretoken, "attend"):
        for (name, schema), plain in zip(SCHEMAS.items(), (write, attend), strict=True):
            library.define(name + schema)
            library.impl(name, plain, "CompositeExplicitAutograd")
            torch.library.register_fake(f"foretoken::{name}", SHAPES[name], lib=library)
    if torch.cuda.is_available():
        fast: Any = import_module("foretoken.kernels_triton") if find_spec("triton") else None
        library.impl("write", write if fast is None else fast.write, "CUDA")
        library.impl("attend", attend if fast is None else fast.attend, "CUDA")


def write(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, slot: Tensor) -> None:
    """Put new keys [B, K, N, D] and values [B, K, N, E] into the slots [B, N] of [B, K, S, D] and [B, K, S, E]."""
    for store, new in ((keys, new_keys), (values, new_values)):
        index = slot[:, None, :, None].expand(-1, store.shape[1], -1, store.shape[3])
        store.scatter_(2, index, new)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, plan: Tensor, scale: float, cap: float, sinks: Tensor | None
) -> Tensor:
    """[B, N, H, E] attention of query [B, H, N, D] to keys [B, K, S, D] and values [B, K, S, E] by a plan.

    plan   [B, 1, N, 2 + N] int64 of each node: committed tokens, the window (0: none), whom it sees
    cap    scores are bounded by it (0: not)
    sinks  [H], a score of each head that takes weight and gives nothing
    """
    B, H, N, _ = query.shape
    K, S = keys.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide).reshape(B, K, H // K * N, -1) @ keys.to(wide).transpose(2, 3) * scale
    if cap > 0:
        scores = cap * (scores / cap).tanh()
    scores = scores.view(B, H, N, S).masked_fill(~visible(plan, S)[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(wide)[None, :, None, None].expand(B, H, N, 1)], -1)
    weight = scores.softmax(-1)[..., :S].view(B, K, H // K * N, S)
    return (weight @ values.to(wide)).view(B, H, N, -1).transpose(1, 2).to(query.dtype)


def visible(plan: Tensor, slots: int) -> Tensor:
    """[B, N, slots] bool: what each node attends to by the plan [B, 1, N, 2 + N]."""
    length, window, sees = plan[:, 0, :1, :1], plan[:, 0, :, 1:2], plan[:, 0, :, 2:].bool()
    ahead = (torch.arange(slots, device=plan.device) - length) % slots  # [B, 1, slots]: of the first free position
    age, depth = slots - ahead, sees.sum(-1, keepdim=True) - 1
    behind = sees.flip(-1).cumsum(-1).flip(-1)  # how many nodes of a path stand from each on
    committed = (age <= length) & ((window == 0) | (age + depth < window))
    sees = sees & ((window == 0) | (behind <= window))
    N = sees.shape[2]
    at_node = sees.gather(2, ahead.clamp(max=N - 1).expand(-1, N, -1))
    return torch.where(ahead < N, at_node, committed)
