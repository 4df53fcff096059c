"""Packed tokens on disk, and the batches that training takes from them by number."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from foretoken.errors import UserError
from foretoken.objective import Batch
from foretoken.training.sources import SHARE, Split
from foretoken.training.store import Stored, stored

PADDING = -1
"""The document of a token that is none."""


class Corpus:
    """Documents as one stream of tokens.

    tokens     how many there are, each document's end included
    documents  how many there are
    """

    def __init__(self, data: Stored) -> None:
        if not len(data.tokens):
            raise UserError("The corpus holds no token; give documents with text.")
        self._data = data
        self.tokens, self.documents = len(data.tokens), len(data.ends)

    @classmethod
    def load(
        cls,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        split: Split = "train",
        share: float = SHARE,
        cache: str | Path | None = None,
    ) -> "Corpus":
        """The documents of a source (see `sources.documents`), tokenised once and then read from `cache`."""
        return cls(stored(source, tokenizer, split=split, share=share, cache=cache))

    @classmethod
    def of(cls, documents: Sequence[Sequence[int]], learn: Sequence[Sequence[bool]] | None = None) -> "Corpus":
        """Documents given as token ids, kept in memory; all of each is learnt unless `learn` says otherwise."""
        return cls(Stored.of(documents, learn))

    def document(self, number: int) -> list[int]:
        """The tokens of one document."""
        start, end = self._span(number)
        return [int(t) for t in self._data.tokens[start:end]]

    def frequent(self, count: int) -> Tensor:
        """[count] int64: the most frequent tokens, in the order of their numbers."""
        found = np.zeros(0, dtype=np.int64)
        for start in range(0, self.tokens, 1 << 24):
            part = np.bincount(np.asarray(self._data.tokens[start : start + (1 << 24)]), minlength=len(found))
            part[: len(found)] += found
            found = part
        found = np.pad(found, (0, max(0, count - len(found))))
        return torch.from_numpy(np.sort(np.argsort(-found, kind="stable")[:count]).astype(np.int64))

    def windows(self, length: int, *, packed: bool = True) -> int:
        """Rows of one epoch: windows of `length` tokens, or documents if they are not packed."""
        return -(-self.tokens // length) if packed else self.documents

    def batch(
        self,
        step: int,
        batch: int,
        length: int,
        *,
        seed: int = 0,
        packed: bool = True,
        rank: int = 0,
        world: int = 1,
        device: str | torch.device = "cpu",
    ) -> Batch:
        """The `batch` rows of step `step`, or those of them that belong to process `rank` of `world`.

        Each epoch takes every window once, in an order of its own that depends on `seed` alone. Nothing else is
        remembered, so a run resumes by its step number, and any number of processes share the same batches.

        packed  rows are windows of the stream of documents; otherwise each row is one document, cut at `length`
        """
        if packed and self.tokens < length:
            raise UserError(f"The corpus has {self.tokens} tokens and a row {length}; add text or make rows shorter.")
        n, mine = self.windows(length, packed=packed), share_of(batch, rank, world)
        places = [divmod(step * batch + row, n) for row in mine]
        return self._rows([int(order(n, seed, epoch)[i]) for epoch, i in places], length, packed, device)

    def in_order(
        self,
        batch: int,
        length: int,
        *,
        packed: bool = True,
        rank: int = 0,
        world: int = 1,
        device: str | torch.device = "cpu",
    ) -> Iterator[Batch]:
        """Every row once, as evaluation wants it. All batches have one shape: the last is filled with padding."""
        n, mine = self.windows(length, packed=packed), share_of(batch, rank, world)
        for first in range(0, n, batch):
            yield self._rows([first + row if first + row < n else None for row in mine], length, packed, device)

    def _span(self, document: int) -> tuple[int, int]:
        return int(self._data.ends[document - 1]) if document else 0, int(self._data.ends[document])

    def _rows(self, rows: Sequence[int | None], length: int, packed: bool, device: str | torch.device) -> Batch:
        shape = (len(rows), length)
        tokens, learn = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
        document = np.full(shape, PADDING, np.int64)
        for b, row in enumerate(rows):
            if row is None:
                continue
            start, end = (row * length, (row + 1) * length) if packed else self._span(row)
            end = min(end, start + length, self.tokens)
            tokens[b, : end - start] = self._data.tokens[start:end]
            learn[b, : end - start] = self._data.learn(start, end)
            document[b, : end - start] = numbered(self._data.ends, start, end)
        return Batch(*(torch.from_numpy(a).to(device) for a in (tokens, document, learn)))


def numbered(ends: NDArray[np.int64], start: int, end: int) -> NDArray[np.int64]:
    """[end - start]: the document of each token of a window, counted from the window's first."""
    found = np.searchsorted(ends, np.arange(start, end), side="right")
    return found - found[:1]


def share_of(batch: int, rank: int, world: int) -> range:
    """The rows of a batch that belong to one process: neighbours, as many for each."""
    if batch % world:
        raise UserError(f"{world} processes cannot share a batch of {batch} rows; make it a multiple of {world}.")
    rows = batch // world
    return range(rank * rows, (rank + 1) * rows)


@lru_cache(maxsize=2)
def order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """[n]: a permutation that depends on its arguments alone, whatever the version of a library."""
    key = mixed(mixed(np.array([seed], np.int64).astype(np.uint64)) + np.uint64(epoch))
    return np.argsort(mixed(np.arange(n, dtype=np.uint64) ^ key), kind="stable")


def mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 finaliser of each number: a bijection with full avalanche."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab: int) -> None:
    """`UserError` if the tokenizer has tokens that a model of `vocab` tokens does not know."""
    known: dict[str, Any] = tokenizer.get_vocab()
    token, largest = max(known.items(), key=lambda item: item[1])
    if largest >= vocab:
        raise UserError(
            f"The tokenizer has the token {token!r} of id {largest} and the model {vocab} tokens; "
            "use the model's own tokenizer."
        )
