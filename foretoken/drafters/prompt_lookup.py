"""Copy what followed the last occurrence of the newest n-gram (prompt lookup, Saxena 2023; cf. arXiv:2304.04487)."""

from dataclasses import dataclass, field

from foretoken.drafter import Feed, Needs
from foretoken.errors import at_least
from foretoken.target import Target
from foretoken.tree import Draft, stack


@dataclass(frozen=True, slots=True)
class Config:
    """
    ngram      longest n-gram looked up; shorter ones follow if it is new
    min_ngram  shortest one
    length     tokens copied
    """

    ngram: int = 3
    min_ngram: int = 1
    length: int = 8

    def __post_init__(self) -> None:
        at_least("prompt_lookup", min_ngram=(self.min_ngram, 1), length=(self.length, 1))
        at_least("prompt_lookup", ngram=(self.ngram, self.min_ngram))


@dataclass(slots=True)
class Index:
    """Where each n-gram of one row ended last, the row's newest token left out."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict[tuple[int, ...], int])
    read: int = 0  # tokens of the row whose n-grams are in

    def update(self, text: list[int], sizes: range) -> None:
        for end in range(self.read + 1, len(text)):
            for n in sizes:
                if n <= end:
                    self.ends[tuple(text[end - n : end])] = end
        self.read = max(self.read, len(text) - 1)

    def follow(self, text: list[int], sizes: range, length: int) -> list[int]:
        """The `length` tokens that followed the longest known n-gram at the end of `text`; none if none is known.

        A copy that reaches the end goes on with what it copied: text that goes in circles is guessed round after round.
        """
        for n in sizes:
            end = self.ends.get(tuple(text[-n:])) if n <= len(text) else None
            if end is not None:
                return [text[end + i % (len(text) - end)] for i in range(length)]
        return []


@dataclass(slots=True)
class State:
    rows: list[Index]

    def select(self, rows: list[int]) -> None:
        self.rows = [self.rows[i] for i in rows]

    def join(self, other: "State") -> None:
        self.rows = self.rows + other.rows


class PromptLookup:
    def __init__(self, config: Config) -> None:
        self.config = config
        self.sizes = range(config.ngram, config.min_ngram - 1, -1)

    @property
    def needs(self) -> Needs:
        return Needs(width=1 + self.config.length)

    def start(self, batch: int, capacity: int) -> State:
        return State([Index() for _ in range(batch)])

    def propose(self, feed: Feed, state: State) -> Draft:
        length = min(self.config.length, max(0, feed.budget - 1))
        rows: list[tuple[list[int], list[int]]] = []
        for text, index in zip(feed.texts, state.rows, strict=True):
            index.update(text, self.sizes)
            guess = [text[-1], *index.follow(text, self.sizes, length)]
            rows.append((guess, list(range(-1, len(guess) - 1))))
        return stack(rows, feed.root.device)


def build(target: Target, config: Config) -> PromptLookup:
    return PromptLookup(config)
