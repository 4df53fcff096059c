"""The target's keys and values in numbered slots: rows of different length, trees at their end, paths committed.

Row b has `length[b]` committed tokens. The nodes of a draft are written behind them, node i at slot `length[b] + i`; a
mask lets each node see the committed slots and its ancestors. Committing moves the accepted path to the front of the
nodes and counts it. A sliding layer keeps only as many slots as its window and one draft need, used as a ring: token
position p lives at slot p mod size, in every layer.
"""

from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from foretoken.errors import UserError

Count = list[int] | Tensor
"""Tokens of each row: on the host, or [B] int64 while a trace is made (`planned.PlannedCache`)."""


def plus(count: Count, more: int) -> Count:
    """So many more of each row."""
    return count + more if isinstance(count, Tensor) else [n + more for n in count]


BUCKET = 16
"""Attention reads a multiple of this many slots, not all of the capacity."""


class Slots:
    """Where tokens lie in layers of one size: `slot` [B, n], `size` itself for those that are not to be kept."""

    def __init__(self, position: Tensor, size: int, keep: Tensor | None = None) -> None:
        """Of `position` [B, n], those where `keep` [B, n] is True (None: all)."""
        slot = position % size
        self.slot, self.size, self.spare = (
            slot if keep is None else torch.where(keep, slot, size),
            size,
            keep is not None,
        )
        self._flat: dict[int, Tensor] = {}

    def flat(self, heads: int) -> Tensor:
        """[B * heads * n] rows of a layer's store, made once for all layers of as many heads."""
        if heads not in self._flat:
            B = len(self.slot)
            first = torch.arange(0, B * heads * self.size, self.size, device=self.slot.device).view(B, heads, 1)
            row = first + self.slot[:, None]
            if self.spare:
                row = torch.where(self.slot[:, None] < self.size, row, B * heads * self.size)
            self._flat[heads] = row.flatten()
        return self._flat[heads]


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, stored [B * heads * size + 1, D]; the last row takes what nobody will read.

    A head's slots lie together, so that attention reads memory in order.
    """

    is_sliding = False

    def __init__(self, size: int, window: int | None, check: Callable[[int], None] | None = None) -> None:
        super().__init__()
        self.size, self.window, self.check = size, window, check
        self.heads = 0
        self.write: Slots | None = None  # of the nodes in flight
        self.visible = 0  # slots that attention reads; 0: only the nodes themselves

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        B, self.heads = key_states.shape[:2]
        if self.check is not None:
            per_slot = sum(x.shape[1] * x.shape[3] * x.element_size() for x in (key_states, value_states))
            self.check(B * per_slot)
        self.keys, self.values = (
            torch.zeros(B * self.heads * self.size + 1, x.shape[3], dtype=x.dtype, device=x.device)
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def blank(self, like: "SlotLayer", batch: int) -> None:
        """Allocate `batch` empty rows shaped like another's, unless there are rows already."""
        if self.keys is None and like.keys is not None and like.values is not None:
            shapes = [store.new_empty(batch, like.heads, 0, store.shape[1]) for store in (like.keys, like.values)]
            self.lazy_initialization(*shapes)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, heads, N, D] keys and values; return those that the nodes may see, [B, heads, slots, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None and self.write is not None
        index = self.write.flat(self.heads)
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            store.index_copy_(0, index, new.flatten(0, 2))
        if self.visible == 0:
            return key_states, value_states
        return self.rows(self.keys)[:, :, : self.visible], self.rows(self.values)[:, :, : self.visible]

    def rows(self, store: Tensor) -> Tensor:
        """[B, heads, size, D] view of the slots."""
        return store[:-1].unflatten(0, (-1, self.heads, self.size))

    def move(self, source: Slots, target: Slots) -> None:
        """Copy slots to slots in every row."""
        if self.keys is not None and self.values is not None:
            read, write = source.flat(self.heads), target.flat(self.heads)
            for store in (self.keys, self.values):
                store.index_copy_(0, write, store.index_select(0, read))

    def regroup(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Replace the rows [B, heads, size, D] by `pick` of them."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (with_spare(pick(self.rows(store))) for store in (self.keys, self.values))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # asked only where no mask is given: a prompt's first chunk

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.size

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.keys, self.values) if x is not None)


