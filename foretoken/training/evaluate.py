"""How often each prediction is right, and how many tokens a forward would yield: counted on text, in one pass."""

import torch
from torch import Tensor

from foretoken.objective import IGNORED, Batch, Stage
from foretoken.training.losses import chunks, converted, product, product_dtype
from foretoken.unembed import Unembedding

NOWHERE, LAST = -1, 1 << 30
"""The label of a token that the output head does not score, and its rank."""


class Tally:
    """Sums over labels: loss, and how often the label was first or among the first five; and of whole drafts.

    The target's own prediction counts for itself and is no part of a draft: `own` is its name.
    """

    def __init__(self, own: str) -> None:
        self.own = own
        self.sums: dict[str, Tensor] = {}  # per prediction [4]: loss, first, among five, labels
        self.right: dict[int, Tensor] = {}  # per offset [N] bool: the batch's guesses so far
        self.reach = torch.zeros(0, dtype=torch.float64)  # [D] rows whose first d guesses are all right
        self.rows = 0

    @torch.no_grad()
    def see(self, stage: Stage, hidden: Tensor, batch: Batch) -> None:
        """Count what one prediction says, whose hidden states are [B, T, H]."""
        assert stage.unembed is not None
        labels = stage.unembed.rows_of(batch.labels(stage.offset), NOWHERE).flatten()
        rows = (labels != IGNORED).nonzero()[:, 0]
        loss, rank = judged(hidden.flatten(0, 1)[rows], stage.unembed, labels[rows])
        found = torch.stack([loss.double(), (rank < 1).sum().double(), (rank < 5).sum().double()]).cpu()
        entry = torch.cat([found, torch.tensor([float(len(rows))], dtype=torch.float64)])
        self.sums[stage.name] = self.sums.get(stage.name, torch.zeros(4, dtype=torch.float64)) + entry
        if stage.name != self.own:
            self.right[stage.offset] = torch.zeros_like(labels, dtype=torch.bool).index_copy_(0, rows, rank < 1)

    def close(self, batch: Batch) -> None:
        """Count the batch's drafts, at the rows that have a label of every depth; all its predictions were seen."""
        if not self.right:
            return
        offsets = sorted(self.right)
        known = torch.stack([batch.labels(offset).flatten() != IGNORED for offset in offsets]).all(0)
        held = torch.stack([self.right[offset][known] for offset in offsets]).cumprod(0).sum(1).double().cpu()
        self.reach = held if not len(self.reach) else self.reach + held
        self.rows += int(known.sum())
        self.right = {}

    def vector(self) -> list[float]:
        """All sums in one list, to be added over processes."""
        return [*torch.cat([*self.sums.values(), self.reach]).tolist(), float(self.rows)]

    def result(self, vector: list[float]) -> dict[str, float]:
        """Per prediction loss, top1 and top5; "tokens per forward": 1 + the chances that the first d guesses are right.

        All of it against the text's own tokens, which the target would not always have emitted.
        """
        found: dict[str, float] = {}
        for i, name in enumerate(self.sums):
            loss, first, five, count = vector[4 * i : 4 * i + 4]
            n = max(1.0, count)
            found |= {f"{name}/loss": loss / n, f"{name}/top1": first / n, f"{name}/top5": five / n}
        if vector[-1] > 0:
            found["tokens per forward"] = 1 + sum(vector[4 * len(self.sums) : -1]) / vector[-1]
        return found


def judged(hidden: Tensor, unembed: Unembedding, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of -log q(label), and the rank [N] of each label as argmax would choose: of equal logits the first wins.

    hidden [N, H], labels [N] int64. Among logits that are not numbers a label comes last; one that is `NOWHERE` comes
    last too, and costs nothing.
    """
    head = converted(unembed, product_dtype(hidden, unembed.weight))
    rank, loss = torch.empty_like(labels), torch.zeros((), device=hidden.device)
    place = torch.arange(unembed.vocab, device=hidden.device)
    for at in chunks(len(labels), unembed.vocab):
        logits, label = head.bounded(product(hidden[at], head)), labels[at, None]
        own, scored = logits.gather(1, label.clamp(min=0)), label != NOWHERE
        loss = loss + ((logits.logsumexp(1, keepdim=True) - own) * scored).sum()
        better = unembed.vocab - ((logits < own) | ((logits == own) & (place >= label))).sum(1)
        rank[at] = torch.where(scored[:, 0], better, LAST)
    return loss, rank
