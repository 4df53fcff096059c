"""`foretoken distill-data`: text that the target itself writes, as training data for what is to guess it."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console

from foretoken.answer import Ask
from foretoken.decode import Session
from foretoken.drafter import Drafter
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.generation import decode_all, output_of, requests_for
from foretoken.progress import Update, progress
from foretoken.prompts import batch
from foretoken.rules import make_rule
from foretoken.sampling import Sampling
from foretoken.target import Target
from foretoken.training.encode import Encoder
from foretoken.training.prompts import Prompt, ids_of, prompts_of, text_of
from foretoken.training.records import Message
from foretoken.training.sources import documents

START = b'{"prompt": '
"""Of every row."""
ROUND = 32
"""Batches that are decoded in one go: rows that end make room for others until the round is over."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What every row of a file has in common, and must have when the file is continued."""

    model: str
    dtype: str
    tokenizer: str
    seed: int
    temperature: float
    top_p: float
    max_new_tokens: int

    def record(self, prompt: str | list[Message], ids: Sequence[int], completion: str, **rest: Any) -> dict[str, Any]:
        """One row: texts for every reader, token ids for one with the same tokenizer."""
        shared = {name: getattr(self, name) for name in self.__slots__}
        return {"prompt": prompt, "completion": completion, "prompt_tokens": list(ids), **rest, **shared}


def distill(
    target: Target,
    prompts: Iterable[Prompt],
    out: Path,
    *,
    drafter: str | Drafter = "suffix",
    settings: dict[str, Any] | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    total: int | None = None,
) -> int:
    """Write a line of JSON to `out` for each prompt with what the target says to it; how many lines there are.

    Row i depends on prompt i, the sampling and the seed alone: not on the drafter, on the batch, or on how often the
    work was broken off. Rows that are there already are kept; they must come from the same prompts and settings.

    total: how many prompts there are, for the progress bar
    """
    if target.tokenizer is None:
        raise UserError(f"{target.name!r} has no tokenizer; save the model's own tokenizer beside its weights.")
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    encoder, method = Encoder(target.tokenizer), make_drafter(drafter, target, settings)
    rows = Rows(
        target.name,
        str(target.dtype).removeprefix("torch."),
        encoder.fingerprint,
        seed,
        temperature,
        top_p,
        max_new_tokens,
    )
    numbered = enumerate((prompt, ids_of(target, prompt)) for prompt in prompts)
    done = kept(out, rows, numbered)
    with progress() as update, out.open("a", encoding="utf-8") as file:
        while group := list(islice(numbered, ROUND * batch_size)):
            requests = requests_for(
                target,
                [ids for _, (_, ids) in group],
                sampling,
                numbers=[number for number, _ in group],
                max_new_tokens=max_new_tokens,
            )
            writer = Writer(file, target, rows, [prompt for _, (prompt, _) in group], update, done, total)
            decode_all(target, method, requests, writer.rule, batch_size=batch_size, on_step=writer.take)
            done += len(group)
    return done


class Writer:
    """Writes finished rows in the order of their prompts, each as soon as those before it are written."""

    def __init__(
        self,
        file: TextIO,
        target: Target,
        rows: Rows,
        prompts: Sequence[Prompt],
        update: Update,
        first: int,
        total: int | None,
    ) -> None:
        self.file, self.target, self.rows, self.prompts = file, target, rows, prompts
        self.update, self.first, self.total = update, first, total
        self.rule = make_rule("match")  # exact: the drafter leaves no trace in the data
        self._waiting: dict[int, dict[str, Any]] = {}
        self._next = first

    def take(self, session: Session) -> None:
        """Keep the rows that ended in the last step, and write those whose turn it is."""
        for row in session.rows:
            if row.finish is not None:
                number, output = row.request.number, output_of(row, self.target, self.rule)
                prompt = text_of(self.target, self.prompts[number - self.first])
                self._waiting[number] = self.rows.record(
                    prompt, row.request.tokens, output.text, tokens=output.token_ids, finish=output.finish
                )
        while (record := self._waiting.pop(self._next, None)) is not None:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
            self._next += 1
        self.update("rows written", self._next, self.total or max(self._next, self.first + len(self.prompts)))


