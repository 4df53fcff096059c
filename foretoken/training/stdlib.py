"""The files of Python's own library on this machine: code that every machine has."""

import tokenize
from pathlib import Path
from sysconfig import get_paths

HELD_OUT = ("concurrent", "http", "json", "logging", "tomllib", "wsgiref", "zoneinfo")
"""Packages that are no training data, with their tests."""
NO_CODE = ("__pycache__", "data", "dist-packages", "encoded_modules", "encodings", "pydoc_data", "site-packages")
NO_CODE_PREFIXES = ("_sysconfigdata", "bad_", "badsyntax", "config-")
"""Parts that hold tables, other people's code, or broken code for tests."""
LARGEST = 300_000
"""Bytes of a file; larger ones are tables, or would drown the rest."""


def root() -> Path:
    return Path(get_paths()["stdlib"])


def files() -> list[Path]:
    """The files of code, of all splits, sorted."""
    top = root()
    return [
        file
        for file in sorted(top.rglob("*.py"))
        if not any(p in NO_CODE or p.startswith(NO_CODE_PREFIXES) for p in file.relative_to(top).parts)
        and 0 < file.stat().st_size <= LARGEST
    ]


def held_out(file: Path) -> bool:
    """Whether a file belongs to a held-out package, or tests one."""
    tests = tuple(f"test_{name}" for name in HELD_OUT)
    parts = file.relative_to(root()).parts
    return any(part.removesuffix(".py") in HELD_OUT or part.startswith(tests) for part in parts)


def code(file: Path) -> str:
    """The text of a file that is UTF-8 and says nothing else; otherwise nothing."""
    try:
        with file.open("rb") as stream:
            encoding, _ = tokenize.detect_encoding(stream.readline)
        text = file.read_text("utf-8-sig") if encoding.startswith("utf-8") else ""
    except (SyntaxError, UnicodeDecodeError):
        return ""
    return "" if "\0" in text else text
