"""`foretoken analyze ceiling`."""

from typing import Annotated

import typer

from foretoken.commands.analyze.options import Data, Every, Least, Length, Limit, Memory, Models, Out, Seed, TopP
from foretoken.commands.options import Device, Dtype, Model


def ceiling(
    model: Model,
    data: Data,
    out: Out,
    models: Models = None,
    depth: Annotated[int, typer.Option(metavar="D", min=1, help="Guesses of the longest draft.")] = 3,
    top_p: TopP = 0.99,
    least: Least = 0.001,
    every: Every = 8,
    limit: Limit = 8_000,
    length: Length = 0,
    seed: Seed = 0,
    memory: Memory = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Is it worth training a drafter? What ideal ones would gain on this text and machine, from the model alone."""
    from foretoken.commands.analyze.options import finish, listed
    from foretoken.study.ceiling import run
    from foretoken.study.marginal import Settings

    settings = Settings(depth + 1, top_p, least, every, limit, length, seed, dtype)
    finish(out, "ceiling", run([model, *listed(models)], data, out, settings, memory, device))
