"""Draft as deep as has paid, or not at all: any drafter, never much slower than plain decoding.

Before each step a policy says how deep the draft may be (`limits.Policy`). The drafter is asked for no more, through
the budget of its feed; where it is not asked at all, what it would have been told is kept for it.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from foretoken.drafter import Drafter, Feed, Needs
from foretoken.limits import Policy, Rows
from foretoken.step import Step
from foretoken.tree import Draft, chain


class Chooser(Protocol):
    """Says how deep the next draft of a session may be; told afterwards how deep it was (0: it has no guess).

    If it may not be deep at all, `Rows.plain` says how many steps may be made before it is asked again.
    """

    def rows(self, batch: int) -> Rows: ...

    def choose(self, feed: Feed, rows: Rows) -> int: ...

    def drafted(self, feed: Feed, rows: Rows, limit: int, height: int) -> None: ...


def merged(parts: list[Step]) -> Step:
    """One step of several that follow each other; the last draft is that of the first, its last node moved on."""
    if len(parts) == 1:
        return parts[0]
    first, device = parts[0], parts[0].last.device
    starts = np.cumsum([0, *(part.tokens.shape[1] for part in parts)]).tolist()
    places = [
        [start + i for part, start in zip(parts, starts, strict=False) for i in range(part.count[b])]
        for b in range(len(first.count))
    ]
    count = [len(place) for place in places]
    width = max(1, *count)
    index = torch.tensor([place + [0] * (width - len(place)) for place in places], device=device)
    features = None
    if first.features is not None:
        whole = torch.cat([part.features for part in parts if part.features is not None], 1)
        features = whole.gather(1, index[..., None].expand(-1, -1, whole.shape[2]))
    since = torch.tensor([n - m for n, m in zip(count, first.count, strict=True)], device=device)
    last = (first.last + since).clamp(max=first.emitted.shape[1] - 1)
    tokens = torch.cat([part.tokens for part in parts], 1).gather(1, index)
    return Step(tokens, count, features, parts[-1].root, first.emitted, last)


def nothing(like: Step, batch: int) -> Step:
    """Of so many rows nothing was missed."""
    features = None if like.features is None else like.features[:1, :0].expand(batch, -1, -1)
    tokens, emitted = (x[:1, :0].expand(batch, -1) for x in (like.tokens, like.emitted))
    root, last = like.root.new_zeros(batch), like.last.new_zeros(batch)
    return Step(tokens, [0] * batch, features, root, emitted, last)


@dataclass(slots=True)
class State:
    """The drafter's own state, what it was not told yet, and what the policy knows of the rows."""

    inner: Any
    rows: Rows
    missed: list[Step] = field(default_factory=list[Step])

    def select(self, rows: list[int]) -> None:
        self.inner.select(rows)
        self.rows.select(rows)
        self.missed = [merged(self.missed).select(rows)] if self.missed else []

    def join(self, other: "State") -> None:
        if self.missed or other.missed:
            mine, theirs = (merged(state.missed) if state.missed else None for state in (self, other))
            sizes = len(self.rows.limits), len(other.rows.limits)
            if mine is None:
                assert theirs is not None
                mine = nothing(theirs, sizes[0])
            self.missed = [mine.join(theirs or nothing(mine, sizes[1]))]
        self.inner.join(other.inner)
        self.rows.join(other.rows)


class Adaptive:
    """A drafter whose drafts are as deep as has paid."""

    def __init__(self, drafter: Drafter, policy: Chooser | None = None) -> None:
        self.drafter = drafter
        self.policy: Chooser = policy or Policy(drafter.needs.width - 1)

    @property
    def needs(self) -> Needs:
        return self.drafter.needs

    def start(self, batch: int, capacity: int) -> State:
        return State(self.drafter.start(batch, capacity), self.policy.rows(batch))

    def propose(self, feed: Feed, state: State) -> Draft:
        """The drafter's own draft, or none; what it is not told now it is told when it drafts again."""
        limit = self.policy.choose(feed, state.rows)
        state.missed.append(feed.step)
        if limit:
            told = merged(state.missed)
            state.missed, state.rows.behind = [], 0
            draft = self.drafter.propose(self.fed(feed, told, limit), state.inner)
        else:
            state.rows.behind += 1
            draft = chain(feed.root.unsqueeze(1))
        self.policy.drafted(feed, state.rows, limit, draft.height if draft.width > 1 else 0)
        return draft if limit else replace(draft, times=state.rows.plain)

    def fed(self, feed: Feed, told: Step, limit: int) -> Feed:
        return replace(
            feed,
            tokens=told.tokens,
            count=told.count,
            features=told.features,
            emitted=told.emitted,
            last=told.last,
            budget=min(feed.budget, limit + 1),
        )


def adaptive(drafter: Drafter) -> Drafter:
    """The drafter with limits that follow acceptance; itself if it drafts nothing."""
    return Adaptive(drafter) if drafter.needs.width > 1 else drafter
