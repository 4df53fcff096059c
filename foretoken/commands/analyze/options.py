"""Options that all analyses share, and how they end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from foretoken.commands.options import INPUT, MODEL, OUTPUT

Data = Annotated[
    str,
    typer.Option(
        metavar="TEXT",
        help="A file, a folder or a glob of text or JSONL, hf:NAME for a dataset, or stdlib.",
        show_default=False,
        rich_help_panel=INPUT,
    ),
]
Limit = Annotated[int, typer.Option(metavar="N", min=0, help="Tokens of the text; 0: all.", rich_help_panel=INPUT)]
Length = Annotated[
    int,
    typer.Option(metavar="N", min=0, help="Tokens of a window; 0: 512, or the context.", rich_help_panel=INPUT),
]
Models = Annotated[
    str | None,
    typer.Option(metavar="M,M", help="Further models, for the plots against size.", rich_help_panel=MODEL),
]
Out = Annotated[
    Path,
    typer.Option(
        metavar="DIR",
        help="The folder of rows, page and figures; what it holds is gone on with.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]

Least = Annotated[
    float, typer.Option(metavar="P", help="Do not follow paths of two tokens or more less likely than P.")
]
TopP = Annotated[
    float, typer.Option(metavar="P", help="Sum over the likeliest tokens of mass P; 1: over all, which is exact.")
]
Every = Annotated[int, typer.Option(metavar="N", min=1, help="Measure at every N-th position.")]
Seed = Annotated[int, typer.Option(metavar="S", help="Of the continuations that are drawn.")]
Memory = Annotated[
    float | None,
    typer.Option(metavar="GIB", min=0, help="For laws; a quarter of what is free.", rich_help_panel=MODEL),
]


def listed(models: str | None) -> list[str]:
    """The names in a list with commas."""
    return [name for part in (models or "").split(",") if (name := part.strip())]


def finish(folder: Path, kind: str, notes: Sequence[str] = ()) -> None:
    """Write the page of everything in the folder; say what was found, how, and where it is."""
    from rich.console import Console

    from foretoken.report.tables import terminal
    from foretoken.study.page import brief, write

    for note in notes:
        typer.echo(f"Note: {note}", err=True)
    written = write(folder)
    console = Console(highlight=False)
    said, tables = brief(folder, kind)
    for sentence in said:
        console.print(str(sentence), markup=False)
    for table in tables:
        console.print(terminal(table))
    for file in written:
        if file.suffix in (".html", ".md"):
            console.print(str(file), markup=False, soft_wrap=True)
