"""Which tokens a sum over the next token has to visit: the smallest sets that hold nearly all of a law."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Nucleus:
    """The likeliest tokens of n laws, likeliest first; m are those of the largest set.

    tokens  [..., m] int64
    chance  [..., m], each token's probability; 0 where it is no part of its set
    count   [...] int64, the size of each set
    """

    tokens: Tensor
    chance: Tensor
    count: Tensor


def nucleus(law: Tensor, mass: float, most: int = 0) -> Nucleus:
    """The smallest set of each law [..., V] that holds `mass` of it, at most `most` tokens (0: any number).

    With mass 1 every token that has any probability. Holtzman et al. 2019, arXiv:1904.09751.
    """
    values, tokens = law.topk(min(most, law.shape[-1])) if most else law.sort(-1, descending=True)
    before = values.double().cumsum(-1) - values
    kept = (values > 0) if mass >= 1 else (values > 0) & (before < mass)
    count = kept.sum(-1)
    m = int(count.max()) if count.numel() else 0
    return Nucleus(tokens[..., :m], torch.where(kept, values, 0)[..., :m], count)


def law_of(logits: Tensor) -> Tensor:
    """[..., V] probabilities, in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