def kept(out: Path, rows: Rows, numbered: Iterator[tuple[int, tuple[Prompt, list[int]]]]) -> int:
    """How many rows of this work `out` has, which `numbered` is moved past; a half-written last one is cut off."""
    check_folder(out)
    done = size = 0
    try:
        with out.open("rb") as file:
            for i, line in enumerate(file, 1):
                if not line.endswith(b"\n") and line[: len(START)] == START[: len(line)]:
                    break
                _, (_, ids) = next(numbered, (0, ("", list[int]())))
                check_row(f"{str(out)!r}, line {i}", line, rows, ids)
                done, size = i, size + len(line)
        os.truncate(out, size)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise UserError(f"{str(out)!r} cannot be written ({error.strerror}); give the path of a file.") from error
    return done


def check_folder(out: Path) -> None:
    """`UserError` if the folder that shall hold `out` is not there."""
    if not out.parent.is_dir():
        raise UserError(f"{str(out.parent)!r} is no folder; make it, or write to another.")


def check_row(place: str, line: bytes, rows: Rows, prompt: list[int]) -> None:
    """`UserError` if a line is not the row of this work that answers the prompt ([]: there is none)."""
    try:
        found: Any = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict) or "prompt_tokens" not in found:
        raise UserError(f"{place} is no row of training data; write to another file.")
    fields = cast(dict[str, Any], found)
    for name in Rows.__slots__:
        if fields.get(name) != getattr(rows, name):
            raise UserError(
                f"{place} was written with {name} {fields.get(name)!r} and {getattr(rows, name)!r} came; "
                "write to another file, or go on as it was begun."
            )
    if fields["prompt_tokens"] != prompt:
        raise UserError(f"{place} does not answer that prompt of this work; write to another file.")


def run(
    model: str,
    out: Path,
    *,
    prompts: Path | None = None,
    source: str | None = None,
    chat: bool = False,
    prompt_tokens: int = 64,
    cuts: int = 1,
    limit: int | None = None,
    drafter: str = "suffix",
    settings: Sequence[str] = (),
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    dtype: str | None = None,
    device: str | None = None,
    attention: str | None = None,
) -> None:
    """Let `model` answer the prompts of a file, or continue pieces of a source's training documents, into `out`.

    chat   each prompt of the file is what a user says
    cuts   prompts per document of the source
    limit  most prompts
    """
    if (prompts is None) == (source is None):
        raise UserError("Prompts come either from a file or from a source; give one of --prompts and --source.")
    if chat and prompts is None:
        raise UserError("--chat makes users' turns of the prompts of a file; give --prompts FILE.")
    if prompt_tokens < 2 or cuts < 1 or (limit is not None and limit < 1):
        raise UserError("--prompt-tokens must be 2 or more, --cuts and --limit 1 or more.")
    check_folder(out)
    texts = [] if prompts is None else batch(prompts)
    found = None if source is None else documents(source)
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
    ask = Ask(model, drafter, settings, "match", max_new_tokens, [], sampling, dtype, device, attention)
    target, method = ask.prepare()
    given: Iterable[Prompt] = texts
    if chat:
        given = ([{"role": "user", "content": text}] for text in texts)
    if found is not None:
        given = prompts_of(found, target, length=prompt_tokens, cuts=cuts, seed=seed)
    total = min(len(texts), limit or len(texts)) if found is None else limit
    console = Console(stderr=True, highlight=False, markup=False)
    try:
        written = distill(
            target,
            islice(given, limit),
            out,
            drafter=method,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            batch_size=batch_size,
            total=total,
        )
    except KeyboardInterrupt:
        console.print(f"\n{out} keeps what is written; the same command goes on from there.", style="dim")
        raise
    if not written:
        raise UserError(f"{source or str(prompts)!r} gave no prompt; give text of two tokens or more.")
    console.print(f"{written} rows in {out}", style="dim", soft_wrap=True)
