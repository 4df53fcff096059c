"""A cache of slots while its model is traced: written in place, and seen by position instead of through masks."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

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

    def plan(self, depth: Tensor, ancestors: Tensor | None, offset: int, *_: object) -> dict[int | None, Tensor]:
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
