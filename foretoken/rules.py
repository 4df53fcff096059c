"""Which nodes of a draft survive. Every rule has one signature: (draft, scores) -> Accepted.

Exact rules leave the target's law unchanged: `match` for any draft; `rejection` for drafts that carry the law they were
drawn from (and for any others, read as certain guesses); `block` for chains with a law. Lossy rules say so in
their name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from foretoken.errors import UserError, unknown
from foretoken.noise import ACCEPT, RESIDUAL, Noise
from foretoken.sampling import Scores
from foretoken.tree import Accepted, Draft, longest, path_to


class Rule(Protocol):
    name: ClassVar[str]
    exact: ClassVar[bool]
    samples: ClassVar[bool]  # whether drafts must be drawn from a law of their own noise

    def __call__(self, draft: Draft, scores: Scores) -> Accepted: ...


def keep(draft: Draft, fits: Tensor, emitted: Tensor) -> Accepted:
    """The deepest node that fits [B, N] with its ancestors, and what the target emits after it."""
    path, count = longest(draft, fits)
    return Accepted(path, count, emitted.gather(1, path.gather(1, count[:, None] - 1)).squeeze(1))


def at_parent(draft: Draft, of_node: Tensor) -> Tensor:
    """[B, N]: the value of `of_node` [B, N] at each node's parent (of the root's own at the root)."""
    return of_node.gather(1, draft.parent.clamp(min=0))


@dataclass(frozen=True, slots=True)
class Match:
    """Exact: a node survives iff its token is what the target emits at its parent, under the target's own noise.

    The output is the same token for token whatever was drafted (Daliri et al. 2024, arXiv:2408.07978, on trees).
    """

    name: ClassVar[str] = "match"
    exact: ClassVar[bool] = True
    samples: ClassVar[bool] = False

    def __call__(self, draft: Draft, scores: Scores) -> Accepted:
        emitted = scores.emitted
        return keep(draft, draft.tokens == at_parent(draft, emitted), emitted)


@dataclass(frozen=True, slots=True)
class Rejection:
    """Exact: recursive rejection sampling, children in order, without replacement.

    With one child per node this is speculative sampling (Leviathan et al. 2022, arXiv:2211.17192, algorithm 1); with
    several, each rejection leaves p <- norm(max(p - q, 0)) and takes the token out of q. A certain guess, which was not
    drawn, is accepted with probability p and otherwise taken out of p alone; all guesses of a draft without q are.
    """

    name: ClassVar[str] = "rejection"
    exact: ClassVar[bool] = True
    samples: ClassVar[bool] = True

    def __call__(self, draft: Draft, scores: Scores) -> Accepted:
        p_all = scores.law()
        B, N, V = p_all.shape
        q_all, certain = widen(draft.q, V), draft.certain
        rows = torch.arange(B, device=p_all.device)
        u = uniforms(scores, N)
        at = torch.zeros(B, dtype=torch.int64, device=p_all.device)  # the last accepted node of each row
        p, q = p_all[:, 0], None if q_all is None else q_all[:, 0]
        for n in range(1, N):
            asked, token = draft.parent[:, n] == at, draft.tokens[:, n]
            drawn = None if certain is None else ~certain[:, n, None]
            taken, p_left, q_left = test(p, q if q is None or drawn is None else q * drawn, token, u[:, n])
            taken, turned = asked & taken, asked & ~taken
            at = torch.where(taken, n, at)
            p = torch.where(taken[:, None], p_all[:, n], torch.where(turned[:, None], p_left, p))
            if q is not None and q_all is not None and q_left is not None:
                spent = turned[:, None] if drawn is None else turned[:, None] & drawn
                q = torch.where(taken[:, None], q_all[:, n], torch.where(spent, q_left, q))
        path, count = path_to(draft, at)
        return Accepted(path, count, draw(p, scores.noise, scores.position + count - 1)[rows, 0])


def test(p: Tensor, q: Tensor | None, token: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Accept `token` [B] with probability min(1, p/q), and the laws left if it is rejected.

    p, q [B, V], u [B] uniform. A token that q cannot draw (q None, or all of q's tokens tried) was certain: it is
    accepted with probability p. Returns (taken [B], p [B, V], q [B, V]).
    """
    at = token[:, None]
    p_token = p.gather(1, at).squeeze(1)
    without = p.scatter(1, at, 0.0)
    if q is None:
        return u < p_token, renorm(without, p), None
    q_token = q.gather(1, at).squeeze(1)
    certain = q_token <= 0
    left = torch.where(certain[:, None], without, (p - q).clamp(min=0))
    return u * torch.where(certain, 1.0, q_token) < p_token, renorm(left, p), renorm(q.scatter(1, at, 0.0), q)


