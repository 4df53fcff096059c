"""`foretoken report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER [FOLDER]",
            help="What `foretoken bench --out` wrote; two are compared.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to write the report; otherwise beside the results.")
    ] = None,
) -> None:
    """Write a page and Markdown from measurements: tables, figures, texts."""
    from foretoken.bench.predict import predicted
    from foretoken.bench.report.page import run

    run(folders, out, predicted)
