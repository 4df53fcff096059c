"""Tables that are written as HTML, as Markdown and to a terminal."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rich import table as rich
from rich.text import Text

from foretoken.page import text_of
from foretoken.report.drawing import Chart
from foretoken.show import visible

DASH, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
BREAKS = re.compile(r"(?<=[:_/=-])")
LONG = 28
"""Characters of words from which a cell may break its line."""
TALL = 24
"""Rows from which a printed table may go on overleaf."""
SPECIAL = re.compile(r"[\\`*\[\]|~#$]|(?<![^\W_])_|_(?![^\W_])")
"""What Markdown could take for markup; an underscore between letters is none."""


class Shown(Protocol):
    """What stands in a cell."""

    def __str__(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Alarm:
    """Text that must not be overlooked."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Table:
    """`left`: the columns, from the first, that hold words; the others hold numbers, but for `words`."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Shown]]
    left: int = 1
    words: Sequence[str] = ()

    def is_text(self, column: int) -> bool:
        return column < self.left or self.head[column] in self.words


@dataclass(frozen=True, slots=True)
class Section:
    """`tables` stand open; `folded` ones hold the figures' numbers, and open at a touch; `free` is HTML."""

    title: str
    notes: Sequence[Shown] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    folded: Sequence[Table] = field(default_factory=list[Table])
    free: str = ""


def html(table: Table) -> str:
    """The table in a box of its own that scrolls sideways where the page is narrow."""
    classes = [' class="w"' if table.is_text(i) else "" for i in range(len(table.head))]
    head = "".join(f'<th scope="col"{c}>{text_of(h)}</th>' for h, c in zip(table.head, classes, strict=True))
    rows = "\n".join(
        "<tr>" + "".join(html_cell(i, cell, c) for i, (cell, c) in enumerate(zip(row, classes, strict=True))) + "</tr>"
        for row in table.rows
    )
    return (
        f'<div class="wide{" tall" * (len(table.rows) > TALL)}" tabindex="0" role="group"><table class="grid">\n'
        f"<caption>{text_of(table.caption)}</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def html_cell(column: int, cell: Shown, style: str) -> str:
    text = text_of(str(cell))
    if len(text) > LONG and style:
        style = ' class="w long"'
    if isinstance(cell, Alarm):
        text = f'<span class="lossy">{text}</span>'
    if column:
        return f"<td{style}>{text}</td>"
    return f'<th scope="row"{style}>{BREAKS.sub("<wbr>", text)}</th>'  # a narrow page breaks long names there


def markdown(table: Table) -> str:
    """The table as GitHub's Markdown."""
    marks = ["---" if table.is_text(i) else "---:" for i in range(len(table.head))]
    lines = [[escaped(h) for h in table.head], marks]
    lines += [[f"**{escaped(str(c))}**" if isinstance(c, Alarm) else escaped(str(c)) for c in r] for r in table.rows]
    return f"{escaped(table.caption)}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def escaped(text: str) -> str:
    """`text` on one line, with nothing in it that Markdown or HTML would take for markup."""
    text = visible(" ".join(text.split("\n")))
    text = SPECIAL.sub(r"\\\g<0>", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def terminal(table: Table) -> rich.Table:
    """The table for a terminal."""
    shown = rich.Table(title=visible(table.caption), title_justify="left", title_style="")
    for i, name in enumerate(table.head):
        words = table.is_text(i)  # they may break their lines, numbers may not
        shown.add_column(Text(visible(name)), justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(visible(str(c)), style="bold red" if isinstance(c, Alarm) else "") for c in row))
    return shown


def times(value: float | None) -> str:
    """A speed-up."""
    return DASH if value is None else f"{value:.2f}{TIMES}"


def fixed(value: float | None, digits: int = 2) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return DASH if value is None else f"{value:.1%}"


def size(count: float) -> str:
    """A count of bytes."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.3g} {unit}" if count else "0"
        count /= 1024
    return f"{count:.3g} GiB"


def amount(count: float) -> str:
    """A count of parameters."""
    for unit in ("", "k", "M"):
        if abs(count) < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}B"


def sameness(same: int, judged: int, exact: bool) -> Shown:
    """How many outputs are plain decoding's."""
    if not judged:
        return "another sample"
    return Alarm(f"{same} of {judged}") if exact and same < judged else f"{same} of {judged}"


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def listed(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))
