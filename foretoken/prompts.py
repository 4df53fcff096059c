"""Prompts from the command line: given, piped, or one per line of a file."""

import json
import sys
from pathlib import Path
from typing import Any, cast

from foretoken.errors import UserError


def one_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt given as text, as "-" (standard input) or as a file; one final line break is not part of it."""
    if prompt is not None and file is not None:
        raise UserError("--prompt and --prompt-file both came; give one of them.")
    if file is not None:
        text, source = read(file).removesuffix("\n"), str(file)
    elif prompt == "-":
        text, source = standard_input().removesuffix("\n"), "standard input"
    elif prompt is not None:
        text, source = prompt, "--prompt"
    else:
        raise UserError("There is no prompt; give --prompt TEXT, --prompt - for standard input, or a file.")
    return checked(text, f"The prompt from {source}")


def checked(text: str, what: str) -> str:
    """`text` if a tokenizer can read it."""
    if not text:
        raise UserError(f"{what} is empty; give at least one character.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes of the command line that are no text, lone surrogates of JSON
        raise UserError(f"{what} is no Unicode text; convert it first.") from error
    return text


def batch(file: Path) -> list[str]:
    """The prompts of `file`: the lines of a text, or "prompt" or "turns"[0] of each line of a .jsonl file."""
    lines = [(i, line) for i, line in enumerate(read(file).split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{str(file)!r} holds no prompt; write one per line.")
    if file.suffix == ".jsonl":
        return [prompt_of(line, f"{str(file)!r}, line {i}") for i, line in lines]
    return [checked(line.removesuffix("\r"), f"{str(file)!r}, line {i}") for i, line in lines]


def prompt_of(line: str, place: str) -> str:
    """The prompt in one line of JSON."""
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f'{place} is no JSON; write one object with a "prompt" or "turns" field per line.') from error
    fields = cast(dict[str, Any], record) if isinstance(record, dict) else {}
    found: Any = fields.get("prompt")
    if found is None and isinstance(turns := fields.get("turns"), list) and turns:
        found = cast(list[Any], turns)[0]
    if not isinstance(found, str) or not found:
        raise UserError(f'{place} has no text in "prompt" or "turns"[0]; write one object with one of them per line.')
    return checked(found, place)


def read(file: Path) -> str:
    """The text of `file`; `UserError` if it cannot be read."""
    try:
        return file.read_text("utf-8-sig")
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be read ({error.strerror}); give the path of a text file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{str(file)!r} is no UTF-8 text; convert it first.") from error


def standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError("Standard input is no UTF-8 text; convert it first.") from error