def renorm(mass: Tensor, otherwise: Tensor) -> Tensor:
    """`mass` [B, V] divided by its sum; `otherwise` where nothing is left (a rejection of probability zero)."""
    total = mass.sum(-1, keepdim=True)
    return torch.where(total > 0, mass / total.clamp(min=torch.finfo(mass.dtype).tiny), otherwise)


def widen(q: Tensor | None, V: int) -> Tensor | None:
    """q [B, N, V'] over the target's vocabulary: zero where the drafter has no token, cut where the target has none."""
    if q is None or q.shape[-1] == V:
        return q
    return torch.nn.functional.pad(q, (0, V - q.shape[-1]))


def uniforms(scores: Scores, N: int) -> Tensor:
    """[B, N] float64 in (0, 1): one per node, of the round that starts at the root's position."""
    nodes = torch.arange(N, device=scores.values.device)
    return scores.noise.uniform(scores.position[:, None], nodes, ACCEPT)[:, 0]


def draw(p: Tensor, noise: Noise, position: Tensor) -> Tensor:
    """[B, 1] int64: a token from p [B, V] for `position` [B], with noise that no accept test used."""
    tokens = torch.arange(p.shape[-1], device=p.device)
    race = noise.log_exponential(position[:, None], tokens, RESIDUAL)[:, 0]
    return (p.log() - race).argmax(-1, keepdim=True)


@dataclass(frozen=True, slots=True)
class Block:
    """Exact: block verification of a chain, never accepting less in expectation (Sun et al. 2024, arXiv:2403.10444)."""

    name: ClassVar[str] = "block"
    exact: ClassVar[bool] = True
    samples: ClassVar[bool] = True

    def __call__(self, draft: Draft, scores: Scores) -> Accepted:
        if draft.certain is not None:
            raise UserError(
                "Block verification judges chains that are drawn or certain and got both in one draft; use the rule "
                "'rejection'."
            )
        p, length = scores.law(), chain_lengths(draft)
        B, N, V = p.shape
        q = widen(draft.q, V)
        if q is None:
            q = torch.zeros_like(p)
            q[:, :-1].scatter_(-1, draft.tokens[:, 1:, None], 1.0)
        follower = draft.tokens.roll(-1, 1)[..., None]
        ratio = p.gather(-1, follower).squeeze(-1) / q.gather(-1, follower).squeeze(-1)  # [B, N], of child n + 1
        ratio = ratio.nan_to_num(nan=0.0, posinf=torch.finfo(p.dtype).max)
        u = uniforms(scores, N)
        weight = torch.ones(B, dtype=p.dtype, device=p.device)
        weights, last = [weight], torch.zeros(B, dtype=torch.int64, device=p.device)
        for i in range(1, N):
            weight = (weight * ratio[:, i - 1]).clamp(max=1)
            weights.append(weight)
            over = (weight[:, None] * p[:, i] - q[:, i]).clamp(min=0).sum(-1)
            share = torch.where(length == i + 1, weight, over / (over + 1 - weight)).nan_to_num(nan=1.0)
            last = torch.where((u[:, i] <= share) & (i < length), i, last)
        rows = torch.arange(B, device=p.device)
        weight = torch.stack(weights, 1)[rows, last]
        left = renorm((weight[:, None] * p[rows, last] - q[rows, last]).clamp(min=0), p[rows, last])
        law = torch.where((last == length - 1)[:, None], p[rows, last], left)
        path, count = path_to(draft, last)
        return Accepted(path, count, draw(law, scores.noise, scores.position + last).squeeze(1))


