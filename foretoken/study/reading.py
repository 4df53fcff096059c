"""Reading a text and what might have followed it: as a tree behind the text, or sequence by sequence."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foretoken.cache import SlotCache
from foretoken.errors import UserError
from foretoken.loading import load, load_model, read_config, read_tokenizer
from foretoken.target import Target, layer_windows, model_class_of

TOKENS = 4096
"""Tokens of the sequences that are read together where a model cannot branch."""


class Reader(Protocol):
    """A model and one text. Nodes behind the committed tokens are numbered in the order in which they are written."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    vocab: int
    context: int | None
    forwards: int
    note: str

    def open(self, capacity: int, width: int) -> None:
        """Begin a text of at most `capacity` tokens, behind which at most `width` nodes are held at a time."""
        ...

    def chain(self, tokens: Tensor) -> Tensor:
        """[n, V] logits at the first nodes, tokens [n] int64 that follow each other and the text."""
        ...

    def read(self, tokens: Tensor, depth: Tensor, sees: Tensor) -> Tensor:
        """[n, V] logits at nodes N .. N + n - 1, none of which is on another's path.

        tokens  [n] int64
        depth   [n] int64, tokens on the node's path behind the committed ones, itself not counted
        sees    [n, N] bool, which nodes before these lie on its path
        """
        ...

    def commit(self, count: int) -> None:
        """Make the first `count` nodes, a chain, part of the text; forget the others."""
        ...


class TreeReader:
    """All nodes of a call in one forward, with the keys and values of everything before them in a cache."""

    note = ""

    def __init__(self, target: Target) -> None:
        self.target, self.model, self.tokenizer = target, target.model, target.tokenizer
        self.vocab, self.context, self.forwards = target.vocab, target.context, 0
        self.cache: SlotCache | None = None

    def open(self, capacity: int, width: int) -> None:
        self.cache = self.target.cache(1, capacity + width, width)

    def chain(self, tokens: Tensor) -> Tensor:
        assert self.cache is not None
        depth = torch.arange(len(tokens), device=tokens.device)
        self.forwards += 1
        return self.target.extend(tokens[None], depth[None], None, self.cache).logits[0]

    def read(self, tokens: Tensor, depth: Tensor, sees: Tensor) -> Tensor:
        assert self.cache is not None
        own = torch.eye(len(tokens), dtype=torch.bool, device=sees.device)
        ancestors = torch.cat([sees, own], 1)[None]
        self.forwards += 1
        return self.target.extend(tokens[None], depth[None], ancestors, self.cache, offset=sees.shape[1]).logits[0]

    def commit(self, count: int) -> None:
        assert self.cache is not None
        self.cache.commit(None, [count])


class SequenceReader:
    """For every node a forward over its whole text: what any causal model can do. The reference of `TreeReader`."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, note: str = "", tokens: int = TOKENS
    ) -> None:
        """`tokens`: of the sequences that one forward reads; 0: a sequence at a time."""
        self.model, self.tokenizer, self.note, self.tokens = model.eval(), tokenizer, note, tokens
        config: Any = model.config.get_text_config(decoder=True)
        self.vocab: int = config.vocab_size
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.forwards = 0
        self.text: list[int] = []
        self.nodes: list[int] = []

    def open(self, capacity: int, width: int) -> None:
        self.text, self.nodes = [], []

    def chain(self, tokens: Tensor) -> Tensor:
        self.nodes = tokens.tolist()
        ids = torch.tensor([self.text + self.nodes], device=tokens.device)
        self.forwards += 1
        return self.model(input_ids=ids, use_cache=False).logits[0, len(self.text) :]

    def read(self, tokens: Tensor, depth: Tensor, sees: Tensor) -> Tensor:
        before = sees.shape[1]
        self.nodes[before:] = tokens.tolist()
        nodes = torch.tensor(self.nodes[:before], dtype=torch.int64)
        ends = zip(tokens.tolist(), sees.cpu(), strict=True)
        paths = [[*self.text, *nodes[seen].tolist(), token] for token, seen in ends]
        logits = tokens.new_zeros(len(paths), self.vocab, dtype=self.model.dtype)
        for group in of_one_length(paths, self.tokens):
            ids = torch.tensor([paths[i] for i in group], device=tokens.device)
            self.forwards += 1
            logits[group] = self.model(input_ids=ids, use_cache=False).logits[:, -1]
        return logits

    def commit(self, count: int) -> None:
        self.text += self.nodes[:count]
        self.nodes = []


def of_one_length(paths: list[list[int]], tokens: int) -> list[list[int]]:
    """Numbers of paths of one length each, in groups of at most `tokens` tokens or one path."""
    by_length: dict[int, list[int]] = {}
    for i, path in enumerate(paths):
        by_length.setdefault(len(path), []).append(i)
    groups: list[list[int]] = []
    for length, members in by_length.items():
        size = max(1, tokens // length)
        groups += [members[i : i + size] for i in range(0, len(members), size)]
    return groups


def open_reader(
    path: str, *, dtype: str | None = None, device: str | None = None, say: Callable[[str], None] = lambda _: None
) -> Reader:
    """The model at `path`, ready to read. One that cannot branch reads sequence by sequence, and `say` is told so."""
    config = read_config(path)
    try:
        layer_windows(config.get_text_config(decoder=True), model_class_of(config))
    except UserError as error:
        model = load_model(path, config, dtype=dtype, device=device)  # of no causal language model this fails again
        note = (
            f"{model.config.model_type!r} cannot read trees, so every continuation is read on its own, which is slow."
        )
        say(f"{note} ({error})")
        return SequenceReader(model, read_tokenizer(path, config), note)
    return TreeReader(load(path, dtype=dtype, device=device))
