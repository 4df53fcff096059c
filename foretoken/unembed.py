"""The output head as data, so that losses and drafters can apply it without keeping every logit."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from foretoken.errors import UserError

SCALES = {"logit_scale": 1, "output_multiplier_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""Settings by which models multiply (1) or divide (-1) their logits."""


@dataclass(frozen=True, slots=True)
class Unembedding:
    """logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)

    weight   [V, H]
    bias     [V], or None
    scale    multiplies the logits
    softcap  bounds them (None: unbounded)
    tokens   [V] int64, the token that each row scores: a draft vocabulary (None: row v scores token v)
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    tokens: Tensor | None = None

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., V] logits of hidden states [..., H]."""
        return self.bounded(torch.nn.functional.linear(hidden, self.weight, self.bias))

    def over(self, vocab: int, hidden: Tensor) -> Tensor:
        """[..., vocab] logits of hidden states [..., H]; -inf for tokens that have no row."""
        logits = self(hidden)
        if self.tokens is None:
            return logits
        return logits.new_full((*logits.shape[:-1], vocab), -torch.inf).index_copy_(-1, self.tokens, logits)

    def rows_of(self, labels: Tensor, otherwise: int) -> Tensor:
        """The row that scores each of `labels` (int64, any shape; negative ones stay); `otherwise` if none does."""
        if self.tokens is None:
            return labels
        size = max(int(self.tokens.max()), int(labels.max())) + 1
        row = torch.full((size,), otherwise, device=labels.device)
        row[self.tokens] = torch.arange(len(self.tokens), device=labels.device)
        return torch.where(labels < 0, labels, row[labels.clamp(min=0)])

    def limited(self, tokens: Tensor) -> "Unembedding":
        """The rows of these tokens [V'] alone, in this order."""
        bias = None if self.bias is None else self.bias[tokens]
        return replace(self, weight=self.weight[tokens], bias=bias, tokens=tokens)

    def bounded(self, logits: Tensor) -> Tensor:
        """The plain products `logits` [..., V], scaled and bounded."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def unembedding_of(model: PreTrainedModel, config: PreTrainedConfig) -> Unembedding:
    """The output head of `model`; its weights are the model's own, not a copy."""
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise UserError(
            f"The output head of {type(model).__name__} is {type(head).__name__}, not one linear layer, so heads "
            "cannot share it; use another model."
        )
    scale = 1.0
    for name, power in SCALES.items():
        scale *= float(getattr(config, name, None) or 1.0) ** power
    return Unembedding(head.weight, head.bias, scale, getattr(config, "final_logit_softcapping", None))
