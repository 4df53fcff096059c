"""`foretoken analyze heads`."""

from typing import Annotated

import typer

from foretoken.commands.analyze.options import Data, Length, Limit, Out
from foretoken.commands.options import METHOD, Device, Dtype, Model


def heads(
    model: Model,
    data: Data,
    out: Out,
    drafter: Annotated[
        list[str],
        typer.Option(
            metavar="NAME:PATH[,KEY=VALUE]",
            help="Heads that were trained for the model; repeatable.",
            show_default=False,
            rich_help_panel=METHOD,
        ),
    ],
    on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="The same heads on another target, such as a fine-tuned one; repeatable.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    limit: Limit = 20_000,
    length: Length = 0,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Accuracy and acceptance of trained heads by depth, context and position, and their ceiling."""
    from foretoken.commands.analyze.options import finish
    from foretoken.study.heads import run

    run(model, drafter, data, out, on=on or (), limit=limit, length=length, dtype=dtype, device=device)
    finish(out, "heads")
