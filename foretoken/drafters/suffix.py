"""Continue the longest suffix that occurred before, by how often each continuation did (cf. arXiv:2411.04975)."""

import heapq
from dataclasses import dataclass

from foretoken.automaton import SuffixAutomaton
from foretoken.drafter import Feed, Needs
from foretoken.errors import at_least
from foretoken.target import Target
from foretoken.tree import Draft, stack


@dataclass(frozen=True, slots=True)
class Config:
    """
    nodes      most guesses of a draft
    factor     most guesses per token of the matched suffix: a short match deserves a short draft
    min_match  shortest suffix that is followed
    min_share  guesses less likely than this, by counts along their path, are left out
    """

    nodes: int = 15
    factor: float = 4.0
    min_match: int = 1
    min_share: float = 0.1

    def __post_init__(self) -> None:
        at_least("suffix", nodes=(self.nodes, 1), factor=(self.factor, 0.1), min_match=(self.min_match, 1))
        at_least("suffix", min_share=(self.min_share, 0.0))


@dataclass(slots=True)
class State:
    rows: list[SuffixAutomaton]

    def select(self, rows: list[int]) -> None:
        self.rows = [self.rows[i] for i in rows]

    def join(self, other: "State") -> None:
        self.rows = self.rows + other.rows


class Suffix:
    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        return Needs(width=1 + self.config.nodes)

    def start(self, batch: int, capacity: int) -> State:
        return State([SuffixAutomaton() for _ in range(batch)])

    def propose(self, feed: Feed, state: State) -> Draft:
        rows: list[tuple[list[int], list[int]]] = []
        for text, automaton in zip(feed.texts, state.rows, strict=True):
            for token in text[len(automaton.text) :]:
                automaton.extend(token)
            rows.append(self.guess(automaton, feed.budget - 1))
        return stack(rows, feed.root.device)

    def guess(self, automaton: SuffixAutomaton, depth: int) -> tuple[list[int], list[int]]:
        """(tokens, parent) of the likeliest continuations, at most `depth` deep, the root first."""
        tokens, parent = [automaton.text[-1]], [-1]
        match = automaton.longest[automaton.match]
        most = min(self.config.nodes, int(self.config.factor * match)) if match >= self.config.min_match else 0
        heap: list[tuple[float, int, int, int, int]] = []  # (-share, order, parent, token, state), best first

        def push(state: int, share: float, node: int, level: int) -> None:
            if level < depth:
                for token, to, part in automaton.next(state):
                    if share * part >= self.config.min_share:
                        heapq.heappush(heap, (-share * part, len(tokens) + len(heap), node, token, to))

        levels = [0]
        push(automaton.match, 1.0, 0, 0)
        while heap and len(tokens) <= most:
            share, _, node, token, state = heapq.heappop(heap)
            tokens.append(token)
            parent.append(node)
            levels.append(levels[node] + 1)
            push(state, -share, len(tokens) - 1, levels[-1])
        return tokens, parent


def build(target: Target, config: Config) -> Suffix:
    return Suffix(config)
