"""Memory of fixed addresses that a captured step reads and writes: slots lent to one cache at a time, and terms."""

from dataclasses import dataclass, replace
from weakref import ref

import torch
from torch import Tensor

from foretoken.advance import Terms
from foretoken.cache import SlotCache, SlotLayer, require_memory
from foretoken.sampling import Sampler

ENDS = 4
"""End tokens of a row are padded to a multiple of so many."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of one layer's store: heads, slots, sizes of a key and of a value."""

    heads: int
    size: int
    key: int
    value: int
    dtype: torch.dtype

    @staticmethod
    def of(layer: SlotLayer) -> "Shape | None":
        """Of a layer that has been written to."""
        if layer.keys is None or layer.values is None:
            return None
        return Shape(layer.heads, layer.size, layer.keys.shape[1], layer.values.shape[1], layer.keys.dtype)

    @property
    def nbytes(self) -> int:
        """Of a row."""
        return self.heads * self.size * (self.key + self.value) * self.dtype.itemsize


class Arena:
    """The slots of `batch` rows. Graphs are captured over an arena; caches come and go, and it keeps its address."""

    def __init__(self, shapes: list[Shape], batch: int, device: torch.device) -> None:
        self.shapes, self.batch = shapes, batch
        require_memory(batch * sum(s.nbytes for s in shapes), batch, max(s.size for s in shapes), device)

        def store(shape: Shape, size: int) -> Tensor:
            return torch.zeros(batch * shape.heads * shape.size + 1, size, dtype=shape.dtype, device=device)

        def whole(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int64, device=device)

        self.flat = [(store(s, s.key), store(s, s.value)) for s in shapes]
        self.stores = [
            x[:-1].view(batch, s.heads, s.size, -1) for s, pair in zip(shapes, self.flat, strict=True) for x in pair
        ]
        self.length = whole(batch)
        self.terms = Terms(whole(batch), torch.zeros(batch, 1, 1, device=device), whole(batch), whole(batch, 0))
        self.ends = {0: self.terms.eos}  # by their number: recordings keep the address
        self.limits: list[int] = []  # what the device holds
        self.given: tuple[Tensor, ...] = ()
        self.holder: ref[SlotCache] | None = None
        self.first: Tensor | None = None  # of the holder's stores
        self.lent: Tensor | None = None  # the lengths, as the holder has them
        self.tables = tables(self.stores, device)

    def serves(self, cache: SlotCache) -> bool:
        """Whether nobody else's rows are here."""
        holder = None if self.holder is None else self.holder()
        return holder is None or holder is cache

    def holds(self, cache: SlotCache) -> bool:
        """Whether the rows of `cache` are here and nowhere else."""
        return self.holder is not None and self.holder() is cache and cache.slots[0].keys is self.first

    def seat(self, cache: SlotCache) -> None:
        """Move the rows of `cache` here: what it reads and writes from now on are the arena's first rows."""
        rows = len(cache.lengths)
        for layer, shape, pair in zip(cache.slots, self.shapes, self.flat, strict=True):
            used = rows * shape.heads * shape.size
            if layer.keys is not None and layer.values is not None:
                pair[0][:used], pair[1][:used] = layer.keys[:-1], layer.values[:-1]
            layer.keys, layer.values = (store[: used + 1] for store in pair)  # the next row's first slot is spare
            layer.heads, layer.is_initialized = shape.heads, True
            layer.check = None  # it keeps the cache alive, and the arena would wait for it
        self.first, self.holder, self.given = cache.slots[0].keys, ref(cache), ()
        self.length.zero_()
        self.follow(cache)

    def follow(self, cache: SlotCache) -> None:
        """Take over lengths that the cache was given by others."""
        if cache.length is not self.lent:
            self.length[: len(cache.lengths)].copy_(cache.length)
            self.lent = cache.length = self.length[: len(cache.lengths)]

    def tell(self, sampler: Sampler, limits: list[int], eos: Tensor) -> None:
        """Bring what has changed of the rows' noise, temperature, limits and `eos` [B, E] to the device."""
        rows, ends = eos.shape
        given = (sampler.noise.key, sampler.temperature, eos)
        if not self.given or any(a is not b for a, b in zip(self.given, given, strict=True)):
            padded = -(-ends // ENDS) * ENDS
            if padded not in self.ends:
                self.ends[padded] = self.length.new_empty(self.batch, padded)
            self.terms = replace(self.terms, eos=self.ends[padded])
            self.terms.eos.fill_(-1)[:rows, :ends] = eos
            self.terms.key[:rows], self.terms.temperature[:rows] = given[:2]
            self.given, self.limits = given, []
        if self.limits != limits:
            told = torch.tensor([*limits, *[0] * (self.batch - rows)])
            self.terms.limit.copy_(told.pin_memory() if self.terms.limit.is_cuda else told, non_blocking=True)
            self.limits = limits

    def blank(self) -> None:
        """Let no row emit: a step then commits nothing."""
        self.terms.limit.zero_()
        self.limits = []

    def commit(self, path: Tensor | None, count: Tensor) -> None:
        """Make the first `count[b]` nodes of `path` [B, N] part of row b, on the device; None: of a chain."""
        if path is not None:
            for pointers, stores in self.tables:
                move(pointers, stores, self.length, path, count)
        self.length.add_(count)
        self.terms.limit.sub_(count)


def tables(stores: list[Tensor], device: torch.device) -> list[tuple[Tensor, list[Tensor]]]:
    """The stores [B, K, S, D] of each size, with their addresses as a tensor."""
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for store in stores:
        groups.setdefault(tuple(store.shape), []).append(store)
    return [(torch.tensor([s.data_ptr() for s in same], device=device), same) for same in groups.values()]


def move(pointers: Tensor, stores: list[Tensor], length: Tensor, path: Tensor, count: Tensor) -> None:
    """In each store [B, K, S, D], node `path[b, i]` behind `length[b]` comes to place i, for i below `count[b]`."""
    if stores[0].is_cuda and stores[0].shape[3] * stores[0].element_size() % 2 == 0:
        from foretoken.kernels_triton import move as fast

        fast(pointers, stores[0], length, path, count)
        return
    K, S = stores[0].shape[1:3]
    place = torch.arange(path.shape[1], device=path.device)
    source, goal = ((length[:, None] + x) % S for x in (path, place))
    kept = (place < count[:, None])[:, None, :, None]
    for store in stores:
        at, to = (x[:, None, :, None].expand(-1, K, -1, store.shape[3]) for x in (source, goal))
        store.scatter_(2, to, torch.where(kept, store.gather(2, at), store.gather(2, to)))
