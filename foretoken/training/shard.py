"""Weights, gradients and moments in parts, one per process: each is whole only while it is needed.

The target's layers, and those heads that are such layers, are torch's FSDP2 units: each is a root of its own, gathered
for its forward and for its backward, because heads go backward alone, before the trunk (units that share a context are
expected to go backward together). What is left (embeddings, norms, output heads, small heads) drafters use in ways of
their own, so it is whole during a step and in parts between steps. Gradients are summed, not averaged: losses are
divided by the labels of all processes.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from foretoken.training.processes import Processes


class Sharding:
    """Modules whose parameters the processes hold together; with one process, or unasked, every one holds all."""

    def __init__(
        self, modules: Iterable[nn.Module], blocks: Iterable[type], processes: Processes, wanted: bool
    ) -> None:
        """blocks: the types of module that are gathered one at a time."""
        self._modules, self._processes = list(modules), processes
        self._loose: list[tuple[nn.Parameter, nn.Parameter]] = []  # whole (or empty) in its module; this process's part
        self._parts: dict[int, nn.Parameter] = {}
        self._units: list[tuple[nn.Module, type]] = []  # with the type it had before FSDP changed it
        if wanted and processes.world > 1:
            mesh = init_device_mesh(processes.device.type, (processes.world,))
            self._cut(tuple(blocks), mesh)

    def _cut(self, blocks: tuple[type, ...], mesh: DeviceMesh) -> None:
        units = [m for module in self._modules for m in module.modules() if type(m) in blocks]
        for unit in units:
            self._units.append((unit, type(unit)))
            made = fully_shard(unit, mesh=mesh, reshard_after_forward=True)
            made.set_gradient_divide_factor(1.0)
            made.set_force_sum_reduction_for_comms(True)
        for parameter in (p for module in self._modules for p in module.parameters()):
            if isinstance(parameter, DTensor) or id(parameter) in self._parts:
                continue
            place = Shard(0) if parameter.ndim else Replicate()
            part = distribute_tensor(parameter.detach(), mesh, [place], src_data_rank=None)
            self._parts[id(parameter)] = nn.Parameter(part, requires_grad=parameter.requires_grad)
            self._loose.append((parameter, self._parts[id(parameter)]))
        self._release()

    def part(self, parameter: nn.Parameter) -> nn.Parameter:
        """What the optimiser learns for a module's parameter: this process's part of it."""
        return self._parts.get(id(parameter), parameter)

    @contextmanager
    def whole(self) -> Generator[None]:
        """All that is no layer stands in its module, whole; gradients that it gets go to the parts at the end."""
        for parameter, part in self._loose:
            parameter.data = cast(DTensor, part.detach()).full_tensor()
        try:
            yield
            for parameter, part in self._loose:
                if parameter.grad is not None:
                    part.grad = summed(parameter.grad, cast(DTensor, part))
        finally:
            self._release()

    def _release(self) -> None:
        for parameter, _ in self._loose:
            parameter.grad = None
            parameter.data = parameter.data.new_empty(0)

    def dissolve(self) -> None:
        """Put whole weights into the main process's modules for good, in its host memory; nothing learns after this."""
        main = self._processes.main
        for parameter, part in self._loose:
            full = cast(DTensor, part.detach()).full_tensor()
            parameter.data = full.cpu() if main else parameter.data
        for unit, kind in self._units:
            unit.__class__ = kind
        for place in (m for module in self._modules for m in module.modules()):
            for name, parameter in list(place.named_parameters(recurse=False)):
                if isinstance(parameter, DTensor):
                    full = cast(DTensor, parameter.detach()).full_tensor()
                    if main:
                        setattr(place, name, nn.Parameter(full.cpu(), requires_grad=parameter.requires_grad))


def summed(gradient: Tensor, part: DTensor) -> DTensor:
    """A part's share of the gradients [..] of all processes, summed."""
    return DTensor.from_local(gradient, part.device_mesh, [Partial("sum")]).redistribute(placements=part.placements)


def gathered(value: Any, keep: bool) -> Any:
    """A nested state with every tensor whole and on the host, or None in its place unless `keep`. All must ask."""
    if isinstance(value, Tensor):
        full = value.full_tensor() if isinstance(value, DTensor) else value
        return full.detach().cpu() if keep else None
    if isinstance(value, dict):
        return {k: gathered(v, keep) for k, v in cast(dict[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [gathered(v, keep) for v in cast(list[Any], value)]
    return value


def like(value: Tensor, model: Tensor) -> Tensor:
    """The same part of a whole tensor that `model` is of its own; as it is if that is whole, or of another shape."""
    if not isinstance(model, DTensor) or value.shape != model.shape:
        return value
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)
