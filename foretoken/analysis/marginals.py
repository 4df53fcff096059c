"""What a law p^ that was summed over the tokens between is worth: overlaps and information.

Depth k is the token x_{t+k} behind a text x_<=t. The marginal of depth k is

    p(x_{t+k} | x_<=t) = sum over x_{t+1..t+k-1} of p(x_{t+1} | x_<=t) ... p(x_{t+k} | x_<t+k)

(Mehra et al. 2025, arXiv:2502.09419). Cut to paths of mass m it lacks exactly 1 - m of the whole in L1, and divided by
m it is at most 1 - m away from it in total variation.
"""

import torch
from torch import Tensor


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """[n]: sum of min(p, q) over laws [n, V], the chance that a guess drawn from q is accepted (arXiv:2211.17192)."""
    return torch.minimum(p, q).sum(-1)


def entropy(law: Tensor) -> Tensor:
    """[...]: in nats, of laws [..., V]."""
    return -torch.xlogy(law, law).sum(-1)


def information(total: Tensor, mass: Tensor, entropies: Tensor) -> Tensor:
    """[n]: I(x_{t+1}; x_{t+2} | x_<=t) in nats, of the law that is cut to the kept x_{t+1} and divided by their mass.

    total      [n, V], sum of p(x_{t+1}) p(. | x_{t+1}) over the kept ones
    mass       [n], sum of p(x_{t+1})
    entropies  [n], sum of p(x_{t+1}) H(p(. | x_{t+1}))
    """
    return (entropy(total / mass[:, None]) - entropies / mass).clamp(min=0)
