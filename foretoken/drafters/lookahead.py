"""Lookahead decoding: a window of Jacobi trajectories fills a pool of n-grams, which guess (Fu 2024, arXiv:2402.02057).

One draft has (W + G)(N - 1) nodes: N - 1 levels of a window of W columns, then G guesses of N - 1 tokens. Level 0 is a
chain from the root; column i of level l follows column i of level l - 1, so columns are trajectories and the whole is a
tree: window nodes are guesses too and may be accepted.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from foretoken.drafter import Feed, Needs
from foretoken.errors import at_least
from foretoken.target import Target
from foretoken.tree import Draft, closure


@dataclass(frozen=True, slots=True)
class Config:
    """
    window       columns W of the window
    ngram        length N of the n-grams
    guesses      guesses G per draft, and n-grams kept per first token
    prompt_pool  whether the pool starts with the prompt's n-grams
    """

    window: int = 7
    ngram: int = 4
    guesses: int = 7
    prompt_pool: bool = True

    def __post_init__(self) -> None:
        at_least("lookahead", window=(self.window, 1), ngram=(self.ngram, 2), guesses=(self.guesses, 0))


def layout(window: int, ngram: int, guesses: int) -> list[int]:
    """The parent of every node: window levels, then guesses."""
    W, levels = window, ngram - 1
    parent = [i - 1 for i in range(W)]
    parent += [(level - 1) * W + i for level in range(1, levels) for i in range(W)]
    first = W * levels
    for g in range(guesses):
        start = first + g * levels
        parent += [0, *range(start, start + levels - 1)]
    return parent


@dataclass(slots=True)
class Pool:
    """First token -> the n-gram remainders seen behind it, the newest last, at most `size` of them."""

    size: int
    seen: dict[int, OrderedDict[tuple[int, ...], None]] = field(
        default_factory=dict[int, "OrderedDict[tuple[int, ...], None]"]
    )

    def add(self, gram: list[int]) -> None:
        kept = self.seen.setdefault(gram[0], OrderedDict())
        kept[tuple(gram[1:])] = None
        kept.move_to_end(tuple(gram[1:]))
        if len(kept) > self.size:
            kept.popitem(last=False)

    def behind(self, token: int) -> list[tuple[int, ...]]:
        return list(reversed(self.seen.get(token, ())))


@dataclass(slots=True)
class State:
    """
    window  [B, N - 1, W] int64, column 0 of level 0 replaced by the root when it is drafted
    pools   one per row
    age     drafts proposed per row; the window is random until N - 2 of them have been judged
    """

    window: Tensor
    pools: list[Pool]
    age: list[int]

    def select(self, rows: list[int]) -> None:
        self.window = self.window[torch.tensor(rows, dtype=torch.int64, device=self.window.device)]
        self.pools, self.age = [self.pools[i] for i in rows], [self.age[i] for i in rows]

    def join(self, other: "State") -> None:
        self.window = torch.cat([self.window, other.window.to(self.window.device)])
        self.pools, self.age = self.pools + other.pools, self.age + other.age


class Lookahead:
    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.parent = torch.tensor(layout(config.window, config.ngram, config.guesses), device=device)
        self.ancestors = closure(self.parent[None])[0]
        self.height = int(self.ancestors.sum(-1).max()) - 1

    @property
    def needs(self) -> Needs:
        return Needs(width=(self.config.window + self.config.guesses) * (self.config.ngram - 1))

    def start(self, batch: int, capacity: int) -> State:
        W, N = self.config.window, self.config.ngram
        window = torch.zeros(batch, N - 1, W, dtype=torch.int64, device=self.device)
        return State(window, [Pool(max(1, self.config.guesses)) for _ in range(batch)], [0] * batch)

    def propose(self, feed: Feed, state: State) -> Draft:
        W, N, G = self.config.window, self.config.ngram, self.config.guesses
        if any(state.age):
            self.slide(feed, state)
        for b, age in enumerate(state.age):
            if age == 0:
                self.begin(feed.texts[b], state, b)
        state.window[:, 0, 0] = feed.root
        state.age = [age + 1 for age in state.age]
        guesses = feed.root[:, None, None].repeat(1, G, N - 1)
        known: list[int] = []
        for b, (text, pool) in enumerate(zip(feed.texts, state.pools, strict=True)):
            found = pool.behind(text[-1])[:G]
            known.append(len(found))
            if found:
                guesses[b, : len(found)] = torch.tensor(found, device=guesses.device)
        tokens = torch.cat([state.window.flatten(1), guesses.flatten(1)], 1)
        unknown = torch.arange(G, device=tokens.device) >= torch.tensor(known, device=tokens.device)[:, None]
        parent = self.parent.repeat(len(tokens), 1)
        parent[:, W * (N - 1) :].masked_fill_(unknown.repeat_interleave(N - 1, 1), -1)
        return Draft(tokens, parent, self.ancestors.expand(len(tokens), -1, -1), self.height, False)

    def begin(self, text: list[int], state: State, row: int) -> None:
        """Fill a row's window with random tokens of its text and its pool with the text's n-grams."""
        chance = Random(len(text))
        fill = [chance.choice(text) for _ in range(state.window[row].numel())]
        state.window[row] = torch.tensor(fill, device=self.device).view_as(state.window[row])
        if self.config.prompt_pool:
            for i in range(len(text) - self.config.ngram + 1):
                state.pools[row].add(text[i : i + self.config.ngram])

    def slide(self, feed: Feed, state: State) -> None:
        """Take the last level's answers into the pools and move the window one level on."""
        W, N = self.config.window, self.config.ngram
        last = slice((N - 2) * W, (N - 1) * W)
        answers = torch.nn.functional.pad(feed.emitted, (0, max(0, last.stop - feed.emitted.shape[1])))[:, last]
        grams = torch.cat([state.window, answers[:, None]], 1)  # [B, N, W]
        for pool, age, columns in zip(state.pools, state.age, grams.transpose(1, 2).tolist(), strict=True):
            if age > N - 2:
                for column in columns:
                    pool.add(column)
        state.window = grams[:, 1:].clone()


def build(target: Target, config: Config) -> Lookahead:
    return Lookahead(config, target.device)
