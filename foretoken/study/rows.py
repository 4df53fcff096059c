"""What an analysis writes: a file of JSON lines per model, each finished before the next begins.

The first line says what was analysed and how, the last how it went; between them there is a row per position, windows
in order. A file without its last line is gone on with: rows of a window that may be incomplete are measured again.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from filelock import BaseFileLock, FileLock, Timeout

from foretoken.errors import UserError

FORMAT = 1
"""Raised when a row changes its meaning."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Head:
    """The first line.

    kind        of analysis: marginal, layers, heads
    model       as the user named it
    label       a short name, for figures and for the file
    parameters  of the model
    data        as the user named it
    settings    what must be the same to go on
    machine     processor, versions
    """

    kind: str
    model: str
    label: str
    parameters: int
    data: str
    settings: dict[str, Any]
    machine: dict[str, Any] = field(default_factory=dict[str, Any])
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Rows:
    """A file: its first line, its rows, and its last line (None: it was not finished)."""

    head: Head
    rows: list[Row]
    end: Row | None


def name_of(path: str) -> str:
    """The last part of a path or of a hub name."""
    return Path(path).resolve().name or path


def file_of(folder: Path, head: Head) -> Path:
    """Where the rows of this analysis belong."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in f"{head.label}-{Path(head.data).stem}")
    return folder / f"{head.kind}-{name}.jsonl"


class Writer:
    """Appends the rows of windows to a file; what it holds is gone on with if it was begun with the same settings."""

    def __init__(self, folder: Path, head: Head) -> None:
        """`begun`: the first window that is not finished yet; `finished`: whether nothing is left to do."""
        self.path = file_of(folder, head)
        self.begun, self.finished = 0, False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = alone(self.path)
            try:
                self._begin(head)
            except BaseException:
                released(self.lock)
                raise
        except OSError as error:
            raise UserError(
                f"{str(folder)!r} cannot be written to ({error.strerror}); give --out another folder."
            ) from error

    def _begin(self, head: Head) -> None:
        if self.path.is_file() and self.path.stat().st_size:
            self._go_on(head)
        else:
            self.path.write_text(line({"head": asdict(head)}), "utf-8")
        self.file = self.path.open("a", encoding="utf-8")

    def _go_on(self, head: Head) -> None:
        """Keep finished windows; `UserError` if the file is of another analysis."""
        found = read(self.path)
        ours, theirs = ({**asdict(h), "machine": None} for h in (head, found.head))
        if ours != theirs:
            differing = next(k for k in ours if ours[k] != theirs[k])
            raise UserError(
                f"{str(self.path)!r} was begun with another {differing} ({shown(theirs[differing], ours[differing])}); "
                "give --out another folder, or remove the file."
            )
        self.finished = found.end is not None
        last = max((row["window"] for row in found.rows), default=0)
        self.begun = last + 1 if self.finished else last
        if not self.finished:
            kept = [line({"head": asdict(found.head)}), *(line(r) for r in found.rows if r["window"] < last)]
            draft = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
            draft.write_text("".join(kept), "utf-8")
            draft.replace(self.path)

    def write(self, rows: Iterable[Row]) -> None:
        """Add the rows of one window."""
        self.file.write("".join(map(line, rows)))
        self.file.flush()
        os.fsync(self.file.fileno())

    def end(self, facts: Row) -> None:
        """Say that everything is done."""
        self.write([{"end": facts}])
        self.finished = True

    def close(self) -> None:
        self.file.close()
        released(self.lock)


def alone(path: Path) -> BaseFileLock:
    """The lock of a file that nobody else writes: to go on with it is to replace it, under another writer's hands."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"{str(path)!r} is being written by another command; wait for it, or give --out another folder."
        ) from error
    return lock


def released(lock: BaseFileLock) -> None:
    """Give it back and leave no file; while it is held, nobody else's is taken away."""
    with suppress(OSError):  # where a file that is open cannot be removed it stays
        Path(lock.lock_file).unlink()
    lock.release()


def shown(theirs: object, ours: object) -> str:
    """What differs, at the first place where it does."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        a, b = cast(Row, theirs), cast(Row, ours)
        key = next(k for k in (*a, *b) if a.get(k) != b.get(k))
        return f"{key}: {a.get(key)!r}, now {b.get(key)!r}"
    return f"{theirs!r}, now {ours!r}"


def short(x: float, digits: int = 6) -> float:
    """x with so many significant digits, so that files stay small; whole numbers as they are."""
    return x if isinstance(x, int) else float(f"{x:.{digits}g}")


def line(record: Row) -> str:
    return json.dumps(record, separators=(",", ":")) + "\n"


def read(path: Path) -> Rows:
    """The file's rows; a last line that a kill tore is left out. `UserError` if it is of another kind or version."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({error}); remove it and analyse again.") from error
    lines = text.split("\n")[:-1]
    try:
        records = [dict[str, Any](json.loads(one)) for one in lines]
        head = Head(**records[0]["head"])
        ends = [record["end"] for record in records if "end" in record]
        rows = [record for record in records[1:] if "end" not in record]
        if head.format != FORMAT or not all(isinstance(row["window"], int) for row in rows):
            raise ValueError
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(
            f"{str(path)!r} is no file that this version of `foretoken analyze` wrote; remove it and analyse again."
        ) from error
    return Rows(head, rows, ends[-1] if ends else None)


def found(folder: Path, kind: str) -> list[Rows]:
    """Every finished file of that kind in the folder, smallest model first."""
    files = [read(path) for path in sorted(folder.glob(f"{kind}-*.jsonl"))]
    return sorted((f for f in files if f.end is not None), key=lambda f: (f.head.data, f.head.parameters))
