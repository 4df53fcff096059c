"""Optimisers and learning rates: heads and target apart, matrices by Muon if asked, rates a function of the step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from foretoken.training.recipe import Optimizer

EMBEDDINGS = ("embed", "lm_head", "wte", "wpe", "outputs", "unembed")
"""Parts of the names of matrices that are rows per token or place, for which Muon is not made."""


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters with one learning rate: `ratio` of the peak; `late` ones join after `heads_first` steps."""

    named: list[tuple[str, nn.Parameter]]
    ratio: float
    late: bool


def factor(step: int, steps: int, warmup: int, floor: float) -> float:
    """The learning rate of `step` (0-based) over its peak: a linear rise, then a cosine down to `floor`."""
    if step < 0:
        return 0.0
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


class Optimizers:
    """One or two torch optimisers stepped together."""

    def __init__(self, groups: Iterable[Group], settings: Optimizer, steps: int) -> None:
        self.settings, self.steps = settings, steps
        plain: list[dict[str, Any]] = []
        orthogonal: list[dict[str, Any]] = []
        for group in groups:
            shared = {"ratio": group.ratio, "late": group.late}
            for kind, members in parted(group.named, settings.name == "muon").items():
                decay = 0.0 if kind == "vector" else settings.weight_decay
                entry = {"params": members, "weight_decay": decay, **shared}
                (orthogonal if kind == "muon" else plain).append(entry)
        self.all: list[torch.optim.Optimizer] = []
        if plain:
            self.all.append(torch.optim.AdamW(plain, lr=settings.lr, betas=settings.betas))
        if orthogonal:
            self.all.append(torch.optim.Muon(orthogonal, lr=settings.lr, adjust_lr_fn="match_rms_adamw"))
        self.parameters: list[nn.Parameter] = [p for o in self.all for g in o.param_groups for p in g["params"]]

    def step(self, step: int) -> float:
        """Clip, apply and clear the gradients; their norm before clipping. Nothing changes if it is not finite."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = norm_of(gradients)
        if math.isfinite(norm):
            if 0 < self.settings.clip < norm:
                scale(gradients, self.settings.clip / norm)
            self.rate(step)
            for optimizer in self.all:
                optimizer.step()
        for optimizer in self.all:
            optimizer.zero_grad()
        return norm

    def rate(self, step: int) -> None:
        """Set every group's learning rate to that of `step`."""
        s = self.settings
        for group in (g for optimizer in self.all for g in optimizer.param_groups):
            behind = s.heads_first if group["late"] else 0
            group["lr"] = s.lr * group["ratio"] * factor(step - behind, self.steps - behind, s.warmup, s.floor)

    def lr(self, step: int) -> float:
        """The heads' learning rate at `step`."""
        return self.settings.lr * factor(step, self.steps, self.settings.warmup, self.settings.floor)


def parted(named: Iterable[tuple[str, nn.Parameter]], muon: bool) -> dict[str, list[nn.Parameter]]:
    """Parameters by how they are learnt: "muon", "matrix" and "vector"."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named:
        kind = "matrix" if parameter.ndim > 1 else "vector"
        if muon and parameter.ndim == 2 and not any(part in name for part in EMBEDDINGS):
            kind = "muon"
        found.setdefault(kind, []).append(parameter)
    return found


def norm_of(gradients: list[Tensor]) -> float:
    """The Euclidean norm of all gradients together; of sharded ones, of the whole."""
    parts = [[g for g in gradients if isinstance(g, DTensor) == sharded] for sharded in (True, False)]
    norms = [whole(torch.nn.utils.get_total_norm(part)) for part in parts if part]
    return math.hypot(*(float(norm) for norm in norms)) if norms else 0.0


def scale(gradients: list[Tensor], by: float) -> None:
    """Multiply gradients in place."""
    for gradient in gradients:
        gradient.mul_(by)


def whole(tensor: Tensor) -> Tensor:
    """The tensor that the processes hold parts of; itself if this one holds all. Every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def finite(tensor: Tensor) -> bool:
    """Whether this process's part of a tensor has no value that is infinite or not a number."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(torch.isfinite(local).all())
