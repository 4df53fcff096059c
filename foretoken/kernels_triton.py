"""The operators of a planned step as Triton kernels: attention of few queries over a long cache, on all of a GPU.

The prefix of each row is cut into pieces, as many as fill the device, and one more piece holds the nodes in flight;
each piece is attended to by itself and the pieces are merged by their largest scores and sums (flash decoding). How
long a row is, is read on the device: one captured graph serves every length, and costs what the length costs.

The query heads that share keys stand below each other for all nodes: they are the rows of one product.
"""

from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import foretoken.operators as operators

if TYPE_CHECKING:
    from builtins import int as constexpr
    from typing import Any as tensor  # noqa: N813
else:  # Triton knows the names in its kernels' annotations only as its own
    from triton.language import constexpr, tensor

triton: Any = import_module("triton")
tl: Any = import_module("triton.language")

TILE = 64
"""Most rows of one product."""
PIECES = 64
"""Most pieces of a prefix."""
WIDEST = 256
"""Most bytes of one number of all nodes in flight; more nodes are attended to plainly."""
COUNTS = {
    "piece_kernel": ("cuts", "heads", "N", "S"),
    "merge_kernel": ("cuts", "heads", "rows"),
    "write_kernel": ("N",),
    "move_kernel": ("N", "S", "heads"),
}
"""Arguments for whose values nothing is compiled anew."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def fold(
    query: tensor,
    keys: tensor,
    values: tensor,
    slot: tensor,
    seen: tensor,
    mixed: tensor,
    top: tensor,
    total: tensor,
    scale: tensor,
    cap: tensor,
    key_stride: tensor,
    value_stride: tensor,
    D: constexpr,
    E: constexpr,
    BLOCK_D: constexpr,
    BLOCK_E: constexpr,
    CAPPED: constexpr,
    PRECISION: constexpr,
) -> tuple[tensor, tensor, tensor]:
    """(mixed [M, E], top [M], total [M]) after the slots [P], of which `seen` [M, P]."""
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    place = slot.to(tl.int64)
    key = tl.load(keys + d[:, None] + place[None, :] * key_stride, mask=(d < D)[:, None], other=0.0)
    score = tl.dot(query, key, input_precision=PRECISION) * scale
    if CAPPED:
        score = cap * (2.0 * tl.sigmoid(2.0 * score / cap) - 1.0)  # tanh
    score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
    weight, kept = tl.exp(score - base[:, None]), tl.exp(top - base)
    value = tl.load(values + place[:, None] * value_stride + e[None, :], mask=(e < E)[None, :], other=0.0)
    part = tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
    return mixed * kept[:, None] + part, higher, total * kept + tl.sum(weight, 1)


@triton.jit(do_not_specialize=COUNTS["piece_kernel"])
def piece_kernel(
    queries: tensor,
    keys: tensor,
    values: tensor,
    plan: tensor,
    mixes: tensor,
    tops: tensor,
    totals: tensor,
    scale: tensor,
    cap: tensor,
    cuts: tensor,
    heads: tensor,
    N: tensor,
    S: tensor,
    query_batch: tensor,
    query_head: tensor,
    query_node: tensor,
    key_batch: tensor,
    key_head: tensor,
    key_stride: tensor,
    value_batch: tensor,
    value_head: tensor,
    value_stride: tensor,
    GROUP: constexpr,
    D: constexpr,
    E: constexpr,
    BLOCK_M: constexpr,
    BLOCK_S: constexpr,
    BLOCK_N: constexpr,
    BLOCK_D: constexpr,
    BLOCK_E: constexpr,
    CAPPED: constexpr,
    PRECISION: constexpr,
) -> None:
    """One tile of queries over one piece: of `cuts` of the prefix, or (the last) the nodes in flight."""
    of_head, cut = tl.program_id(1), tl.program_id(2)
    b, head = of_head // heads, of_head % heads
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < N * GROUP
    node = tl.where(real, row // GROUP, 0)
    d, j = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    place = b.to(tl.int64) * query_batch + (head * GROUP + row % GROUP) * query_head + node * query_node
    query = tl.load(queries + place[:, None] + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    keys += b.to(tl.int64) * key_batch + head.to(tl.int64) * key_head
    values += b.to(tl.int64) * value_batch + head.to(tl.int64) * value_head
    plan += b * N * (2 + N)
    length, window = tl.load(plan).to(tl.int32), tl.load(plan + 1).to(tl.int32)
    sees = tl.load(plan + node[:, None] * (2 + N) + 2 + j[None, :], mask=(j < N)[None, :], other=0).to(tl.int32)
    path = tl.sum(sees, 1)  # nodes on the way to each, itself included
    mixed = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if cut == cuts:
        rank = tl.cumsum(sees, 1)
        seen = (sees > 0) & ((window == 0) | (rank > (path - window)[:, None]))
        mixed, top, total = fold(
            query, keys, values, (length + j) % S, seen, mixed, top, total, scale, cap, key_stride, value_stride,
            D, E, BLOCK_D, BLOCK_E, CAPPED, PRECISION,
        )  # fmt: skip
    else:
        first = tl.maximum(tl.where(window > 0, length + 1 - window, 0), 0)
        oldest = tl.where(window > 0, length + path - window, 0)
        share = tl.cdiv(tl.cdiv(length - first, cuts), BLOCK_S) * BLOCK_S
        begin = first + cut * share
        end = tl.minimum(begin + share, length)
        for start in range(begin, end, BLOCK_S):
            position = start + tl.arange(0, BLOCK_S)
            seen = (position < end)[None, :] & (position[None, :] >= oldest[:, None])
            mixed, top, total = fold(
                query, keys, values, position % S, seen, mixed, top, total, scale, cap, key_stride, value_stride,
                D, E, BLOCK_D, BLOCK_E, CAPPED, PRECISION,
            )  # fmt: skip
    e = tl.arange(0, BLOCK_E)
    at = (of_head * (cuts + 1) + cut).to(tl.int64) * N * GROUP + row
    tl.store(tops + at, top, mask=real)
    tl.store(totals + at, total, mask=real)
    tl.store(mixes + at[:, None] * E + e[None, :], mixed, mask=real[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=COUNTS["merge_kernel"])
def merge_kernel(
    mixes: tensor,
    tops: tensor,
    totals: tensor,
    sinks: tensor,
    out: tensor,
    cuts: tensor,
    heads: tensor,
    rows: tensor,
    GROUP: constexpr,
    E: constexpr,
    BLOCK_P: constexpr,
    BLOCK_E: constexpr,
    SINKS: constexpr,
) -> None:
    """The pieces of one query become its attention, in `out` [B, N, heads * GROUP, E]."""
    of_head, row = tl.program_id(0) // rows, tl.program_id(0) % rows
    b, head = of_head // heads, of_head % heads * GROUP + row % GROUP
    piece, e = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_E)
    at = (of_head * (cuts + 1) + piece).to(tl.int64) * rows + row
    total = tl.load(totals + at, mask=piece <= cuts, other=0.0)
    top = tl.load(tops + at, mask=total > 0, other=float("-inf"))
    sink = float("-inf")
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
    best = tl.maximum(tl.max(top, 0), sink)
    weight = tl.where(total > 0, tl.exp(top - best), 0.0)
    mass = tl.sum(weight * total, 0) + tl.exp(sink - best)
    used = (total > 0)[:, None] & (e < E)[None, :]
    mixed = tl.sum(tl.load(mixes + at[:, None] * E + e[None, :], mask=used, other=0.0) * weight[:, None], 0)
    to = ((b * (rows // GROUP) + row // GROUP) * heads * GROUP + head).to(tl.int64) * E
    tl.store(out + to + e, (mixed / mass).to(out.dtype.element_ty), mask=e < E)


@triton.jit(do_not_specialize=COUNTS["write_kernel"])
def write_kernel(
    store: tensor,
    new: tensor,
    slots: tensor,
    N: tensor,
    store_batch: tensor,
    store_head: tensor,
    store_slot: tensor,
    new_batch: tensor,
    new_head: tensor,
    new_node: tensor,
    D: constexpr,
    BLOCK_D: constexpr,
) -> None:
    """One node's key or value of one head goes to its slot."""
    b, n = tl.program_id(0) // N, tl.program_id(0) % N
    head, d = tl.program_id(1), tl.arange(0, BLOCK_D)
    slot = tl.load(slots + tl.program_id(0))
    row = tl.load(new + b.to(tl.int64) * new_batch + head * new_head + n * new_node + d, mask=d < D)
    place = b.to(tl.int64) * store_batch + head.to(tl.int64) * store_head + slot * store_slot
    tl.store(store + place + d, row, mask=d < D)


