"""What the target is asked when it writes training data: texts, pieces of documents, turns of chats."""

from collections.abc import Iterable, Iterator
from random import Random
from typing import Any, TypeAlias, cast

from foretoken.errors import UserError
from foretoken.generation import tokenize
from foretoken.target import Target
from foretoken.text import decode
from foretoken.training.encode import Encoder
from foretoken.training.records import Completion, Document, Message

Prompt: TypeAlias = str | list[int] | list[Message]
"""A text, token ids, or a chat that the assistant is to answer."""


def ids_of(target: Target, prompt: Prompt) -> list[int]:
    """The tokens that the target reads: a chat in its template, up to where the assistant speaks."""
    if isinstance(prompt, str):
        return tokenize(target, prompt)
    if all(isinstance(part, int) for part in prompt):
        return cast(list[int], list(prompt))
    tokenizer: Any = target.tokenizer
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(f"{target.name!r} has no chat template, and a chat came; give prompts of plain text.")
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))


def text_of(target: Target, prompt: Prompt) -> str | list[Message]:
    """The prompt as another tokenizer can read it."""
    if isinstance(prompt, str) or not all(isinstance(part, int) for part in prompt):
        return cast(str | list[Message], prompt)
    assert target.tokenizer is not None
    return decode(target.tokenizer, cast(list[int], prompt))


def prompts_of(
    found: Iterable[Document], target: Target, *, length: int = 64, cuts: int = 1, seed: int = 0
) -> Iterator[Prompt]:
    """Prompts from documents: `cuts` pieces of `length` tokens of a text, its beginning first, then random ones.

    Of a document shorter than two pieces, the first half. Of a chat, what was said before an answer, for at most `cuts`
    of its answers. The choice depends on the document's number and the seed.
    """
    assert target.tokenizer is not None
    encoder = Encoder(target.tokenizer)
    for number, document in enumerate(found):
        random = Random(f"{seed} {number}")
        if isinstance(document, str):
            (ids,) = encoder.ids([document])
            yield from pieces(ids, encoder.leading(), length, cuts, random)
        elif isinstance(document, Completion):
            yield document.prompt
        else:
            answers = [i for i, turn in enumerate(document) if turn["role"] == "assistant" and i]
            yield from (document[:i] for i in sorted(random.sample(answers, min(cuts, len(answers)))))


def pieces(ids: list[int], leading: list[int], length: int, cuts: int, random: Random) -> Iterator[list[int]]:
    """Prompts cut from a text's tokens; each starts with the `leading` tokens that the target puts before any text."""
    body = ids[len(leading) :]
    n = min(length - len(leading), len(body) // 2)
    if n < 1:
        return
    others = range(1, len(body) - n + 1)
    starts = [0, *random.sample(others, min(cuts - 1, len(others)))]
    yield from ([*leading, *body[i : i + n]] for i in starts)
