"""The laws of tokens further ahead at every position of a text, summed over the tokens between, by tree attention.

A chunk of the text is read once; then the likeliest next tokens of each of its rows are leaves behind that row, and
theirs behind them: a leaf sees the text up to its row and its own path. So one forward holds leaves of many rows, and
each costs one token. Leaves are read in parts, depth first, so memory depends on the sizes of chunk and part alone,
however many leaves there are.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from foretoken.analysis.marginals import entropy, information
from foretoken.errors import UserError
from foretoken.marginal import law_of, nucleus
from foretoken.study.reading import Reader

ROWS, PART = 64, 256
"""Most rows of the text in a chunk, and leaves in a part; fewer where the vocabulary is large."""
LAWS, LEAF = 4, 10
"""Laws in float32 whose memory is held at a time, sorting included: per depth and row; per depth and leaf."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What the sums are cut to.

    horizon  K, the depth of the last law, 2 or more: token x_{t+K}
    mass     of every next-token law along a path; 1: all of it, so that the sums are exact
    least    paths of two tokens or more that are less likely are not followed, but the likeliest is (0: all are)
    """

    horizon: int = 2
    mass: float = 0.99
    least: float = 0.0


@dataclass(frozen=True, slots=True)
class Size:
    """Rows of the text in a chunk, and leaves in a part."""

    rows: int
    part: int


@dataclass(frozen=True, slots=True)
class Future:
    """What a model expects behind M rows of a text; K - 1 further depths, first x_{t+2}.

    row          [M] int64, t: each row's place in the text
    law          [M, V], of x_{t+1}
    total        [K - 1, M, V], sum over the kept paths; its own sum is `mass`
    mass         [K - 1, M]
    leaves       [K - 1, M] int64, paths that were read
    information  [M], I(x_{t+1}; x_{t+2}) in nats
    greedy       [K, M] int64, the model's own greedy continuation
    drawn        [K, M] int64, one drawn from the model
    behind       [K - 1, M, V], the model's law behind the first 1, 2, ... drawn tokens
    """

    row: Tensor
    law: Tensor
    total: Tensor
    mass: Tensor
    leaves: Tensor
    information: Tensor
    greedy: Tensor
    drawn: Tensor
    behind: Tensor


def size_for(vocab: int, horizon: int, memory: float) -> Size:
    """The chunk and part whose laws take `memory` bytes at most; `UserError` if one row and one leaf take more."""
    row, leaf = LAWS * (horizon + 2) * 4 * vocab, LEAF * (horizon - 1) * 4 * vocab
    if row + leaf > memory:
        raise UserError(
            f"A vocabulary of {vocab:,} tokens needs {(row + leaf) / 2**20:,.1f} MiB for a single position and "
            f"{memory / 2**20:,.1f} MiB were given; give --memory {(row + leaf) / 2**30:.2g} or more."
        )
    rows = max(1, min(ROWS, int(memory / 2 / row)))
    return Size(rows, max(1, min(PART, int((memory - rows * row) / leaf))))


class Sums:
    """The sums of a chunk while they grow; the fields are a `Future`'s."""

    def __init__(self, law: Tensor, depths: int) -> None:
        M, V = law.shape
        self.total, self.mass = law.new_zeros(depths, M, V), law.new_zeros(depths, M)
        self.leaves = torch.zeros(depths, M, dtype=torch.int64, device=law.device)
        self.entropies = law.new_zeros(M)

    def add(self, level: int, owner: Tensor, weight: Tensor, law: Tensor) -> None:
        """Leaves of `owner` [n] with path probabilities [n] and laws [n, V] behind them."""
        self.total[level].index_add_(0, owner, weight[:, None] * law)
        self.mass[level].index_add_(0, owner, weight)
        self.leaves[level].index_add_(0, owner, torch.ones_like(owner))
        if level == 0:
            self.entropies.index_add_(0, owner, weight * entropy(law))


@dataclass(frozen=True, slots=True)
class Nodes:
    """n places behind which the text may go on.

    owner  [n] int64, the row of the chunk that each belongs to
    law    [n, V], of the next token
    weight [n], probability of the path to it
    first  [n] bool, whether the path is the likeliest everywhere
    depth  [n] int64, of the next token
    sees   [n, N] bool, the nodes on the path
    """

    owner: Tensor
    law: Tensor
    weight: Tensor
    first: Tensor
    depth: Tensor
    sees: Tensor


