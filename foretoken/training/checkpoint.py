"""Checkpoints that a kill at any moment leaves whole: written beside, synced, then renamed."""

import errno
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from foretoken.errors import UserError

KEPT = 2
"""Newest checkpoints that stay."""
FILE = "state.pt"


def write(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Store `state` as what a run is after `step` steps; its folder. Checkpoints before the last two go."""
    place = folder / f"step-{step:08d}"
    draft = folder / f".{place.name}.part"
    try:
        for left in folder.glob(".step-*.part"):  # of runs that were killed while they wrote
            shutil.rmtree(left, ignore_errors=True)
        draft.mkdir(parents=True)
        synced(draft / FILE, lambda file: torch.save(state, file))
        shutil.rmtree(place, ignore_errors=True)
        draft.rename(place)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise UserError(
            f"The checkpoint of step {step} could not be written to '{folder}' ({reason(error)}); earlier ones are "
            "whole: make room and start again to go on from them."
        ) from error
    for old in all_of(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def write_text(path: Path, text: str) -> None:
    """Put `text` in place of what the file holds, all of it or nothing."""
    draft = path.with_name(f".{path.name}.part")
    synced(draft, lambda file: file.write(text.encode()))
    draft.replace(path)


def synced(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Make a file of what `fill` writes, and wait until the disk has it."""
    with path.open("wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's names, where folders can be synced."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def reason(error: BaseException) -> str:
    """Why it failed, in a few words."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            return "the disk is full"
        cause = cause.__cause__ or cause.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def all_of(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def newest(folder: Path) -> Path | None:
    """The last checkpoint in `folder`, if there is one."""
    return next(reversed(all_of(folder)), None)


def read(place: Path) -> dict[str, Any]:
    """The state stored in one checkpoint; `UserError` if a byte of it is lost."""
    try:
        with zipfile.ZipFile(place / FILE) as archive:  # torch reads a damaged archive without complaint
            if (part := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{part} is damaged")
        return torch.load(place / FILE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(
            f"The checkpoint '{place}' cannot be read ({reason(error)}); delete it to go on from the one before."
        ) from error
