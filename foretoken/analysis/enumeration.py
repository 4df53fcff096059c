"""Exact expectations for toy models, by enumeration of everything that can happen.

A toy model is a list of laws: `laws[i]` [V, ..., V] (i + 1 axes) holds the law of token i + 1, on the last axis, behind
every prefix of i tokens. p is the target's, q the drafter's. The vocabulary and the depth must be tiny: V^(depth + 1)
numbers. No acceptance is assumed to be independent of anything.

Functions named `survival` return P(the first i guesses are accepted) for i = 1, 2, ...; A is their sum and tokens per
forward (τ) 1 more.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

Laws = Sequence[Tensor]


def toy(vocab: int, depth: int, seed: int, spread: float = 1.0) -> list[Tensor]:
    """Laws of `depth` tokens whose logits are normal, of deviation `spread`; float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(vocab,) * (i + 1) for i in range(depth)]
    return [(spread * torch.randn(s, generator=generator, dtype=torch.float64)).softmax(-1) for s in shapes]


def joint(laws: Laws) -> Tensor:
    """[V, ..., V]: the probability of every sequence of as many tokens as there are laws."""
    found = torch.ones((), dtype=torch.float64)
    for law in laws:
        found = found[..., None] * law
    return found


def overlap(p: Tensor, q: Tensor) -> float:
    """Σ min(p, q) = 1 - TV(p, q): the chance that a guess drawn from q [V] is accepted; no rule for one guess has more.

    Leviathan et al. 2022, arXiv:2211.17192, theorem 3.5.
    """
    return float(torch.minimum(p, q).sum())


# --------------------------------------------------------------------------------------------------------------- chains


def chain_survival(p: Laws, q: Laws) -> list[float]:
    """Of chains drawn from q under token-wise rejection (`rules.Rejection`): Σ_{x_1..x_i} Π_j min(p_j, q_j)."""
    return [float(joint([torch.minimum(a, b) for a, b in zip(p[:i], q[:i], strict=True)]).sum()) for i in depths(q)]


def block_survival(p: Laws, q: Laws) -> list[float]:
    """Of chains drawn from q under block verification (`rules.Block`): E_q[w_i], w_i = min(w_{i-1} p_i / q_i, 1).

    Given the first i guesses, i or more are accepted with probability w_i (Sun et al. 2024, arXiv:2403.10444).
    """
    weight = [torch.ones((), dtype=torch.float64)]
    for a, b in zip(p, q, strict=False):
        weight.append((weight[-1][..., None] * a / b).nan_to_num(nan=0.0).clamp(max=1))
    return [float((joint(q[:i]) * weight[i]).sum()) for i in depths(q)]


def block_gain(p: Laws, q: Laws) -> float:
    """Tokens per forward that block verification yields beyond token-wise rejection; never negative."""
    return sum(block_survival(p, q)) - sum(chain_survival(p, q))


def depths(q: Laws) -> range:
    return range(1, len(q) + 1)


# ---------------------------------------------------------------------------------------------------------------- trees


def sibling_chances(p: Tensor, q: Tensor, count: int) -> Tensor:
    """[count, V]: the probability that the n-th of `count` children is the one accepted and is token x.

    Children are drawn from q [V] without replacement and tried in order: rejection leaves p <- norm(max(p - q, 0)) and
    takes the token out of q (`rules.Rejection`). Where q can draw no more, the rest stay undrawn.
    """
    found = torch.zeros(count, len(p), dtype=torch.float64)
    if count == 0 or float(q.sum()) <= 0:
        return found
    found[0] = torch.minimum(p, q)
    left = (p - q).clamp(min=0)
    if count > 1 and float(left.sum()) > 0:
        refused = (q - p).clamp(min=0)
        for x in refused.nonzero().flatten().tolist():
            fewer = q.clone()
            fewer[x] = 0
            fewer = fewer / fewer.sum() if float(fewer.sum()) > 1e-12 else torch.zeros_like(q)
            found[1:] += refused[x] * sibling_chances(left / left.sum(), fewer, count - 1)
    return found


