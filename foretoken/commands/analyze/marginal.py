"""`foretoken analyze marginal`."""

from typing import Annotated

import typer

from foretoken.commands.analyze.options import Data, Length, Limit, Models, Out
from foretoken.commands.options import MODEL, Device, Dtype, Model


def marginal(
    model: Model,
    data: Data,
    out: Out,
    models: Models = None,
    horizon: Annotated[int, typer.Option(metavar="K", min=2, help="Look K tokens ahead.")] = 2,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Sum over the likeliest tokens of mass P; 1: over all, which is exact.")
    ] = 0.99,
    least: Annotated[
        float, typer.Option(metavar="P", help="Do not follow paths of two tokens or more less likely than P.")
    ] = 0.0,
    every: Annotated[int, typer.Option(metavar="N", min=1, help="Measure at every N-th position.")] = 1,
    limit: Limit = 20_000,
    length: Length = 0,
    seed: Annotated[int, typer.Option(metavar="S", help="Of the continuations that are drawn.")] = 0,
    memory: Annotated[
        float | None,
        typer.Option(metavar="GIB", min=0, help="For laws; a quarter of what is free.", rich_help_panel=MODEL),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """What a next-token model knows of tokens further ahead, by summing over those between."""
    from foretoken.commands.analyze.options import finish, listed
    from foretoken.study.marginal import Settings, run

    settings = Settings(horizon, top_p, least, every, limit, length, seed, dtype)
    finish(out, "marginal", run([model, *listed(models)], data, out, settings, memory, device))