def chain_lengths(draft: Draft) -> Tensor:
    """[B]: the number of nodes of each row's chain, root included; `UserError` if any row branches."""
    nodes = torch.arange(draft.width, device=draft.tokens.device)
    real = draft.parent >= 0
    real[:, 0] = True
    if bool((real & (draft.parent != nodes - 1) & (nodes > 0)).any()):
        raise UserError("Block verification judges chains and got a tree; draft a chain or use the rule 'rejection'.")
    return real.sum(-1)


@dataclass(frozen=True, slots=True)
class LossyTypical:
    """Lossy: typical acceptance (Cai et al. 2024, arXiv:2401.10774, section 3.3.2): p > min(epsilon, delta exp(-H))."""

    epsilon: float = 0.09
    delta: float = 0.3
    name: ClassVar[str] = "lossy_typical"
    exact: ClassVar[bool] = False
    samples: ClassVar[bool] = False

    def __call__(self, draft: Draft, scores: Scores) -> Accepted:
        p = scores.law()
        entropy = torch.special.entr(p).sum(-1)  # [B, N]
        least = (self.delta * (-entropy).exp()).clamp(max=self.epsilon)
        chance = of_parent(draft, p)
        return keep(draft, chance > at_parent(draft, least), scores.emitted)


def of_parent(draft: Draft, values: Tensor) -> Tensor:
    """[B, N]: the entry of `values` [B, N, V] at each node's parent for the node's token."""
    rows = torch.arange(len(draft.tokens), device=values.device)[:, None]
    return values[rows, draft.parent.clamp(min=0), draft.tokens]


@dataclass(frozen=True, slots=True)
class LossyTopK:
    """Lossy: a guess survives if it is among the k likeliest tokens (Stern 2018, arXiv:1811.03115, section 5.1)."""

    k: int = 2
    name: ClassVar[str] = "lossy_top_k"
    exact: ClassVar[bool] = False
    samples: ClassVar[bool] = False

    def __call__(self, draft: Draft, scores: Scores) -> Accepted:
        edge = scores.values.topk(min(self.k, scores.values.shape[-1]), -1).values[..., -1]
        return keep(draft, of_parent(draft, scores.values) >= at_parent(draft, edge), scores.emitted)


@dataclass(frozen=True, slots=True)
class LossyDistance:
    """Lossy: a guess survives within `distance` of what the target emits: ordinal tokens (Stern 2018, 5.2)."""

    distance: int = 2
    name: ClassVar[str] = "lossy_distance"
    exact: ClassVar[bool] = False
    samples: ClassVar[bool] = False

    def __call__(self, draft: Draft, scores: Scores) -> Accepted:
        emitted = scores.emitted
        away = (draft.tokens - at_parent(draft, emitted)).abs()
        return keep(draft, away <= self.distance, emitted)


@dataclass(frozen=True, slots=True)
class LossyMinBlock:
    """Lossy: the first `block` tokens of a step survive unseen, later ones if they match (Stern 2018, section 5.3).

    `block` counts as tokens per forward do, so 1 is exact; among several children the first one is kept.
    """

    block: int = 2
    name: ClassVar[str] = "lossy_min_block"
    exact: ClassVar[bool] = False
    samples: ClassVar[bool] = False

    def __call__(self, draft: Draft, scores: Scores) -> Accepted:
        emitted = scores.emitted
        fits = draft.tokens == at_parent(draft, emitted)
        return keep(draft, fits | (draft.depth < self.block), emitted)


RULES: dict[str, Callable[..., Rule]] = {
    rule.name: rule for rule in (Match, Rejection, Block, LossyTypical, LossyTopK, LossyDistance, LossyMinBlock)
}


def make_rule(rule: "str | Rule") -> Rule:
    """The rule of that name with its default settings, or the rule itself."""
    if not isinstance(rule, str):
        return rule
    if rule not in RULES:
        raise unknown("acceptance rule", rule, RULES)
    return RULES[rule]()
