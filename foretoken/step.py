"""What a step leaves for the drafter, rows first."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """What was committed and emitted; the fields are those of `drafter.Feed`."""

    tokens: Tensor
    count: list[int]
    features: Tensor | None
    root: Tensor
    emitted: Tensor
    last: Tensor

    def select(self, rows: list[int]) -> "Step":
        i = torch.tensor(rows, dtype=torch.int64, device=self.root.device)
        features = None if self.features is None else self.features[i]
        count = [self.count[row] for row in rows]
        return Step(self.tokens[i], count, features, self.root[i], self.emitted[i], self.last[i])

    def join(self, other: "Step") -> "Step":
        features = None
        if self.features is not None and other.features is not None:
            features = stacked(self.features, other.features)
        return Step(
            stacked(self.tokens, other.tokens),
            self.count + other.count,
            features,
            torch.cat([self.root, other.root]),
            stacked(self.emitted, other.emitted),
            torch.cat([self.last, other.last]),
        )


def stacked(a: Tensor, b: Tensor) -> Tensor:
    """[Ba + Bb, M, ...] of a [Ba, Ma, ...] and b [Bb, Mb, ...], the shorter padded with zeros behind."""
    out = a.new_zeros(len(a) + len(b), max(a.shape[1], b.shape[1]), *a.shape[2:])
    out[: len(a), : a.shape[1]], out[len(a) :, : b.shape[1]] = a, b
    return out
