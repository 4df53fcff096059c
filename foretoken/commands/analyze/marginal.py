"""`foretoken analyze marginal`."""

from typing import Annotated

import typer

from foretoken.commands.analyze.options import Data, Every, Least, Length, Limit, Memory, Models, Out, Seed, TopP
from foretoken.commands.options import Device, Dtype, Model


def marginal(
    model: Model,
    data: Data,
    out: Out,
    models: Models = None,
    horizon: Annotated[int, typer.Option(metavar="K", min=2, help="Look K tokens ahead.")] = 2,
    top_p: TopP = 0.99,
    least: Least = 0.0,
    every: Every = 1,
    limit: Limit = 20_000,
    length: Length = 0,
    seed: Seed = 0,
    memory: Memory = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """What a next-token model knows of tokens further ahead, by summing over those between."""
    from foretoken.commands.analyze.options import finish, listed
    from foretoken.study.marginal import Settings, run

    settings = Settings(horizon, top_p, least, every, limit, length, seed, dtype)
    finish(out, "marginal", run([model, *listed(models)], data, out, settings, memory, device))
