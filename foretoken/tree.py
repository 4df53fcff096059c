"""A draft is a tree of guessed tokens; accepting keeps one path of it.

Node 0 is the root: the last emitted token, which the target has not read yet. A chain is a tree. Nodes are in
topological order (`parent < node`), so node i of row b occupies slot `length[b] + i` of the target's cache while it is
being judged. A node whose parent is -1 (the root apart) is fed to the target but never acceptable: a probe, or padding.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Draft:
    """One guess per row, judged by the target in one forward.

    tokens     [B, N] int64, node 0 the root
    parent     [B, N] int64, -1 at the root and at nodes that can never be accepted
    ancestors  [B, N, N] bool, `ancestors[b, i, j]`: node i sees node j; every node sees itself
    height     depth of the deepest node, on the host
    chained    whether every node that can be accepted follows the one before it and the others are padding behind
               them, on the host: then masks are causal and nothing moves on commit
    q          [B, N, V'] float, the law that each node's children were drawn from (None: no law, any choice)
    certain    [B, N] bool, nodes that follow from the text and were not drawn from their parent's q (None: none)
    times      forwards over a root alone that may be made, of this draft and of those behind it, before the drafter
               is asked again
    """

    tokens: Tensor
    parent: Tensor
    ancestors: Tensor
    height: int
    chained: bool
    q: Tensor | None = None
    certain: Tensor | None = None
    times: int = 1

    @property
    def depth(self) -> Tensor:
        """[B, N] int64: the number of nodes that each node sees, less itself."""
        return self.ancestors.sum(-1) - 1

    @property
    def width(self) -> int:
        return self.tokens.shape[1]


@dataclass(frozen=True, slots=True)
class Accepted:
    """What survives of a draft: `count` nodes of each row, root first, and the token after them.

    path   [B, N] int64, the accepted nodes in order; entries from `count` on are 0
    count  [B] int64, 1 + the number of accepted guesses = tokens this forward yields (0 for a row that commits nothing)
    next   [B] int64, the token emitted after the last accepted node: the next root
    """

    path: Tensor
    count: Tensor
    next: Tensor


def chain(tokens: Tensor, count: Tensor | None = None, q: Tensor | None = None) -> Draft:
    """The draft whose nodes `tokens` [B, N] follow each other; of row b only the first `count[b]` can be accepted."""
    B, N = tokens.shape
    parent, ancestors = links(B, N, tokens.device)
    if count is not None:
        parent = parent.masked_fill(torch.arange(N, device=tokens.device) >= count[:, None], -1)
    return Draft(tokens, parent, ancestors, N - 1, True, q)


@lru_cache(maxsize=64)
def links(batch: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(parent [B, N], ancestors [B, N, N]) of chains, made once: not to be changed."""
    with torch.inference_mode(False):
        node = torch.arange(width, device=device)
        parent = (node - 1).expand(batch, width).contiguous()
        return parent, (node <= node[:, None]).expand(batch, width, width).contiguous()


def tree(tokens: Tensor, parent: Tensor, q: Tensor | None = None) -> Draft:
    """The draft with these nodes [B, N]; visibility follows from `parent`. Padding nodes see only themselves."""
    N = tokens.shape[1]
    ancestors = closure(parent)
    height = int(ancestors.sum(-1).max()) - 1 if N > 1 else 0
    node = torch.arange(N, device=parent.device)
    chained = bool((parent == node - 1).all())
    return Draft(tokens, parent, ancestors, height, chained, q)


def closure(parent: Tensor) -> Tensor:
    """`ancestors` [B, N, N] of `parent` [B, N]: each node sees itself and what the node above it sees.

    What is seen and the node above are doubled together (pointer jumping), log2 N times.
    """
    B, N = parent.shape
    node = torch.arange(N, device=parent.device)
    seen = (node == node[:, None]).repeat(B, 1, 1)
    above = torch.where(parent >= 0, parent, node)
    reach = 1
    while reach < N:
        seen = seen | seen.gather(1, above[..., None].expand(B, N, N))
        above = above.gather(1, above)
        reach *= 2
    return seen


def stack(rows: list[tuple[list[int], list[int]]], device: torch.device) -> Draft:
    """One draft from `(tokens, parent)` lists per row, shorter rows padded with nodes that are never accepted."""
    lengths = [len(tokens) for tokens, _ in rows]
    N = max(lengths)
    tokens = torch.tensor([t + [t[0]] * (N - len(t)) for t, _ in rows], device=device)
    if all(parent == list(range(-1, len(parent) - 1)) for _, parent in rows):
        return chain(tokens, torch.tensor(lengths, device=device))
    parent = torch.tensor([p + [-1] * (N - len(p)) for _, p in rows], device=device)
    return tree(tokens, parent)


def merge(a: Draft, b: Draft) -> Draft:
    """Every path of `a` and `b`, drafts of the same roots, once; nodes of `a` first, those never accepted left out.

    If one of them carries a law, its nodes all stay, drawn, and the other's are certain, but for those that equal a
    drawn one before them. Drawn nodes belong into `a`: behind a certain node its drawn twin is tried in vain.
    """
    assert a.q is None or b.q is None, "one node cannot have two laws"
    width = (a.width, a.width, b.width, b.width)
    host = torch.cat([a.tokens, a.parent, b.tokens, b.parent], 1).split(width, 1)
    lists: list[list[list[int]]] = [part.tolist() for part in host]
    rows = [union((ta, pa, a.q is not None), (tb, pb, b.q is not None)) for ta, pa, tb, pb in zip(*lists, strict=True)]
    merged = stack([(tokens, parent) for tokens, parent, _ in rows], a.tokens.device)
    q = a.q if b.q is None else b.q
    if q is None:
        return merged
    source = [s + [-1] * (merged.width - len(s)) for _, _, s in rows]
    source = torch.tensor(source, device=q.device)
    none = torch.nn.functional.pad(q, (0, 0, 0, 1))  # a last node without law, for source -1
    return replace(merged, q=none[torch.arange(len(q), device=q.device)[:, None], source], certain=source < 0)


def union(*drafts: tuple[list[int], list[int], bool]) -> tuple[list[int], list[int], list[int]]:
    """(tokens, parent, source) of the nodes of one row's drafts, each (tokens, parent, whether drawn), a path once.

    source: the node's number in the draft that is drawn, -1 if it is not from there.
    """
    tokens, parent, source = drafts[0][0][:1], [-1], [0]
    known: dict[tuple[int, int], int] = {}  # (parent, token) -> node
    for guesses, above, drawn in drafts:
        place = {0: 0}  # node of the draft -> node of the union
        for n in range(1, len(guesses)):
            if (up := place.get(above[n])) is None:
                continue
            node = known.get((up, guesses[n]))
            if node is None or drawn:
                node = len(tokens)
                known.setdefault((up, guesses[n]), node)
                tokens.append(guesses[n])
                parent.append(up)
                source.append(n if drawn else -1)
            place[n] = node
    return tokens, parent, source


def longest(draft: Draft, fits: Tensor) -> tuple[Tensor, Tensor]:
    """`(path [B, N], count [B])` of the deepest node that fits with all its ancestors; the first one among equals.

    fits [B, N] bool: whether each node may follow its parent. The root always fits; nodes without a parent never do.
    """
    fits = fits & (draft.parent >= 0)
    if draft.chained:  # the nodes up to the first that does not fit
        count = 1 + fits[:, 1:].cumprod(1).sum(1)
        node = torch.arange(draft.width, device=fits.device)
        return torch.where(node < count[:, None], node, 0), count
    fits[:, 0] = True
    alive = (fits[:, None, :] | ~draft.ancestors).all(-1)  # [B, N]
    return path_to(draft, torch.where(alive, draft.depth, -1).argmax(-1))


def path_to(draft: Draft, node: Tensor) -> tuple[Tensor, Tensor]:
    """`(path [B, N], count [B])` from the root to `node` [B]."""
    B, N = draft.tokens.shape
    on_path = draft.ancestors[torch.arange(B, device=node.device), node]  # [B, N]
    count = on_path.sum(-1)
    path = (~on_path).to(torch.uint8).argsort(dim=-1, stable=True)
    kept = torch.arange(N, device=node.device) < count[:, None]
    return path.masked_fill(~kept, 0), count


def fresh(draft: Draft, accepted: Accepted) -> Tensor:
    """[B, N] int64: the tokens that this step emits, `count` of them: accepted guesses, then the token after them."""
    guesses = draft.tokens.gather(1, accepted.path).roll(-1, 1)  # the root leaves, its place is for `next`
    return guesses.scatter(1, (accepted.count - 1).clamp(min=0)[:, None], accepted.next[:, None])
