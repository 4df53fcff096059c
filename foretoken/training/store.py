"""Tokenised documents in a folder: written once, whole or not at all, and mapped into memory."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from foretoken.errors import UserError
from foretoken.progress import progress
from foretoken.training.encode import Encoder
from foretoken.training.records import Document
from foretoken.training.sources import Source, Split, chosen, open_source

FORMAT = 1
"""Of the files below; a cache of another format is not read."""
CACHE = Path("~/.cache/foretoken")
DOCUMENTS, CHARACTERS = 1024, 1 << 22
"""Most documents and about the most characters tokenised at a time."""
TOKENS, ENDS, SKIPPED, ABOUT = "tokens.bin", "ends.bin", "skipped.bin", "about.json"


@dataclass(frozen=True, slots=True)
class Stored:
    """A stream of documents.

    tokens   [N] integers
    ends     [D] int64, where each document ends: the place behind its last token
    skipped  [N] bool, tokens that are not learnt; None if all are
    """

    tokens: NDArray[Any]
    ends: NDArray[np.int64]
    skipped: NDArray[np.bool_] | None = None

    @classmethod
    def of(cls, documents: Sequence[Sequence[int]], learn: Sequence[Sequence[bool]] | None = None) -> "Stored":
        """Documents given as token ids; empty ones are none."""
        given = learn or [[True] * len(d) for d in documents]
        kept = [(list(d), list(flags)) for d, flags in zip(documents, given, strict=True) if len(d)]
        return cls(
            np.array([t for d, _ in kept for t in d], np.int64),
            np.cumsum([len(d) for d, _ in kept], dtype=np.int64),
            ~np.array([f for _, flags in kept for f in flags], np.bool_),
        )

    @classmethod
    def open(cls, folder: Path) -> "Stored":
        """What `write` left in a folder."""
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text("utf-8"))
        tokens = np.memmap(folder / TOKENS, np.dtype(about["dtype"]), "r")
        ends = np.memmap(folder / ENDS, np.int64, "r")
        skipped = np.memmap(folder / SKIPPED, np.bool_, "r") if about["skips"] else None
        return cls(tokens, ends, skipped)

    def learn(self, start: int, end: int) -> NDArray[np.bool_]:
        """[end - start]: whether each token is learnt."""
        return np.ones(end - start, np.bool_) if self.skipped is None else ~self.skipped[start:end]


def stored(
    source: str, tokenizer: PreTrainedTokenizerBase, *, split: Split, share: float, cache: str | Path | None
) -> Stored:
    """The tokens of a source, from the cache if nothing changed that they depend on."""
    opened, encoder = open_source(source), Encoder(tokenizer)
    folder = Path(cache or CACHE).expanduser() / key(opened, encoder, split, share)
    if not folder.is_dir():
        made(folder.parent)
        with FileLock(folder.with_suffix(".lock")):  # of several processes one writes, and the others wait for it
            if not folder.is_dir():
                write(folder, opened, encoder, split, share)
    return Stored.open(folder)


def made(folder: Path) -> None:
    """Make a folder; `UserError` if it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The cache {str(folder)!r} cannot be made ({error.strerror}); give another folder.") from error


def key(source: Source, encoder: Encoder, split: Split, share: float) -> str:
    """The name of a cache: equal if and only if the tokens are."""
    template = getattr(encoder.tokenizer, "chat_template", None)
    what = [FORMAT, source.origin, split, None if source.held else share, encoder.fingerprint, encoder.end, template]
    return sha256(json.dumps(what).encode()).hexdigest()[:24]


def write(folder: Path, source: Source, encoder: Encoder, split: Split, share: float) -> None:
    """Tokenise a source into `folder`, which appears when it is complete."""
    partial = folder.with_suffix(".partial")
    partial.mkdir(exist_ok=True)  # only who holds the lock is here: what lies there was killed, and is written over
    try:
        with progress() as update:

            def counted() -> Iterator[Document]:
                for document, read in chosen(source, split, share):
                    update(f"tokenising {source.name}, kB", read >> 10, max(read, source.size) >> 10)
                    yield document

            found = write_tokens(partial, counted(), encoder)
        if not found:
            raise nothing(source, split, share)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_tokens(folder: Path, documents: Iterable[Document], encoder: Encoder) -> int:
    """Write the documents' tokens to the folder's files; how many there are."""
    dtype = np.dtype(np.uint16 if len(encoder.tokenizer) <= 1 << 16 else np.uint32)
    total, skips = 0, False
    with (
        (folder / TOKENS).open("wb") as tokens,
        (folder / ENDS).open("wb") as ends,
        (folder / SKIPPED).open("wb") as skipped,
    ):
        for some in portions(documents):
            for encoded in encoder.encode(some):
                if not encoded.tokens:
                    continue
                np.array(encoded.tokens, dtype).tofile(tokens)
                if encoded.learn is not None:
                    skipped.seek(total)  # what lies before and was never written is 0: learnt
                    (~np.array(encoded.learn, np.bool_)).tofile(skipped)
                    skips = True
                total += len(encoded.tokens)
                np.array([total], np.int64).tofile(ends)
        skipped.truncate(total if skips else 0)
    about = {"format": FORMAT, "dtype": dtype.name, "skips": skips, "tokens": total}
    (folder / ABOUT).write_text(json.dumps(about), "utf-8")
    return total


def portions(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents, as many at a time as fit in memory with ease."""
    some, size = list[Document](), 0
    for document in documents:
        some.append(document)
        size += len(document) if isinstance(document, str) else 0
        if len(some) >= DOCUMENTS or size >= CHARACTERS:
            yield some
            some, size = [], 0
    yield some


def nothing(source: Source, split: Split, share: float) -> UserError:
    """The error for a split without tokens."""
    documents = sum(1 for _ in source.read(split))
    if not documents:
        return UserError(f"{source.name!r} holds no text; give a source with at least one document.")
    return UserError(
        f"{source.name!r} has {documents} documents and none of them in {split}, with a held-out share of {share}; "
        "change the share, or give more documents."
    )
