"""What a trainable drafter learns: a forest of predictions, each a hidden state, a label offset and a weight.

Training needs to know no more of a method than this, so no line of it branches on one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foretoken.unembed import Unembedding

IGNORED = -100
"""The label of a row that has none."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed text.

    tokens    [B, T] int64
    document  [B, T] int64, which document a token belongs to; -1 is padding
    learn     [B, T] bool, whether the token is a label (in a chat: whether the assistant said it)
    """

    tokens: Tensor
    document: Tensor
    learn: Tensor

    def labels(self, offset: int) -> Tensor:
        """[B, T] int64: row i's label is token i + offset; `IGNORED` beyond its document, in padding, and where the
        token is not to be learnt."""
        T = self.tokens.shape[1]
        if offset >= T:
            return torch.full_like(self.tokens, IGNORED)
        reach = T - offset
        same = (self.document[:, :reach] == self.document[:, offset:]) & (self.document[:, :reach] >= 0)
        known = torch.where(same & self.learn[:, offset:], self.tokens[:, offset:], IGNORED)
        return torch.nn.functional.pad(known, (0, offset), value=IGNORED)


@dataclass(frozen=True, slots=True)
class Stage:
    """One prediction, or a computation that several share.

    name     as metrics show it
    offset   the label of row i is token i + offset (methods differ by one here; the target itself has 1)
    weight   of its loss
    run      input [B, T, F] -> output [B, T, H']: of the target's features, or of the output of the stage it follows
    unembed  its output head; None: it predicts nothing itself
    ready    output [B, T, H'] -> hidden [B, T, H], as the output head takes it (None: as it is)
    then     stages that read its output
    """

    name: str
    offset: int
    weight: float
    run: Callable[[Tensor], Tensor]
    unembed: Unembedding | None
    ready: Callable[[Tensor], Tensor] | None = None
    then: Sequence["Stage"] = ()

    def labels(self, batch: Batch) -> Tensor:
        """[B, T] int64: the row of its output head that scores each label; `IGNORED` where none does."""
        labels = batch.labels(self.offset)
        return labels if self.unembed is None else self.unembed.rows_of(labels, IGNORED)


def predictions(forest: Sequence[Stage]) -> list[Stage]:
    """Every stage of a forest that predicts, each before those that follow it."""
    found = [stage for root in forest for stage in (root, *predictions(root.then))]
    return [stage for stage in found if stage.unembed is not None]
