"""Draft trees grown level by level with a language model's own logits: a draft model, or the target's first layers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foretoken.drafter import Feed
from foretoken.tree import Draft

Extend = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(tokens [B, n], depth [B, n], ancestors [B, n, offset + n], offset) -> logits [B, n, V'] of nodes after the root; or
[B, 1, V'] where they are the same for all n."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How a tree grows.

    depth  guesses on the longest path
    width  paths kept at each depth (1: a chain)
    stop   a row stops growing after a guess whose probability under the drafter is below this. The guess itself stays
           in the draft: dropping it would select on its value and bias the output under rejection rules
    """

    depth: int
    width: int = 1
    stop: float = 0.0

    @property
    def nodes(self) -> int:
        return 1 + self.depth * self.width


def grow(shape: Shape, feed: Feed, logits: Tensor, extend: Extend) -> Draft:
    """The draft whose level 1 comes from `logits` [B, 1, V'] at the root and level d + 1 from reading level d.

    Under `match` each level keeps the `width` best continuations of the level before, by summed log-probability with
    the target's noise. Under rejection rules the root gets `width` guesses drawn without replacement, in order, and
    every later node one, so that no guess is chosen or dropped for its value.
    """
    B, W, device = feed.batch, min(shape.width, logits.shape[-1]), logits.device
    tokens, parent = feed.root[:, None], torch.full((B, 1), -1, device=device)
    ancestors = torch.ones(B, 1, 1, dtype=torch.bool, device=device)
    joint = torch.zeros(B, 1, device=device)  # [B, n] log-probability of the paths to the last level
    going = torch.ones(B, dtype=torch.bool, device=device)
    laws: list[Tensor] = []
    depth = min(shape.depth, max(1, feed.budget - 1))
    for level in range(1, depth + 1):
        values = feed.values(logits)
        ranked = feed.rank(values, level)
        n = 1 if level == 1 else W  # nodes of the level before
        if feed.samples:
            law = feed.law(values).expand(-1, n, -1)
            laws.append(law)
            width = W if level == 1 else 1
            fresh = ranked.topk(width, -1).indices.expand(-1, n, -1).flatten(1)  # [B, W]
            source = torch.arange(W, device=device).expand(B, W) if level > 1 else torch.zeros_like(fresh)
            chance = law.gather(2, fresh.view(B, -1, width)).flatten(1).log()
        else:
            chance, choice = (x.expand(-1, n, -1) for x in ranked.log_softmax(-1).topk(W, -1))  # [B, n, W]
            joint, best = (joint[..., None] + chance).flatten(1).topk(W, -1)  # [B, W]
            source, fresh = best // W, choice.flatten(1).gather(1, best)
            chance = chance.flatten(1).gather(1, best)
        first = tokens.shape[1] - n  # the first node of the level before
        above = (first + source).masked_fill(~going[:, None], -1)
        seen = ancestors.gather(1, (first + source)[..., None].expand(-1, -1, ancestors.shape[2]))
        ancestors = below(ancestors, seen)
        tokens, parent = torch.cat([tokens, fresh], 1), torch.cat([parent, above], 1)
        if shape.stop > 0:
            going = going & (chance.amax(1).exp() >= shape.stop)
            if not bool(going.any()):
                depth = level
                break
        if level < depth:
            offset = tokens.shape[1] - 1 - W
            logits = extend(fresh, torch.full_like(fresh, level - 1), ancestors[:, -W:, 1:], offset)
    q = None
    if laws:
        q = torch.cat(laws, 1)
        q = torch.cat([q, q.new_zeros(B, tokens.shape[1] - q.shape[1], q.shape[2])], 1)
    return Draft(tokens, parent, ancestors, depth, W == 1, q)


def below(ancestors: Tensor, seen: Tensor) -> Tensor:
    """`ancestors` [B, N, N] with W more nodes, each seeing `seen` [B, W, N] and itself."""
    B, W, N = seen.shape
    old = torch.cat([ancestors, ancestors.new_zeros(B, N, W)], 2)
    own = torch.eye(W, dtype=torch.bool, device=seen.device).expand(B, W, W)
    return torch.cat([old, torch.cat([seen, own], 2)], 1)