def with_spare(rows: Tensor) -> Tensor:
    """[B * heads * size + 1, D] from rows [B, heads, size, D]."""
    flat = rows.flatten(0, 2)
    return torch.cat([flat, flat.new_zeros(1, flat.shape[1])])


class SlotCache(Cache):
    """The cache of B rows and `capacity` tokens, one layer per entry of `windows` (None: full attention)."""

    def __init__(
        self, batch: int, capacity: int, windows: list[int | None], reserve: int, device: torch.device
    ) -> None:
        """`reserve`: the most nodes that one forward writes; a sliding layer has that many slots beside its window."""
        sizes = [capacity if w is None else min(capacity, w - 1 + reserve) for w in windows]
        slots = self.slots_per_row = sum(sizes)

        def check(bytes_per_slot: int) -> None:
            require_memory(bytes_per_slot * slots, batch, capacity, device)

        layers = [
            SlotLayer(s, w, check if i == 0 else None) for i, (s, w) in enumerate(zip(sizes, windows, strict=True))
        ]
        super().__init__(layers=list(layers))
        self.slots: list[SlotLayer] = layers
        self.capacity, self.reserve, self.windows = capacity, reserve, windows
        self.length = torch.zeros(batch, dtype=torch.int64, device=device)  # committed tokens of each row
        self.lengths = [0] * batch  # the same on the host
        self._stores: list[Tensor] = []

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def begun(self) -> list[bool]:
        """Per row, whether it holds anything."""
        return [length > 0 for length in self.lengths]

    @property
    def stores(self) -> list[Tensor]:
        """The slots [B, heads, size, D] of each layer's keys and values, in turn; they are there after a prompt."""
        if not self._stores:
            held = [(layer, store) for layer in self.slots for store in (layer.keys, layer.values)]
            self._stores = [layer.rows(store) for layer, store in held if store is not None]
        return self._stores

    def blank(self, like: "SlotCache") -> None:
        """Allocate what the first tokens would, shaped like the layers of another cache."""
        for mine, theirs in zip(self.slots, like.slots, strict=True):
            mine.blank(theirs, len(self.lengths))

    def require_room(self, nodes: int) -> None:
        """`UserError` unless every row has so many slots left."""
        if self.longest + nodes > self.capacity:
            raise UserError(
                f"The cache holds {self.capacity} tokens and {self.longest + nodes} are needed; ask for more capacity."
            )

    def plan(
        self,
        depth: Tensor,
        ancestors: Tensor | None,
        offset: int,
        dtype: torch.dtype,
        count: list[int] | None = None,
    ) -> dict[int | None, Tensor] | None:
        """Prepare every layer for nodes `offset .. offset + n - 1`; return the additive mask of each window.

        depth      [B, n] int64, distance of each node to the first uncommitted position
        ancestors  [B, n, offset + n] bool, the nodes that each sees; None: a chain, each node sees all before it
        count      per row, how many of the n nodes are to be stored, the others being padding (None: all)
        returns    window -> [B, 1, n, slots] of 0 and the lowest value of `dtype`; None for a chain in an empty cache,
                   which the model's own causal path reads
        """
        n = depth.shape[1]
        counts = [n] * len(self.lengths) if count is None else count
        needed = max(length + offset + c for length, c in zip(self.lengths, counts, strict=True))
        self.require_room(needed - self.longest)
        step = torch.arange(n, device=depth.device)
        node = self.length[:, None] + offset + step
        real = torch.tensor(counts, device=depth.device)[:, None]
        keep = None if count is None else step < real
        causal = ancestors is None and self.longest == 0 and offset == 0
        masks: dict[int | None, Tensor] = {}
        writes: dict[int, Slots] = {}
        for layer in self.slots:
            if layer.size not in writes:
                writes[layer.size] = Slots(node, layer.size, keep)
            layer.write = writes[layer.size]
            layer.visible = 0
            if not causal:
                layer.visible = min(layer.size, -(-needed // BUCKET) * BUCKET)
                if layer.window not in masks:
                    seen = self.seen(depth, ancestors, layer, offset + real)
                    zero = torch.zeros((), dtype=dtype, device=depth.device)
                    masks[layer.window] = torch.where(seen, zero, torch.finfo(dtype).min)[:, None]
        return None if causal else masks

    def seen(self, depth: Tensor, ancestors: Tensor | None, layer: SlotLayer, real: Tensor) -> Tensor:
        """[B, n, slots] bool: which slots each node attends to; `real` [B, 1] nodes of each row are stored."""
        slot = torch.arange(layer.visible, device=depth.device)
        if ancestors is None and layer.window is None:
            return slot <= (self.length[:, None] + depth)[..., None]
        if ancestors is None:
            ancestors = depth[:, None] <= depth[..., None]
        M = ancestors.shape[2]
        ahead = (slot - self.length[:, None]) % layer.size  # [B, slots]: node number, or committed behind the nodes
        age = layer.size - ahead  # of a committed slot: distance to the first uncommitted position
        committed = ((ahead >= real) & (age <= self.length[:, None]))[:, None]  # [B, 1, slots]
        if layer.window is not None:
            committed = committed & (age[:, None] + depth[..., None] < layer.window)
            ancestors = ancestors & (ancestors.flip(-1).cumsum(-1).flip(-1) <= layer.window)
        index = ahead.clamp(max=M - 1)[:, None].expand(-1, depth.shape[1], -1)
        return torch.where((ahead < real)[:, None], ancestors.gather(2, index), committed)

    def commit(self, path: Tensor | None, count: Count) -> None:
        """Make the first `count[b]` nodes of `path` [B, n] part of row b; None: of the chain 0, 1, 2, ..."""
        if path is not None:
            step = torch.arange(path.shape[1], device=path.device)
            keep = step < torch.as_tensor(count, device=path.device)[:, None]
            moves: dict[int, tuple[Slots, Slots]] = {}
            for layer in self.slots:
                if layer.size not in moves:
                    source = Slots(self.length[:, None] + path, layer.size)
                    moves[layer.size] = source, Slots(self.length[:, None] + step, layer.size, keep)
                layer.move(*moves[layer.size])
        self.resize([a + int(b) for a, b in zip(self.lengths, count, strict=True)])

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens of every row."""
        self.resize([n - count for n in self.lengths])

    def resize(self, lengths: list[int], length: Tensor | None = None) -> None:
        """Say how many tokens each row holds; `length` [B] says the same, if it is there already."""
        if length is None:
            length = torch.tensor(lengths, dtype=torch.int64, device=self.length.device)
        self.lengths, self.length = lengths, length

    def select(self, rows: list[int]) -> None:
        index = torch.tensor(rows, dtype=torch.int64, device=self.length.device)
        self._stores = []
        for layer in self.slots:
            layer.regroup(lambda x: x[index])
        self.resize([self.lengths[i] for i in rows])

    def join(self, other: "SlotCache") -> None:
        """Append the rows of `other`, a cache of the same layers and capacity."""
        self._stores = []
        for mine, theirs in zip(self.slots, other.slots, strict=True):
            assert mine.size == theirs.size
            if theirs.keys is not None:
                mine.blank(theirs, len(self.lengths))
            if mine.keys is not None:
                theirs.blank(mine, len(other.lengths))
                more = iter(theirs.rows(store) for store in (theirs.keys, theirs.values) if store is not None)
                mine.regroup(lambda x, more=more: torch.cat([x, next(more)]))
        self.resize(self.lengths + other.lengths)

    def first(self, layers: int) -> "SlotCache":
        """A view of the first layers: the same stores, to be written by a drafter that is part of the target."""
        view = SlotCache(0, self.capacity, [], self.reserve, self.length.device)
        view.layers = self.layers[:layers]
        view.slots = self.slots[:layers]
        view.length, view.lengths = self.length, self.lengths
        return view

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.slots)


def require_memory(needed: int, batch: int, capacity: int, device: torch.device) -> None:
    """`UserError` unless `needed` bytes are free on the device."""
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"A batch of {batch} rows of {capacity} tokens needs {needed / 2**30:.1f} GiB of cache and "
            f"{free / 2**30:.1f} GiB are free; use a smaller batch or fewer new tokens."
        )
