"""What a section found: its lines as a table, its figures beside what they are to reach, a record in JSON."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from foretoken.machine import Machine

LONG = ("peers", "seconds", "memory")
"""What the record alone has."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number that is promised. most: it must not be exceeded, instead of being reached."""

    name: str
    measured: float
    bar: float
    most: bool = False

    @property
    def met(self) -> bool:
        return self.measured <= self.bar if self.most else self.measured >= self.bar

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}


@dataclass(frozen=True, slots=True)
class Found:
    """Lines with the same columns, the promised figures, and what else was noted."""

    lines: Sequence[dict[str, Any]]
    figures: Sequence[Figure]
    about: dict[str, Any] = field(default_factory=dict[str, Any])


def show(title: str, found: Found) -> None:
    """Print the tables."""
    console = Console(highlight=False)
    table = Table(*found.lines[0], title=title, title_justify="left")
    for line in found.lines:
        table.add_row(*map(cell, line.values()))
    console.print(table)
    if found.figures:
        table = Table("figure", "measured", "to reach", "", title="Promised", title_justify="left")
        for figure in found.figures:
            bar = f"{'at most' if figure.most else 'at least'} {cell(figure.bar)}"
            table.add_row(figure.name, cell(figure.measured), bar, "" if figure.met else "missed")
        console.print(table)
    for name, value in found.about.items():
        if name not in LONG:
            console.print(f"{name}: {value}", style="dim", markup=False)


def cell(value: object) -> str:
    """A number with the digits that mean something."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "-" if value is None else str(value)


def write(section: str, found: Found, out: Path) -> None:
    """The record of a section."""
    record = {
        "command": " ".join(["benchmarks/speed", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "section": section,
        "machine": Machine.here().as_dict(),
        **found.about,
        "lines": found.lines,
        "figures": [figure.record() for figure in found.figures],
    }
    out.write_text(json.dumps(record, indent=1) + "\n")
