"""A smaller model with the same tokenizer drafts (Leviathan 2022, arXiv:2211.17192; Chen 2023, arXiv:2302.01318)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from foretoken.cache import SlotCache, plus
from foretoken.drafter import Feed, Needs
from foretoken.errors import UserError, at_least
from foretoken.grow import Extend, Growth
from foretoken.loading import load
from foretoken.plan import Plan, Settings, planned
from foretoken.saved import trees_in
from foretoken.target import Target
from foretoken.tree import Draft


@dataclass(frozen=True, slots=True)
class Config(Settings):
    """
    path   the draft model's folder or hub name (or a loaded `Target`)
    depth  guesses on the longest path
    """

    path: "str | Target" = ""
    depth: int = 4

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        at_least("draft_model", depth=(self.depth, 1))


@dataclass(slots=True)
class State:
    cache: SlotCache

    def select(self, rows: list[int]) -> None:
        self.cache.select(rows)

    def join(self, other: "State") -> None:
        self.cache.join(other.cache)


class DraftModel:
    def __init__(self, model: Target, plan: Plan) -> None:
        self.model, self.plan = model, plan

    @property
    def needs(self) -> Needs:
        return Needs(width=self.plan.slots)

    def start(self, batch: int, capacity: int) -> State:
        return State(self.model.cache(batch, capacity, self.plan.slots))

    def begin(self, feed: Feed, state: State) -> tuple[Tensor, Extend]:
        """Read what was committed and the root; the root stays node 0 of what is not committed."""

        def extend(growth: Growth) -> Tensor:
            return self.model.extend(growth.fresh, growth.depth, growth.seen, state.cache, offset=growth.first).logits

        place = torch.as_tensor(feed.count, device=feed.root.device)[:, None]
        tokens = torch.nn.functional.pad(feed.tokens, (0, 1)).scatter(1, place, feed.root[:, None])
        read = self.model.read(tokens, plus(feed.count, 1), state.cache)
        state.cache.rewind(1)
        return read.logits, extend

    def propose(self, feed: Feed, state: State) -> Draft:
        return self.plan.draft(feed, *self.begin(feed, state))


def build(target: Target, config: Config) -> DraftModel:
    if not config.path:
        raise UserError("draft_model needs a smaller model; name it as draft_model:PATH.")
    model = config.path
    if isinstance(model, str):
        model = load(model, dtype=target.dtype, device=target.device)
    check_tokenizers(target, model)
    trees = {}
    if isinstance(config.path, str):
        trees = trees_in(Path(config.path), "draft_model", target, required=config.tree == "static")
    return DraftModel(model, planned(config, config.depth, trees, target=target))


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
