"""A smaller model with the same tokenizer drafts (Leviathan 2022, arXiv:2211.17192; Chen 2023, arXiv:2302.01318)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from foretoken.cache import SlotCache
from foretoken.drafter import Feed, Needs
from foretoken.errors import UserError, at_least
from foretoken.grow import Shape, grow
from foretoken.loading import load
from foretoken.target import Target
from foretoken.tree import Draft


@dataclass(frozen=True, slots=True)
class Config:
    """
    path   the draft model's folder or hub name (or a loaded `Target`)
    depth  guesses on the longest path
    width  paths kept at each depth (1: a chain)
    stop   stop behind a guess less likely than this under the draft model
    """

    path: "str | Target" = ""
    depth: int = 4
    width: int = 1
    stop: float = 0.0

    def __post_init__(self) -> None:
        at_least("draft_model", depth=(self.depth, 1), width=(self.width, 1), stop=(self.stop, 0.0))


@dataclass(slots=True)
class State:
    cache: SlotCache

    def select(self, rows: list[int]) -> None:
        self.cache.select(rows)

    def join(self, other: "State") -> None:
        self.cache.join(other.cache)


class DraftModel:
    def __init__(self, model: Target, shape: Shape) -> None:
        self.model, self.shape = model, shape

    @property
    def needs(self) -> Needs:
        return Needs(width=self.shape.nodes)

    def start(self, batch: int, capacity: int) -> State:
        return State(self.model.cache(batch, capacity, self.shape.nodes))

    def propose(self, feed: Feed, state: State) -> Draft:
        """Read what was committed and the root, grow, and forget all but what was committed."""

        def extend(tokens: Tensor, depth: Tensor, ancestors: Tensor, offset: int) -> Tensor:
            return self.model.extend(tokens, depth, ancestors, state.cache, offset=offset).logits

        place = torch.tensor(feed.count, device=feed.root.device)[:, None]
        tokens = torch.nn.functional.pad(feed.tokens, (0, 1)).scatter(1, place, feed.root[:, None])
        read = self.model.read(tokens, [n + 1 for n in feed.count], state.cache)
        draft = grow(self.shape, feed, read.logits, extend)
        state.cache.rewind(1)
        return draft


def build(target: Target, config: Config) -> DraftModel:
    if not config.path:
        raise UserError("draft_model needs a smaller model; name it as draft_model:PATH.")
    model = config.path
    if isinstance(model, str):
        model = load(model, dtype=target.dtype, device=target.device)
    check_tokenizers(target, model)
    return DraftModel(model, Shape(config.depth, config.width, config.stop))


def check_tokenizers(target: Target, model: Target) -> None:
    """`UserError` unless both models number the same tokens alike."""
    if target.tokenizer is None or model.tokenizer is None:
        if target.vocab != model.vocab:
            raise UserError(
                f"The draft model has {model.vocab} tokens and the target {target.vocab}; use one with its tokenizer."
            )
        return
    ours, theirs = target.tokenizer.get_vocab(), model.tokenizer.get_vocab()
    if differing := sum(theirs.get(token) != number for token, number in ours.items()):
        raise UserError(
            f"The draft model's tokenizer differs from the target's in {differing} of {len(ours)} tokens; "
            "use a draft model with the target's tokenizer."
        )