def sampled_tree_tokens(parent: Sequence[int], p: Laws, q: Laws) -> float:
    """Tokens per forward of the tree `parent` [N] (root -1) whose siblings are drawn from q without replacement."""
    children = {n: [m for m in range(1, len(parent)) if parent[m] == n] for n in range(len(parent))}

    def below(node: int, prefix: tuple[int, ...]) -> float:
        """Expected accepted guesses below an accepted node."""
        mine, depth = children[node], len(prefix)
        if not mine:
            return 0.0
        chances = sibling_chances(p[depth][prefix], q[depth][prefix], len(mine))
        every = itertools.product(range(len(mine)), range(chances.shape[1]))
        return sum(float(chances[n, x]) * (1 + below(mine[n], (*prefix, x))) for n, x in every if chances[n, x] > 0)

    return 1 + below(0, ())


def certain_tree_tokens(parent: Sequence[int], tokens: Sequence[int], p: Laws) -> float:
    """Tokens per forward of a tree of distinct fixed guesses: 1 + the sum over nodes of p's probability of their paths.

    Under `match`, and under rejection of guesses without a law, alike (arXiv:2401.15077's rule at temperature 1).
    """
    total, path = 1.0, dict[int, tuple[int, ...]]({0: ()})
    for node in range(1, len(parent)):
        path[node] = (*path[parent[node]], tokens[node])
        total += float(joint(p[: len(path[node])])[path[node]])
    return total


# ---------------------------------------------------------------------------------------------------- independent heads


def head_overlap(weight: Tensor, laws: Tensor, q: Tensor) -> float:
    """β = E_x[Σ min(p(.|x), q)]: the chance that a second guess from q [V], which is told no x, is accepted.

    weight [X] is the law of the token before it, which was accepted, laws [X, V] what follows each.
    """
    return float((weight * torch.minimum(laws, q).sum(-1)).sum())


def best_head(weight: Tensor, laws: Tensor) -> Tensor:
    """[V]: the law q of largest `head_overlap`: the ceiling of every head that is not told the guess before it.

    For each token y the overlap is concave and piecewise linear in q(y): its slope is the weight of those x whose
    p(y|x) exceeds q(y). So mass goes where the slope is largest until it is spent. The marginal Σ weight p(.|x) is best
    in KL, not in overlap.
    """
    pieces: list[tuple[float, float, int]] = []  # (slope, length, token)
    for y in range(laws.shape[1]):
        order = laws[:, y].argsort()
        steps = laws[order, y].diff(prepend=torch.zeros(1, dtype=laws.dtype))
        slopes = weight[order].flip(0).cumsum(0).flip(0)
        pieces += [(float(s), float(n), y) for s, n in zip(slopes, steps, strict=True) if n > 0]
    q, left = torch.zeros(laws.shape[1], dtype=laws.dtype), 1.0
    for _, length, y in sorted(pieces, reverse=True):
        q[y] += min(length, left)
        left -= min(length, left)
    return q


def information(weight: Tensor, laws: Tensor) -> float:
    """I(x; y) in nats, of x ~ weight [X] and y ~ laws [X, V]."""
    marginal = weight @ laws
    return float((weight[:, None] * (torch.xlogy(laws, laws) - torch.xlogy(laws, marginal))).sum())


def head_floor(nats: float) -> float:
    """1 - sqrt(I / 2): a head that guesses from the exact marginal is accepted at least so often.

    1 - E[TV(p(.|x), marginal)], TV <= sqrt(KL / 2) (Pinsker), E[KL] = I(x; y), and Jensen.
    """
    return max(0.0, 1 - (nats / 2) ** 0.5)


def marginal(weight: Tensor, laws: Tensor, mass: float = 1.0) -> Tensor:
    """[V]: Σ_x weight(x) p(.|x) over the smallest set of x whose weights reach `mass`; what is left out is not made up.

    Its L1 distance to the whole sum is the weight left out, 1 - mass at most (Mehra et al. 2025, arXiv:2502.09419).
    """
    order = weight.argsort(descending=True)
    before = weight[order].cumsum(0) - weight[order]
    kept = order[before < mass - 1e-12]
    return weight[kept] @ laws[kept]
