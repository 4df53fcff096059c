"""Documents from one string: files of text or JSONL, a dataset of the hub, or Python's own standard library."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, Literal, cast

from foretoken.errors import UserError, unknown
from foretoken.training import stdlib
from foretoken.training.records import Document, draw, of_record

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

SEPARATOR = "<|endoftext|>"
"""Between the documents of a .txt file."""
CHUNK = 1 << 22
"""Characters of a text file read at a time."""
SHARE = 0.02
"""Held-out documents of any source but `stdlib`."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where documents come from.

    name    as the user wrote it
    origin  what is equal if and only if the documents are: files with their sizes and times, or a version
    read    iterates over pairs (document, bytes read so far)
    size    bytes there are to read; 0 if nobody knows
    held    whether `read` itself knows what is held out; otherwise a share of the documents is
    """

    name: str
    origin: list[Any]
    read: Callable[[Split], Iterator[tuple[Document, int]]]
    size: int = 0
    held: bool = False


def documents(source: str, *, split: Split = "train", share: float = SHARE) -> Iterator[Document]:
    """The documents of one split, one at a time, always in the same order.

    source  a file, a folder or a glob (.jsonl: a document per line; .txt: split at <|endoftext|>; other text: a
            document per file), `hf:NAME[:SPLIT[:COLUMN]]` (a dataset of the hub, NAME/CONFIG for one of several, or a
            folder written by `datasets`), or `stdlib`
    share   of the documents that are held out, chosen by their content; `stdlib` holds whole packages out instead
    """
    return (document for document, _ in chosen(open_source(source), split, share))


def chosen(source: Source, split: Split, share: float) -> Iterator[tuple[Document, int]]:
    """The documents of one split of an opened source, each with the bytes read so far."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if not 0 <= share < 1:
        raise UserError(f"The held-out share is {share}; give 0 or more and less than 1.")
    return (
        (document, read)
        for document, read in source.read(split)
        if source.held or (draw(document) < share) == (split == "held_out")
    )


def open_source(name: str) -> Source:
    """The source of that name; `UserError` if there is none."""
    path = Path(name).expanduser()
    if name == "stdlib":
        return standard_library()
    if name.startswith("hf:"):
        return hub(name)
    if is_dataset(path):
        return hub(f"hf:{path}")
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if visible(f.relative_to(path))]
    elif path.is_file():
        files = [path]
    else:
        files = [Path(f) for f in sorted(glob(str(path), recursive=True))]
    files = [f for f in files if f.is_file()]
    if not files and not path.is_dir():
        raise UserError(
            f"There is no file {name!r}; give a file, a folder or a glob of text, hf:NAME for a dataset, or stdlib."
        )
    return of_files(name, files, strict=len(files) == 1)


def visible(path: Path) -> bool:
    return not any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def of_files(name: str, files: list[Path], *, strict: bool) -> Source:
    """The documents of files, in their order. Unless `strict`, files that are no UTF-8 text are left out."""
    stats = [f.stat() for f in files]

    def read(_: Split) -> Iterator[tuple[Document, int]]:
        done = 0
        for file, stat in zip(files, stats, strict=True):
            try:
                for document in of_file(file):
                    yield document, done
            except UnicodeDecodeError as error:
                if strict or file.suffix == ".jsonl":
                    raise UserError(f"{str(file)!r} is no UTF-8 text; convert it first.") from error
            except OSError as error:
                raise UserError(f"{str(file)!r} cannot be read ({error.strerror}); leave it out.") from error
            done += stat.st_size

    origin = [[str(f.absolute()), s.st_size, s.st_mtime_ns] for f, s in zip(files, stats, strict=True)]
    return Source(name, origin, read, sum(s.st_size for s in stats))


def of_file(file: Path) -> Iterator[Document]:
    """The documents of one file that have any text."""
    if file.suffix == ".jsonl":
        yield from of_lines(file)
    elif file.suffix == ".txt":
        yield from separated(file)
    else:
        text = file.read_text("utf-8-sig")
        if text.strip() and "\0" not in text:
            yield text


def separated(file: Path) -> Iterator[str]:
    """The documents of a text file, split at `SEPARATOR`; the whole text, as it is, if there is none."""
    rest, split = "", False
    with file.open(encoding="utf-8-sig") as stream:
        while piece := stream.read(CHUNK):
            *whole, rest = (rest + piece).split(SEPARATOR)
            split = split or bool(whole)
            yield from (text for part in whole if (text := part.strip()))
    if rest.strip():
        yield rest.strip() if split else rest


def of_lines(file: Path) -> Iterator[Document]:
    """The documents of a JSONL file."""
    with file.open(encoding="utf-8-sig") as stream:
        for i, line in enumerate(stream, 1):
            if not line.strip():
                continue
            place = f"{str(file)!r}, line {i}"
            try:
                record: Any = json.loads(line)
            except ValueError as error:
                raise UserError(f"{place} is no JSON; write one object per line.") from error
            if (document := of_record(record, place)) is not None:
                yield document


def standard_library() -> Source:
    """Python's own library on this machine, whole packages of it held out."""
    files = [(f, f.stat()) for f in stdlib.files()]

    def read(split: Split) -> Iterator[tuple[Document, int]]:
        done = 0
        for file, stat in files:
            if stdlib.held_out(file) == (split == "held_out") and (text := stdlib.code(file)).strip():
                yield text, done
            done += stat.st_size

    origin = [[str(f), s.st_size, s.st_mtime_ns] for f, s in files]
    return Source("stdlib", [stdlib.HELD_OUT, *origin], read, sum(s.st_size for _, s in files), held=True)


def is_dataset(path: Path) -> bool:
    """Whether `path` is a folder that `datasets` saved."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def hub(name: str) -> Source:
    """A dataset of the hub, streamed, or one that `datasets` saved in a folder."""
    place, split, column = [*name.removeprefix("hf:").split(":"), "", ""][:3]
    try:
        rows, version = table(place, split or "train")
    except ImportError as error:
        raise UserError(f"{name!r} needs the datasets package; run `pip install datasets`.") from error
    except UserError:
        raise
    except (OSError, ValueError) as error:
        said = str(error).partition("\n")[0]
        raise UserError(f"The dataset {place!r} cannot be read ({said}); check its name and the network.") from error

    def read(_: Split) -> Iterator[tuple[Document, int]]:
        for i, row in enumerate(rows):
            if column and column not in row:
                raise unknown(f"column of {place!r}", column, row)
            record = {"messages" if isinstance(row[column], list) else "text": row[column]} if column else row
            if (document := of_record(record, f"{name!r}, row {i}")) is not None:
                yield document, 0

    return Source(name, [place, split, column, version], read)


def table(place: str, split: str) -> tuple[Any, str]:
    """The rows of a dataset's split, and what tells their version."""
    import datasets

    if is_dataset(Path(place)):
        loaded = datasets.load_from_disk(place)
        splits = {str(k): v for k, v in loaded.items()} if isinstance(loaded, datasets.DatasetDict) else {split: loaded}
        if split not in splits:
            raise unknown(f"split of {place!r}", split, splits)
        rows: Any = splits[split]
        return rows, str(rows._fingerprint)
    configured = place.count("/") == 2 and not Path(place).exists()
    repository, config = place.rsplit("/", 1) if configured else (place, None)
    builder: Any = datasets.load_dataset_builder(repository, config)
    known = cast(dict[str, Any], builder.info.splits or {})
    if known and split not in known:
        raise unknown(f"split of {place!r}", split, known)
    return builder.as_streaming_dataset(split), str(builder.hash)
