"""Where a model lies, and where what is made of it once is kept."""

import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from foretoken.bench.peers.environments import root
from foretoken.errors import UserError
from foretoken.saved import DESCRIPTION

VERSION = 1
"""Raised when something else is made of the same weights."""


def folder_of(model: str) -> Path:
    """The folder of a model or drafter, itself or the hub's copy on this machine; `UserError` if there is none."""
    path = Path(model)
    if not path.is_dir():
        try:
            path = Path(snapshot_download(model, local_files_only=True))
        except (LocalEntryNotFoundError, ValueError) as error:
            raise absent(model) from error
    if not any((path / name).is_file() for name in ("config.json", DESCRIPTION)):
        raise absent(model)
    return path.resolve()


def absent(model: str) -> UserError:
    return UserError(
        f"There is no model at {model!r} for a peer to load; give a folder with config.json and model.safetensors, or "
        "the hub name of a model that is on this machine."
    )


def made_of(folder: Path) -> Path:
    """A folder for what is made of these weights: another one when they change."""
    parts = [str(VERSION), str(folder)]
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        stat = path.stat()
        parts.append(f"{path.name} {stat.st_size} {stat.st_mtime_ns}")
    return root() / "files" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