@triton.jit(do_not_specialize=COUNTS["move_kernel"])
def move_kernel(
    pointers: tensor,
    length: tensor,
    path: tensor,
    count: tensor,
    N: tensor,
    S: tensor,
    heads: tensor,
    WORDS: constexpr,
    BLOCK_N: constexpr,
    BLOCK_W: constexpr,
) -> None:
    """The accepted nodes of one head in one store come to the front: all are read before any is written."""
    b = tl.program_id(1) // heads
    store = tl.load(pointers + tl.program_id(0)).to(tl.pointer_type(tl.int16))
    store += tl.program_id(1).to(tl.int64) * S * WORDS
    i, start = tl.arange(0, BLOCK_N), tl.load(length + b)
    kept = i < tl.load(count + b)
    source = (start + tl.load(path + b * N + i, mask=i < N, other=0)) % S
    goal = (start + i) % S
    for first in range(0, WORDS, BLOCK_W):
        w = first + tl.arange(0, BLOCK_W)
        used = kept[:, None] & (w < WORDS)[None, :]
        rows = tl.load(store + source[:, None] * WORDS + w[None, :], mask=used)
        tl.debug_barrier()  # a row may be the source of one node and the goal of another
        tl.store(store + goal[:, None] * WORDS + w[None, :], rows, mask=used)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, plan: Tensor, scale: float, cap: float, sinks: Tensor | None
) -> Tensor:
    """[B, N, H, E]: what `operators.attend` says, of float32 and halves; others go there."""
    B, H, N, D = query.shape
    K, S, E = keys.shape[1], keys.shape[2], values.shape[3]
    if query.dtype not in DTYPES or N * query.element_size() > WIDEST:
        return operators.attend(query, keys, values, plan, scale, cap, sinks)
    query, plan, G = aligned(query), plan.contiguous(), H // K
    block_d, block_e = (max(16, triton.next_power_of_2(size)) for size in (D, E))
    block_m = min(TILE if max(block_d, block_e) <= 128 else TILE // 2, max(16, triton.next_power_of_2(G * N)))
    block_s = max(16, min(64, 32768 // (max(block_d, block_e) * query.element_size())))
    tiles = triton.cdiv(G * N, block_m)
    cuts = min(PIECES, triton.cdiv(2 * processors(query.device), B * K * tiles), triton.cdiv(S, block_s))
    mixes = query.new_empty((B * K, cuts + 1, G * N, E), dtype=torch.float32)
    tops, totals = (query.new_empty((B * K, cuts + 1, G * N), dtype=torch.float32) for _ in range(2))
    piece_kernel[(tiles, B * K, cuts + 1)](
        query, keys, values, plan, mixes, tops, totals, scale, cap, cuts, K, N, S,
        *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        GROUP=G, D=D, E=E, BLOCK_M=block_m, BLOCK_S=block_s,
        BLOCK_N=max(16, triton.next_power_of_2(N)), BLOCK_D=block_d, BLOCK_E=block_e,
        CAPPED=cap > 0, PRECISION="tf32x3", num_warps=4, num_stages=2,
    )  # fmt: skip
    out = query.new_empty((B, N, H, E))
    merge_kernel[(B * K * G * N,)](
        mixes, tops, totals, tops if sinks is None else sinks, out, cuts, K, G * N,
        GROUP=G, E=E, BLOCK_P=triton.next_power_of_2(cuts + 1), BLOCK_E=block_e, SINKS=sinks is not None,
    )  # fmt: skip
    return out


def write(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, slot: Tensor) -> None:
    """What `operators.write` does."""
    B, N = slot.shape
    slots = slot.contiguous()
    for store, new in ((keys, aligned(new_keys)), (values, aligned(new_values))):
        D = store.shape[3]
        write_kernel[(B * N, store.shape[1])](
            store, new, slots, N, *store.stride()[:3], *new.stride()[:3], D=D, BLOCK_D=triton.next_power_of_2(D)
        )


def move(pointers: Tensor, like: Tensor, length: Tensor, path: Tensor, count: Tensor) -> None:
    """In every store, node `path[b, i]` behind `length[b]` comes to place i, for i below `count[b]`.

    pointers  [P] int64, the addresses of stores as large as `like` [B, K, S, D], contiguous
    length, count [B] int64, path [B, N] int64
    """
    B, K, S, D = like.shape
    words, N = D * like.element_size() // 2, path.shape[1]
    block_n = triton.next_power_of_2(N)
    move_kernel[(len(pointers), B * K)](
        pointers, length, path.contiguous(), count, N, S, K,
        WORDS=words, BLOCK_N=block_n, BLOCK_W=min(triton.next_power_of_2(words), max(32, 8192 // block_n)),
    )  # fmt: skip


def aligned(x: Tensor) -> Tensor:
    """The same values [B, K, N, D], each row's together."""
    return x if x.stride(3) == 1 else x.contiguous()


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; a few where kernels are only interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
