"""Jacobi decoding: guess what the target said last time at the positions ahead (Santilli 2023, arXiv:2305.10427)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from foretoken.drafter import Feed, Needs
from foretoken.errors import at_least
from foretoken.target import Target
from foretoken.tree import Draft, chain


@dataclass(frozen=True, slots=True)
class Config:
    """
    length  guesses per draft
    """

    length: int = 7

    def __post_init__(self) -> None:
        at_least("jacobi", length=(self.length, 1))


@dataclass(slots=True)
class State:
    """age [B]: drafts proposed so far for each row."""

    age: Tensor

    def select(self, rows: list[int]) -> None:
        self.age = self.age[torch.tensor(rows, dtype=torch.int64)]

    def join(self, other: "State") -> None:
        self.age = torch.cat([self.age, other.age])


class Jacobi:
    """The state of the iteration is the target's own emission at the nodes behind the accepted ones."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        return Needs(width=1 + self.config.length)

    def start(self, batch: int, capacity: int) -> State:
        return State(torch.zeros(batch, dtype=torch.int64))

    def propose(self, feed: Feed, state: State) -> Draft:
        L, device = self.config.length, feed.root.device
        said = feed.emitted[:, : L + 1]
        source = feed.last[:, None] + 1 + torch.arange(L, device=device)
        known = (source < said.shape[1]) & (state.age.to(device) > 0)[:, None]
        guess = said.gather(1, source.clamp(max=said.shape[1] - 1))
        guess = torch.where(known, guess, feed.root[:, None])
        state.age = state.age + 1
        return chain(torch.cat([feed.root[:, None], guess], 1))


def build(target: Target, config: Config) -> Jacobi:
    return Jacobi(config)