@torch.inference_mode()
def futures(reader: Reader, text: list[int], rows: list[int], cut: Cut, size: Size, seed: int = 0) -> Iterator[Future]:
    """A `Future` for each chunk of the text [T] that has any of `rows`, ascending; no row needs what follows it."""
    depths = cut.horizon - 1
    reader.open(len(text), size.rows + depths * max(size.part, size.rows))
    device = reader.model.device
    draw = torch.Generator(device).manual_seed(seed)
    for start in range(0, max(rows, default=-1) + 1, size.rows):
        tokens = torch.tensor(text[start : start + size.rows], device=device)
        law = law_of(reader.chain(tokens))
        wanted = torch.tensor([t - start for t in rows if start <= t < start + len(tokens)], device=device)
        if len(wanted):
            yield future(reader, law, wanted, start, cut, size, draw)
        reader.commit(len(tokens))


def future(
    reader: Reader, law: Tensor, wanted: Tensor, start: int, cut: Cut, size: Size, draw: torch.Generator
) -> Future:
    """Of the rows `wanted` [M] of a chunk whose laws are [R, V]."""
    M, device = len(wanted), law.device
    sees = torch.arange(len(law), device=device) <= wanted[:, None]
    one = torch.ones(M, dtype=law.dtype, device=device)
    place = torch.arange(M, device=device)
    law = law[wanted]
    nodes = Nodes(place, law, one, one > 0, wanted + 1, sees)
    sums = Sums(law, cut.horizon - 1)
    visit(reader, nodes, sums, 0, cut, size.part)
    greedy, _ = path(reader, nodes, cut.horizon, None)
    drawn, behind = path(reader, nodes, cut.horizon, draw)
    known = information(sums.total[0], sums.mass[0], sums.entropies)
    return Future(start + wanted, law, sums.total, sums.mass, sums.leaves, known, greedy, drawn, behind)


def visit(reader: Reader, nodes: Nodes, sums: Sums, level: int, cut: Cut, part: int) -> None:
    """Read every kept token behind the nodes, and what is kept behind those, down to the horizon."""
    kept = nucleus(nodes.law, cut.mass)
    weight = nodes.weight[:, None] * kept.chance
    first = nodes.first[:, None] & (torch.arange(weight.shape[1], device=weight.device) == 0)
    least = cut.least if level else 0.0
    parent, choice = ((weight > 0) & ((weight >= least) | first)).nonzero(as_tuple=True)
    for begin in range(0, len(parent), part):
        at = torch.arange(begin, min(begin + part, len(parent)), device=parent.device)
        above, place = parent[at], (parent[at], choice[at])
        owner, sees, depth = nodes.owner[above], nodes.sees[above], nodes.depth[above]
        law = law_of(reader.read(kept.tokens[place], depth, sees))
        sums.add(level, owner, weight[place], law)
        if level + 1 < len(sums.total):
            own = torch.eye(len(at), dtype=torch.bool, device=sees.device)
            below = Nodes(owner, law, weight[place], first[place], depth + 1, torch.cat([sees, own], 1))
            visit(reader, below, sums, level + 1, cut, part)


def path(reader: Reader, nodes: Nodes, length: int, draw: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """One continuation of `length` tokens behind each of M nodes, drawn, or greedy if there is no `draw`.

    Returns its tokens [length, M] and the laws [length - 1, M, V] behind all of them but the last.
    """
    law, sees = nodes.law, nodes.sees
    own = torch.eye(len(law), dtype=torch.bool, device=sees.device)
    tokens, laws = list[Tensor](), list[Tensor]()
    for ahead in range(length):
        token = law.argmax(-1) if draw is None else torch.multinomial(law, 1, generator=draw)[:, 0]
        tokens.append(token)
        if ahead + 1 < length:
            law = law_of(reader.read(token, nodes.depth + ahead, sees))
            sees = torch.cat([sees, own], 1)
            laws.append(law)
    return torch.stack(tokens), torch.stack(laws)
