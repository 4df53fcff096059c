"""What a comparison writes: lines of JSON, each finished before the next begins, so that nothing finished is lost.

Four kinds of lines. A `Run` is one call of `foretoken bench`: machine, versions, model. A `Row` is one prompt decoded
by one method once; rows of one `round` were measured one after the other in a new order, and are compared with its
plain row and no other. A `Cost` was timed apart from the rows, for predictions. A `Skip` says why a method did not run.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from foretoken.errors import UserError

FORMAT = 1
"""Raised when a line changes its meaning."""
FILE = "rows.jsonl"
PLAIN = "none"
"""The method that others are compared with: plain decoding by the same engine."""
EVERY = "every method"
"""Stands for all of them in a `Skip`."""


@dataclass(frozen=True, slots=True)
class Run:
    """One call of the command.

    id               names it in its rows
    parameters       of the target
    weights          bytes of them that a forward reads
    bandwidth_gb_s   at which this machine reads memory
    machine          processor, threads, memory, versions
    settings         what must be the same to go on with the results: new tokens, seed, prompts per task, ...
    """

    id: str
    command: str
    date: str
    model: str
    parameters: int
    weights: int
    dtype: str
    device: str
    bandwidth_gb_s: float
    machine: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt, decoded by one method, once; with others of its `group`, whose time is theirs together.

    run, round         see above
    method             a short name, the same in every row of the method; "none" is plain decoding
    drafter, settings  what was asked for; of a peer, its name and what it was told
    rule, exact        acceptance rule, and whether it leaves the target's law unchanged
    peer               whether another program ran it
    requires           what the method needs besides the model, in words
    task, prompt       which prompt
    group, repeat      number of the prompts decoded together, and of the measurement
    tokens             emitted, an end token included
    seconds            of the group, from the prompts to the last token
    first              of the group, to its first token
    draft, verify, own of the group's seconds after the prompts': guessing, the target's forwards, everything else
    forwards           of the target for this prompt, the prompt's own left out
    steps              of the group
    widths             {tokens fed per prompt: steps} of the group
    accepted           per depth from 1, the forwards that accepted a guess of that depth
    unconditional      the same over forwards: P(the first i guesses were accepted)
    conditional        the same over the depth before: P(guess i accepted | those before it were)
    tokens_per_forward tokens after the first over forwards, bonus tokens included
    tokens_per_second  of the group
    read_gb_s          weights and cache that the target's forwards read, over `verify`
    peak_memory        bytes, most that the process held during the group (of a GPU: allocated there)
    extra_parameters   of the drafter, not shared with the target
    extra_memory       bytes: those parameters, and what drafting keeps beside the target's cache
    same_as_plain      whether the tokens are plain decoding's; None where another sample of the same law is expected
    differs            where not: first position, both tokens, and the target's gap between its two best logits there
    ids, drafted       the tokens, and "1" for each that was guessed; of the first repeat only
    compiled           whether the target's steps were compiled; peers do as they do
    """

    run: str
    round: str
    method: str
    drafter: str
    settings: dict[str, Any]
    rule: str
    exact: bool
    peer: bool
    requires: str
    task: str
    prompt: str
    prompt_tokens: int
    temperature: float
    seed: int
    batch: int
    group: int
    repeat: int
    tokens: int
    seconds: float
    tokens_per_second: float
    first: float | None = None
    draft: float | None = None
    verify: float | None = None
    own: float | None = None
    forwards: int | None = None
    steps: int | None = None
    widths: dict[int, int] = field(default_factory=dict[int, int])
    accepted: list[int] = field(default_factory=list[int])
    unconditional: list[float] = field(default_factory=list[float])
    conditional: list[float] = field(default_factory=list[float])
    tokens_per_forward: float | None = None
    read_gb_s: float | None = None
    peak_memory: int | None = None
    extra_parameters: int = 0
    extra_memory: int = 0
    same_as_plain: bool | None = None
    differs: dict[str, Any] | None = None
    ids: list[int] | None = None
    drafted: str | None = None
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds timed apart from the rows, for one batch size.

    method    "" for the target: `widths` and `seconds` of its forwards. A method otherwise, on other prompts of `task`:
    draft     seconds of one proposal
    own       seconds of a step outside proposal and forward
    judging   seconds of its forwards over those timed on no text: between proposals caches hold other things
    """

    run: str
    batch: int
    method: str = ""
    task: str = ""
    temperature: float = 0.0
    widths: list[int] = field(default_factory=list[int])
    seconds: list[float] = field(default_factory=list[float])
    draft: float = 0.0
    own: float = 0.0
    judging: float = 1.0


@dataclass(frozen=True, slots=True)
class Skip:
    """A method, or some of its cells, that did not run; batch and temperature are None where all did not."""

    run: str
    method: str
    reason: str
    batch: int | None = None
    temperature: float | None = None

    @property
    def where(self) -> str:
        """The method, and which of its cells if not all."""
        batch = "" if self.batch is None else f", batch {self.batch}"
        return self.method + batch + ("" if self.temperature is None else f", temperature {self.temperature:g}")


Line = Run | Row | Cost | Skip
KINDS: dict[str, type[Line]] = {"run": Run, "row": Row, "cost": Cost, "skip": Skip}
K = TypeVar("K", Run, Row, Cost, Skip)


@dataclass(frozen=True, slots=True)
class Results:
    """Everything in a folder."""

    runs: list[Run]
    rows: list[Row]
    costs: list[Cost]
    skips: list[Skip]


class Writer:
    """Appends lines to a folder's file. Each is on the disk when `write` returns."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mend(folder / FILE)
            self.file = (folder / FILE).open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{str(folder)!r} cannot be written to ({error.strerror}); give --out another folder."
            ) from error

    def write(self, lines: Sequence[Line]) -> None:
        """Write them together, so that a kill leaves all of them or none but a torn last line."""
        names = {kind: name for name, kind in KINDS.items()}
        text = "".join(json.dumps({"kind": names[type(line)], **asdict(line)}) + "\n" for line in lines)
        self.file.write(text)
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def mend(file: Path) -> None:
    """Take off a last line that a kill tore, so that the next one begins on its own."""
    if file.is_file() and not (text := file.read_bytes()).endswith(b"\n"):
        os.truncate(file, text.rfind(b"\n") + 1)


