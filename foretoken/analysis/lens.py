"""How a layer's law compares with the final one (the logit lens): divergence, entropy, agreement, rank, overlap.

A layer's law is its hidden state through the model's own output head, with or without the final norm in between
(nostalgebraist 2020, "interpreting GPT: the logit lens"; Mehra et al. 2025, arXiv:2502.09419, figures 2 and 5c).
Divergences and entropies are in nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Likeness:
    """A layer's laws beside the final ones, one number per law, [...].

    kl_layer_final  KL(layer || final): what coding the layer's tokens by the final law costs more
    kl_final_layer  KL(final || layer): what coding the final law's tokens by the layer's law costs more
    entropy         of the layer's law
    overlap         sum over tokens of the smaller probability, 1 - total variation: the rate at which a guess drawn
                    from the layer's law is accepted, at temperature 1, by exact rejection sampling
    agrees          bool, whether the likeliest token is the final law's: the same rate at temperature 0
    rank            int64, how many tokens the layer ranks before the one that follows
    """

    kl_layer_final: Tensor
    kl_final_layer: Tensor
    entropy: Tensor
    overlap: Tensor
    agrees: Tensor
    rank: Tensor


MEASURES = tuple(field.name for field in fields(Likeness))


def likeness(layer: Tensor, final: Tensor, following: Tensor) -> Likeness:
    """The laws of logits `layer` [..., V] beside those of logits `final` [..., V]; following [...] int64 comes next.

    Takes some five times the memory of `layer`, in float32 at least.
    """
    ours, theirs = log_law(layer), log_law(final)
    return Likeness(
        kl_layer_final=divergence(ours, theirs),
        kl_final_layer=divergence(theirs, ours),
        entropy=entropy(ours),
        overlap=overlap(ours, theirs),
        agrees=layer.argmax(-1) == final.argmax(-1),
        rank=rank(layer, following),
    )


def log_law(logits: Tensor) -> Tensor:
    """[..., V] log-probabilities of logits [..., V], in float32 or, where the logits are, in float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def divergence(of: Tensor, against: Tensor) -> Tensor:
    """[...] KL(of || against) of log-probabilities [..., V]; what rounding makes negative is 0."""
    return (of.exp() * (of - against)).sum(-1).clamp(min=0)


def entropy(law: Tensor) -> Tensor:
    """[...] entropy of log-probabilities [..., V]."""
    return (law.exp() * -law).sum(-1)


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """[...] 1 - total variation of two laws, given as log-probabilities [..., V]."""
    return torch.minimum(one, other).exp().sum(-1)


def rank(logits: Tensor, token: Tensor) -> Tensor:
    """[...] int64, how many tokens stand before `token` [...] in logits [..., V]; of equals the lower id stands first,
    as in argmax. Half precision has many equals."""
    own = logits.gather(-1, token[..., None])
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return ((logits > own) | ((logits == own) & (ids < token[..., None]))).sum(-1)


def first_of(agrees: Sequence[bool]) -> int:
    """The earliest layer that agrees, over layers from 0 on; the number of layers if none does."""
    return next((layer for layer, same in enumerate(agrees) if same), len(agrees))


def settled_of(agrees: Sequence[bool]) -> int:
    """The earliest layer from which on all agree; the number of layers if the last does not."""
    return next((layer + 1 for layer in range(len(agrees) - 1, -1, -1) if not agrees[layer]), 0)
