"""What follows the target's forward in a step, as tensors alone: emit, accept, clip, and what to commit.

It is the composition of sampler, rule and limits that `decode.Session` makes, without a question to the host: it can
be captured. One table of whole numbers holds all of it, so that one copy brings it to the host.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from foretoken.noise import Noise
from foretoken.rules import Match, Rule
from foretoken.sampling import Sampler, Scores
from foretoken.step import Step
from foretoken.target import Read
from foretoken.tree import Draft, fresh


@dataclass(frozen=True, slots=True)
class Terms:
    """How each row emits, and how much.

    key          [B] int64, of its noise
    temperature  [B, 1, 1] float32
    limit        [B] int64, tokens that it may still emit
    eos          [B, E] int64, tokens that end it, padded with -1
    """

    key: Tensor
    temperature: Tensor
    limit: Tensor
    eos: Tensor


@dataclass(frozen=True, slots=True)
class Advance:
    """What a step did.

    table     [B, 4 N + 4] int64: new and committed tokens, path, and what was emitted at every node; then the columns
              of `last` and `root`, then `count` and 1 + the number of accepted guesses
    features  [B, N, F] along the path; None if none were asked for
    """

    table: Tensor
    features: Tensor | None

    @property
    def width(self) -> int:
        return (self.table.shape[1] - 4) // 4

    def part(self, number: int) -> Tensor:
        """[B, N] int64: one of the four parts as wide as the draft."""
        return self.table[:, number * self.width : (number + 1) * self.width]

    @property
    def new(self) -> Tensor:
        """[B, N]: the tokens emitted, `count` of them."""
        return self.part(0)

    @property
    def tokens(self) -> Tensor:
        """[B, N]: the tokens committed, `count` of them."""
        return self.part(1)

    @property
    def path(self) -> Tensor:
        """[B, N]: their nodes."""
        return self.part(2)

    @property
    def emitted(self) -> Tensor:
        """[B, N]: what the target said at each node."""
        return self.part(3)

    @property
    def last(self) -> Tensor:
        """[B]: the last committed node."""
        return self.table[:, -4]

    @property
    def root(self) -> Tensor:
        """[B]: the next root; the old one of a row that commits nothing."""
        return self.table[:, -3]

    @property
    def count(self) -> Tensor:
        """[B]: tokens committed, and emitted."""
        return self.table[:, -2]

    def step(self, count: list[int]) -> Step:
        """What the drafter is told; `count` as above, on the host."""
        return committed(self.tokens, self.features, self.root, self.emitted, self.last, count)

    def of(self, rows: int, width: int) -> "Advance":
        """The same of a draft of so many rows and nodes, without the padding behind them; its own memory."""
        parts = [self.part(i)[:rows, :width] for i in range(4)]
        features = None if self.features is None else self.features[:rows, :width].clone()
        return Advance(torch.cat([*parts, self.table[:rows, -4:]], 1), features)


def told(numbers: list[int], rows: int, width: int) -> list[list[int]]:
    """Per row of a table, whose `numbers` these are: its part of `new`, then `count` and 1 + the accepted guesses.

    Tables of several steps without guesses, one behind the other, count as one.
    """
    size = 4 * width + 4
    ends = range(size, len(numbers) + 1, size)
    found = [numbers[end - size : end - size + width] + numbers[end - 2 : end] for end in ends]
    if len(found) == rows:
        return found
    runs = ([new for new, count, _ in found[b::rows] if count] for b in range(rows))
    return [[*new, len(new), 1] for new in runs]


def committed(
    tokens: Tensor, features: Tensor | None, root: Tensor, emitted: Tensor, last: Tensor, count: list[int]
) -> Step:
    """The step that commits the first `count[b]` of `tokens` [B, N]; what no row commits is left out."""
    width = max(count)
    if width < tokens.shape[1]:
        tokens, features = tokens[:, :width], None if features is None else features[:, :width]
    return Step(tokens, count, features, root, emitted, last)


def advance(read: Read, draft: Draft, terms: Terms, length: Tensor, sampled: bool) -> Advance:
    """The step after `read` of `draft`, by the rule `match`; `length` [B] tokens are committed before it.

    sampled: whether any temperature is above 0. A row whose limit is 0 commits nothing.
    """
    half = read.logits.dtype in (torch.bfloat16, torch.float16)
    values = read.logits.float() if half else read.logits
    return decided(read, draft, terms, Scores(draft, values, terms.temperature, Noise(terms.key), length + 1, sampled))


def decided(read: Read, draft: Draft, terms: Terms, scores: Scores) -> Advance:
    """The step after `read` of `draft`, from what the target says at its nodes."""
    accepted = Match()(draft, scores)
    new = fresh(draft, accepted)
    count = clipped(new, accepted.count, terms)
    end = (count - 1).clamp(min=0)[:, None]
    path = accepted.path
    root = torch.where(count[:, None] > 0, new.gather(1, end), draft.tokens[:, :1])
    table = [new, draft.tokens.gather(1, path), path, scores.emitted, path.gather(1, end), root]
    features = None
    if read.features is not None:
        features = read.features.gather(1, path[..., None].expand(-1, -1, read.features.shape[2]))
    return Advance(torch.cat([*table, count[:, None], accepted.count[:, None]], 1), features)


def clipped(new: Tensor, count: Tensor, terms: Terms) -> Tensor:
    """[B]: how many of the first `count` [B] of `new` [B, N] are within the limit, up to the first end token."""
    count = torch.minimum(count, terms.limit)
    if terms.eos.shape[1] == 0:
        return count
    place = torch.arange(new.shape[1], device=new.device)
    ends = (new[..., None] == terms.eos[:, None]).any(-1) & (place < count[:, None])
    return torch.where(ends.any(-1), ends.to(torch.uint8).argmax(-1) + 1, count)


def is_plain(sampler: Sampler, rule: Rule) -> bool:
    """Whether `advance` decides as this sampler and rule do: `match` under temperature alone."""
    return isinstance(rule, Match) and sampler.plain