def read(folder: Path) -> Results:
    """The lines of a folder, compressed (.gz) or not; one that a kill tore is left out.

    `UserError` if there are none, or for another version's.
    """
    file = next((f for f in (folder / FILE, folder / f"{FILE}.gz") if f.is_file()), None)
    if file is None:
        raise UserError(f"{str(folder)!r} holds no {FILE}; give a folder that `foretoken bench --out` wrote.")
    try:
        stored = file.read_bytes()
        text = (gzip.decompress(stored) if file.suffix == ".gz" else stored).decode()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{str(file)!r} cannot be read ({error}); restore the file or use a new folder.") from error
    lines = list(parsed(text, file))
    return Results(
        *(sorted_out(lines, kind) for kind in (Run, Row, Cost, Skip))  # pyright: ignore[reportArgumentType]
    )


def sorted_out(lines: list[Line], kind: type[K]) -> list[K]:
    return [line for line in lines if isinstance(line, kind)]


def parsed(text: str, file: Path) -> Iterator[Line]:
    numbered = text.split("\n")
    for number, line in enumerate(numbered, 1):
        if not line:
            continue
        try:
            record = dict[str, Any](json.loads(line))
        except (ValueError, TypeError) as error:
            if number == len(numbered):  # torn: no line break behind it
                return
            raise UserError(
                f"{str(file)!r}, line {number} is no JSON object; restore the file or use a new folder."
            ) from error
        yield made(record, f"{str(file)!r}, line {number}")


def made(record: dict[str, Any], place: str) -> Line:
    """The line that `record` is; `UserError` if another version of foretoken wrote it."""
    kind = KINDS.get(record.pop("kind", ""))
    version = record.get("format", FORMAT)
    known = {f.name for f in fields(kind)} if kind is not None else set[str]()
    if kind is None or version != FORMAT or not set(record) <= known:
        raise UserError(
            f"{place} was written by another version of foretoken (results of format {version}; this one reads "
            f"{FORMAT}); run the benchmark again into a new folder."
        )
    if "widths" in record and kind is Row:
        record["widths"] = {int(width): steps for width, steps in record["widths"].items()}
    try:
        return kind(**record)
    except TypeError as error:
        raise UserError(
            f"{place} lacks fields that this version of foretoken needs; run the benchmark again."
        ) from error
