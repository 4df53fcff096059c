"""A user's own file of prompts: a text with one per line, or lines of JSON, chats among them."""

import json
from pathlib import Path
from typing import Any, cast

from foretoken.errors import UserError
from foretoken.prompts import batch, checked, read
from foretoken.target import Target
from foretoken.training.records import Message, messages


def prompts_in(target: Target, path: Path) -> list[str | list[Message]]:
    """The prompts of a .txt or .jsonl file, in its order; `UserError` with the line for what is none."""
    return [*batch(path)] if path.suffix == ".txt" else of_lines(target, path)


def of_lines(target: Target, path: Path) -> list[str | list[Message]]:
    """The prompt in each line of a .jsonl file."""
    lines = [(i, line) for i, line in enumerate(read(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{str(path)!r} holds no prompt; write one per line.")
    return [of_line(target, line, f"{str(path)!r}, line {i}") for i, line in lines]


def of_line(target: Target, line: str, place: str) -> str | list[Message]:
    """ "prompt", the first of "turns", or the chat in "messages" or "conversations", without an answer at its end."""
    need = 'write one object with "prompt", "turns" or "messages" per line.'
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is no JSON; {need}") from error
    fields = cast(dict[str, Any], record) if isinstance(record, dict) else {}
    prompt, turns = fields.get("prompt"), fields.get("turns")
    chat = fields.get("messages", fields.get("conversations", prompt))
    if isinstance(chat, list) and chat:
        return asked_in(target, messages(cast(list[Any], chat), place), place)
    if isinstance(prompt, str):
        return checked(prompt, place)
    if isinstance(turns, list) and turns and isinstance(first := cast(list[Any], turns)[0], str):
        return said(target, checked(first, place))
    raise UserError(f"{place} has no prompt; {need}")


def asked_in(target: Target, chat: list[Message], place: str) -> list[Message]:
    """The chat up to where the assistant is to speak; `UserError` if the target cannot read chats."""
    if getattr(target.tokenizer, "chat_template", None) is None:
        raise UserError(f'{place} is a chat, and {target.name!r} has no chat template; write its text as "prompt".')
    while chat and chat[-1]["role"] == "assistant":
        chat = chat[:-1]
    if not chat:
        raise UserError(f"{place} is a chat in which nobody asks; begin it with a user's turn.")
    return chat


def said(target: Target, turn: str) -> str | list[Message]:
    """What a user says: a chat where the tokenizer has a template for it, else the words."""
    templated = getattr(target.tokenizer, "chat_template", None) is not None
    return [{"role": "user", "content": turn}] if templated else turn
