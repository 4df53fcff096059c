"""`foretoken analyze ceiling`."""

from typing import Annotated

import typer

from foretoken.commands.analyze.options import Data, Length, Limit, Models, Out
from foretoken.commands.options import MODEL, Device, Dtype, Model


def ceiling(
    model: Model,
    data: Data,
    out: Out,
    models: Models = None,
    depth: Annotated[int, typer.Option(metavar="D", min=1, help="Guesses of the longest draft.")] = 3,
    top_p: Annotated[float, typer.Option(metavar="P", help="Sum over the likeliest tokens of mass P.")] = 0.99,
    least: Annotated[
        float, typer.Option(metavar="P", help="Do not follow paths of two tokens or more less likely than P.")
    ] = 0.001,
    every: Annotated[int, typer.Option(metavar="N", min=1, help="Measure at every N-th position.")] = 8,
    limit: Limit = 8_000,
    length: Length = 0,
    seed: Annotated[int, typer.Option(metavar="S", help="Of the continuations that are drawn.")] = 0,
    memory: Annotated[
        float | None,
        typer.Option(metavar="GIB", min=0, help="For laws; a quarter of what is free.", rich_help_panel=MODEL),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Is it worth training a drafter? What ideal ones would gain on this text and machine, from the model alone."""
    from foretoken.commands.analyze.options import finish, listed
    from foretoken.study.ceiling import run
    from foretoken.study.marginal import Settings

    settings = Settings(depth + 1, top_p, least, every, limit, length, seed, dtype)
    finish(out, "ceiling", run([model, *listed(models)], data, out, settings, memory, device))
