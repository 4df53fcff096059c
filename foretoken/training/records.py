"""Documents, and what one record of JSON or of a dataset says."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeAlias, cast

from foretoken.errors import UserError

Message = dict[str, Any]
"""A turn of a chat: {"role": ..., "content": ...}."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What came behind a prompt (a text, or the turns of a chat); only the completion is learnt.

    The token ids are those of the tokenizer whose fingerprint is `tokenizer`; another one reads the texts.
    whole: the completion came to its end; one that was cut off teaches no end.
    """

    prompt: str | list[Message]
    completion: str
    whole: bool = True
    prompt_tokens: list[int] | None = None
    tokens: list[int] | None = None
    tokenizer: str | None = None


Document: TypeAlias = str | list[Message] | Completion

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "model": "assistant"}
"""ShareGPT's names of who speaks."""


def of_record(record: Any, place: str) -> Document | None:
    """The document of one record: "text", a chat, or a prompt with its completion; None if it is empty."""
    fields = cast(Mapping[str, Any], record) if isinstance(record, Mapping) else {}
    text = fields.get("text")
    if isinstance(text, str):
        return text if text.strip() else None
    chat = fields.get("messages", fields.get("conversations"))
    if isinstance(chat, list):
        return messages(cast(list[Any], chat), place) or None
    prompt, completion = fields.get("prompt"), fields.get("completion", fields.get("response"))
    if isinstance(prompt, list):
        prompt = messages(cast(list[Any], prompt), place)
    if isinstance(prompt, str | list) and isinstance(completion, list):
        asked: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [*asked, *messages(cast(list[Any], completion), place)]
    if isinstance(prompt, str | list) and isinstance(completion, str):
        return completed(prompt, completion, fields, place)
    raise UserError(f'{place} has no "text", no "messages", and no "prompt" with a "completion"; write one of them.')


def completed(prompt: str | list[Message], completion: str, fields: Mapping[str, Any], place: str) -> Completion | None:
    """A prompt and its completion, with the token ids that `foretoken distill-data` wrote beside them."""
    whole, ids = fields.get("finish") != "length", [fields.get(key) for key in ("prompt_tokens", "tokens", "tokenizer")]
    if all(part is not None for part in ids):
        if not all(isinstance(part, list) and all(type(t) is int for t in part) for part in ids[:2]):
            raise UserError(f'{place} has "tokens" or "prompt_tokens" that are no list of numbers; leave them out.')
        return Completion(prompt, completion, whole, *ids)
    return Completion(prompt, completion, whole) if prompt or completion else None


def messages(turns: list[Any], place: str) -> list[Message]:
    """Turns as chat templates want them, whether they came so or as ShareGPT's "from" and "value"."""
    found: list[Message] = []
    for turn in turns:
        fields = dict(cast(Mapping[str, Any], turn)) if isinstance(turn, Mapping) else {}
        if "from" in fields and "value" in fields:
            who = fields["from"]
            fields = {"role": ROLES.get(who, who), "content": fields["value"]}
        if not isinstance(fields.get("role"), str) or "content" not in fields:
            raise UserError(f'{place} has a turn without "role" and "content"; write both into every turn.')
        found.append(fields)
    return found


def content(document: Document) -> str:
    """What the document says, without how it was tokenised."""
    if isinstance(document, str):
        return document
    said = [document.prompt, document.completion] if isinstance(document, Completion) else document
    return json.dumps(said, sort_keys=True)


def draw(document: Document) -> float:
    """A number in [0, 1) that depends on the document's content alone."""
    return int.from_bytes(blake2b(content(document).encode("utf-8", "surrogatepass"), digest_size=6).digest()) / 2**48
