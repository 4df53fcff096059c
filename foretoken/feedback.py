"""Guesses made one after another by a small network that reads its own last state and the token guessed from it.

At row i it reads a state and the embedding of token i + 1 and predicts token i + 2. `Recurrent` takes further steps
with the same network, in the same cache (EAGLE; a reused multi-token prediction module); `Cascade` has a network and a
cache for each guess (DeepSeek-V3).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foretoken.branch import Layers
from foretoken.cache import Count, SlotCache
from foretoken.drafter import Feed
from foretoken.grow import Extend, Growth
from foretoken.heads import last_states
from foretoken.objective import Batch, Stage
from foretoken.target import Target
from foretoken.unembed import Unembedding

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Cell:
    """The network of one guess.

    join     (state [B, n, H], embedding [B, n, H]) -> what the layers read [B, n, F]
    layers   read it
    onward   their output [B, n, H'] -> the state that the next guess reads
    ready    their output -> hidden [B, n, H], as the output head takes it
    unembed  the output head
    """

    join: Callable[[Tensor, Tensor], Tensor]
    layers: Layers
    onward: Map
    ready: Map
    unembed: Callable[[], Unembedding]


@dataclass(slots=True)
class State:
    """
    caches    one, or one for each guess
    carry     [B, K, H], what each cell of a cascade but the last made of its last committed row
    unembeds  the cells' output heads
    """

    caches: list[SlotCache]
    carry: Tensor
    unembeds: list[Unembedding]

    def select(self, rows: list[int]) -> None:
        for cache in self.caches:
            cache.select(rows)
        self.carry = self.carry[rows]

    def join(self, other: "State") -> None:
        for mine, theirs in zip(self.caches, other.caches, strict=True):
            mine.join(theirs)
        self.carry = torch.cat([self.carry, other.carry])


def following(feed: Feed) -> Tensor:
    """[B, M]: the token after each committed one, the root behind the last."""
    place = torch.as_tensor(feed.count, device=feed.root.device).sub(1).clamp(min=0)[:, None]
    return feed.tokens.roll(-1, 1).scatter(1, place, feed.root[:, None])


@dataclass(frozen=True, slots=True)
class Embedding:
    """The target's token embedding; `blank`: nothing at position 0, as some models were trained."""

    target: Target
    blank: bool = False

    def __call__(self, tokens: Tensor, position: Tensor) -> Tensor:
        """[B, n, H] of tokens [B, n] read at `position`, a shape that fits theirs."""
        embedded = self.target.model.get_input_embeddings()(tokens)
        return embedded * (position > 0)[..., None].to(embedded.dtype) if self.blank else embedded


class Recurrent:
    """One cell, used for every guess: its own states follow those that it made of the target's."""

    def __init__(self, target: Target, cell: Cell, embedding: Embedding) -> None:
        self.target, self.cell, self.embedding = target, cell, embedding

    def start(self, batch: int, capacity: int, width: int) -> State:
        """`width`: most nodes that are read beyond what is committed."""
        cache = self.cell.layers.cache(batch, capacity + width, width)
        return State([cache], torch.zeros(batch, 0, 0, device=self.target.device), [self.cell.unembed()])

    def begin(self, feed: Feed, state: State, states: Tensor) -> tuple[Tensor, Extend]:
        """Read the rows of the committed tokens, whose states are [B, M, H]; guess from the last.

        Rows of guesses are written behind them and forgotten, so the cache holds nothing but rows from the target.
        """
        cell, cache = self.cell, state.caches[0]
        position = cache.length[:, None] + torch.arange(states.shape[1], device=states.device)
        output = cell.layers.read(cell.join(states, self.embedding(following(feed), position)), feed.count, cache)
        last = last_states(feed, output)
        held = cell.onward(last)  # the state of every node read so far, root first

        def extend(growth: Growth) -> Tensor:
            nonlocal held
            given = held.gather(1, growth.above[..., None].expand(-1, -1, held.shape[2]))
            joined = cell.join(given, self.embedding(growth.fresh, growth.depth))
            output = cell.layers.extend(joined, growth.depth - 1, growth.seen[..., 1:], cache, offset=growth.first - 1)
            held = torch.cat([held, cell.onward(output)], 1)
            return logits(output)

        def logits(output: Tensor) -> Tensor:
            return state.unembeds[0].over(self.target.vocab, cell.ready(output))

        return logits(last), extend

    def stages(self, batch: Batch, enter: Map, weights: Sequence[float]) -> list[Stage]:
        """A step for each weight, every one on the text's own tokens and the states of the step before.

        enter  the target's features [B, T, F] -> the first states
        """
        forest: list[Stage] = []
        size = self.target.config.hidden_size
        for step in reversed(range(len(weights))):
            run = self._step(batch, step, enter, size, last=step == len(weights) - 1)

            def ready(given: Tensor) -> Tensor:
                return self.cell.ready(given[..., :size])

            unembed = self.cell.unembed()  # one for each step: each goes backward through its own rows
            forest = [Stage(f"guess {step + 1}", step + 2, weights[step], run, unembed, ready, tuple(forest))]
        return forest

    def _step(self, batch: Batch, step: int, enter: Map, size: int, last: bool) -> Map:
        """What step 0, 1, ... makes of the features, or of the output and memory [B, T, H + M] of the step before."""
        cell = self.cell

        def run(given: Tensor) -> Tensor:
            state = cell.onward(given[..., :size]) if step else enter(given)
            joined = cell.join(state, embedded(self.embedding, batch, step, step))
            output, memory = cell.layers.unrolled(joined, given[..., size:] if step else None, step)
            return output if last else torch.cat([output, memory], -1)

        return run


def embedded(embedding: Embedding, batch: Batch, ahead: int, first: int = 0) -> Tensor:
    """[B, T, H]: row i holds token i + 1 + ahead; rows without one have no label either."""
    position = torch.arange(first, first + batch.tokens.shape[1], device=batch.tokens.device)
    return embedding(batch.tokens.roll(-1 - ahead, 1), position)


@dataclass(slots=True)
class Rows:
    """The committed rows that one cell of a cascade is to read.

    states  [B, M, H]
    tokens  [B, M] int64, whose embeddings it reads beside them
    count   real ones, per row
    """

    states: Tensor
    tokens: Tensor
    count: Count


def fewer(count: Count, held: list[bool] | Tensor) -> Count:
    """One less where nothing is `held`, but never less than none."""
    if isinstance(count, Tensor):
        return (count - (~torch.as_tensor(held)).long()).clamp(min=0)
    return [max(0, n - (not old)) for n, old in zip(count, held, strict=True)]


class Cascade:
    """A cell and a cache for each guess; each reads the states of the one before at every row.

    Row i of cell k = 0, 1, ... needs token i + 1 + k: with the root at position b its committed rows end at b - 1 - k,
    and the k rows up to b - 1 hang on guesses: they are read with the tree and forgotten.
    """

    def __init__(self, target: Target, cells: Sequence[Cell], embedding: Embedding) -> None:
        self.target, self.cells, self.embedding = target, cells, embedding

    def start(self, batch: int, capacity: int, width: int) -> State:
        """`width`: most nodes that are read beyond what is committed."""
        caches = [cell.layers.cache(batch, capacity + width, width) for cell in self.cells]
        size = self.target.config.hidden_size
        carry = torch.zeros(batch, len(caches), size, dtype=self.target.dtype, device=self.target.device)
        return State(caches, carry, [cell.unembed() for cell in self.cells])

    def begin(self, feed: Feed, state: State, states: Tensor) -> tuple[Tensor, Extend]:
        """Every cell reads its rows of the committed tokens, whose states are [B, M, H]; the first guesses."""
        rows = Rows(states, following(feed), feed.count)
        first = states[:, :1]  # what the first cell makes of the last row
        for k, (cell, cache) in enumerate(zip(self.cells, state.caches, strict=True)):
            position = cache.length[:, None] + torch.arange(rows.states.shape[1], device=states.device)
            held = cache.begun
            joined = cell.join(rows.states, self.embedding(rows.tokens, position))
            output = cell.layers.read(joined, rows.count, cache)
            if k == 0:
                first = last_states(feed, output)
            if k + 1 < len(self.cells):
                rows = self._next(k, rows, cell.onward(output), held, state)
        length = feed.length
        above = state.carry[:, :1]  # what cell k made of the root and of the nodes read so far

        def extend(growth: Growth) -> Tensor:
            nonlocal above
            k = growth.level
            output = self._read_tree(k, growth, above, state.caches[k], length)
            above = torch.cat([state.carry[:, k : k + 1], self.cells[k].onward(output)], 1)
            return logits(k, output[:, growth.first - 1 :])

        def logits(k: int, output: Tensor) -> Tensor:
            return state.unembeds[k].over(self.target.vocab, self.cells[k].ready(output))

        return logits(0, first), extend

    def _next(self, k: int, rows: Rows, onward: Tensor, held: list[bool] | Tensor, state: State) -> Rows:
        """The rows of cell k + 1, from the states [B, M, H] that cell k made of its rows.

        One row behind: the last state waits, in `carry`, for a token after the root; the one that waited comes first,
        if there was one (`held`: per row, whether cell k had rows before).
        """
        had = torch.as_tensor(held, device=onward.device)[:, None]
        count = torch.as_tensor(rows.count, device=onward.device)
        last = onward.gather(1, (count - 1).clamp(min=0)[:, None, None].expand(-1, 1, onward.shape[2]))
        waited = state.carry[:, k : k + 1]
        behind = torch.cat([waited, onward], 1)[:, : onward.shape[1]]
        states = torch.where(had[..., None], behind, onward)
        tokens = torch.where(had, rows.tokens, rows.tokens.roll(-1, 1))
        carry = torch.where((count > 0)[:, None, None], last, waited)
        state.carry = torch.cat([state.carry[:, :k], carry, state.carry[:, k + 1 :]], 1)
        return Rows(states, tokens, fewer(rows.count, held))

    def _read_tree(self, k: int, growth: Growth, above: Tensor, cache: SlotCache, length: Tensor) -> Tensor:
        """[B, N, H] what cell k makes of all guesses so far, with the states [B, 1 + N', H] of cell k - 1 above them.

        A guess of depth j is cell k's row `length` - 1 - k + j. Rows before the first token do not exist: there the
        guesses nearest the root are not seen.
        """
        tokens, parent = growth.tokens[:, 1:], growth.parent.expand_as(growth.tokens)[:, 1:]
        sees = growth.ancestors[:, 1:, 1:]
        depth = growth.ancestors[:, 1:].sum(-1) - 2
        lacking = (k - length).clamp(min=0)[:, None]
        real = depth >= lacking
        own = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
        sees = (sees & real[:, None]) | own
        depth = (depth - lacking).clamp(min=0)
        given = above.gather(1, parent[..., None].expand(-1, -1, above.shape[2]))
        joined = self.cells[k].join(given, self.embedding(tokens, cache.length[:, None] + depth))
        return self.cells[k].layers.extend(joined, depth, sees, cache)

    def stages(self, batch: Batch, enter: Map, weights: Sequence[float]) -> list[Stage]:
        """A cell for each weight, behind each other; guess k's label at row i is token i + k + 1."""
        forest: list[Stage] = []
        for k in reversed(range(len(weights))):
            cell = self.cells[k]
            run = self._step(batch, k, enter)
            forest = [Stage(f"guess {k + 1}", k + 2, weights[k], run, cell.unembed(), cell.ready, tuple(forest))]
        return forest

    def _step(self, batch: Batch, k: int, enter: Map) -> Map:
        """What cell k, from 0, makes of the features, or of the output of the cell before."""

        def run(given: Tensor) -> Tensor:
            state = self.cells[k - 1].onward(given) if k else enter(given)
            return self.cells[k].layers(self.cells[k].join(state, embedded(self.embedding, batch, k)))

        return run
