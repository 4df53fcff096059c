"""A text as windows of tokens, in an order that shows much of it early."""

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from foretoken.errors import UserError, at_least
from foretoken.training.encode import Encoder
from foretoken.training.sources import chosen, open_source

LENGTH = 512
"""Tokens of a window, where the model holds as many."""
PASSES = 16
"""Documents that a window's share of the limit goes to at least, where there are as many."""


@dataclass(frozen=True, slots=True)
class Window:
    """
    number    from 0, in the order of reading
    document  from 0
    position  of its first token in the document
    tokens    ids
    """

    number: int
    document: int
    position: int
    tokens: list[int]


def length_for(context: int | None, asked: int) -> int:
    """Tokens of a window for a model that holds `context`; 0 asks for what is usual."""
    if asked and context is not None and asked > context:
        raise UserError(
            f"Windows of {asked} tokens were asked for and the model holds {context}; give --length {context}."
        )
    return asked or min(LENGTH, context or LENGTH)


def encoder_for(tokenizer: PreTrainedTokenizerBase | None, model: str) -> Encoder:
    """What reads the text as `model` does; `UserError` if it came without a tokenizer."""
    if tokenizer is None:
        raise UserError(f"{model!r} has no tokenizer, and text is to be read; put one beside the weights.")
    return Encoder(tokenizer)


def windows(encoder: Encoder, data: str, length: int, limit: int, shortest: int = 2) -> Iterator[Window]:
    """Windows of at most `length` tokens, `limit` tokens in all (0: all there are), each of `shortest` or more.

    data  as `foretoken train` takes it; of `stdlib` the packages that no model of this project was trained on

    Pass after pass over the documents: in the first their beginnings, so that a limit does not end within the first
    document. `UserError` if no document has `shortest` tokens.
    """
    at_least("windows of the text", length=(length, shortest), limit=(limit, shortest if limit else 0))
    quota = max(1, limit // (PASSES * length)) * length if limit else 1 << 60  # tokens of a document in one pass
    number, total, start, longest = 0, 0, 0, 0
    while True:
        before = number
        for document, tokens in enumerate(documents(encoder, data)):
            longest = max(longest, len(tokens))
            for position in range(start, min(start + quota, len(tokens)), length):
                piece = tokens[position : position + length]
                if limit and total + len(piece) > limit:
                    piece = piece[: limit - total]
                if len(piece) < shortest:
                    continue
                yield Window(number, document, position, piece)
                number, total = number + 1, total + len(piece)
                if limit and limit - total < shortest:
                    return
        if number == before:
            if not number:
                raise UserError(
                    f"The longest text in {data!r} has {longest} tokens and {shortest} are needed; give longer texts "
                    "or look less far ahead."
                )
            return
        start += quota


def documents(encoder: Encoder, data: str) -> Iterator[list[int]]:
    """The tokens of each document; of a source that holds some out itself those alone."""
    source = open_source(data)
    for document, _ in chosen(source, "held_out" if source.held else "train", 0.0):
        for encoded in encoder.encode([document]):
            yield encoded.tokens
