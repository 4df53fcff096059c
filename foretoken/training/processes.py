"""The processes of a run, one per device, as `accelerate launch` starts them; otherwise there is one."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce
from torch.distributed.tensor import DTensor

from foretoken.errors import UserError

try:
    from accelerate import PartialState
except ImportError as error:
    raise UserError("Training needs accelerate, which is not installed; run `pip install foretoken[train]`.") from error

BUCKET = 32 * 2**20
"""Bytes of gradients that are summed in one go."""


class Processes:
    """Who takes part in a run, and sums over all of them."""

    def __init__(self) -> None:
        cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.cuda.is_available()
        self._state = PartialState(cpu=cpu)
        self.device: torch.device = torch.device(self._state.device)  # pyright: ignore[reportArgumentType]
        self.rank, self.world = int(self._state.process_index), int(self._state.num_processes)

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when all processes are here."""
        self._state.wait_for_everyone()

    def added(self, values: Sequence[float]) -> list[float]:
        """Numbers summed over processes."""
        if self.world == 1 or not values:
            return list(values)
        vector = torch.tensor(values, dtype=torch.float64, device=self.device)
        all_reduce(vector)
        return vector.tolist()

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients over processes, where any has one; sharded parameters' are summed already."""
        if self.world == 1:
            return
        whole = [p for p in parameters if not isinstance(p, DTensor)]
        reached = self.added([float(p.grad is not None) for p in whole])
        gradients: list[Tensor] = []
        for parameter, count in zip(whole, reached, strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if count and parameter.grad is not None:
                gradients.append(parameter.grad)
        for bucket in buckets(gradients):
            together = torch.cat([g.flatten() for g in bucket])
            all_reduce(together)
            for gradient, part in zip(bucket, together.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))


def buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors in their order, grouped by dtype into at most `BUCKET` bytes (a larger one alone)."""
    found: list[list[Tensor]] = []
    last: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        bucket = last.get(tensor.dtype, [])
        if not bucket or sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET:
            bucket = last[tensor.dtype] = []
            found.append(bucket)
        bucket.append(tensor)
    return found
