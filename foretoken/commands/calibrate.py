"""`foretoken calibrate`."""

from pathlib import Path
from typing import Annotated

import typer

from foretoken.commands.options import INPUT, METHOD, SAMPLING, Device, Dtype, Model, NewTokens, Seed, numbers


def calibrate(
    model: Model,
    drafter: Annotated[
        str, typer.Argument(metavar="NAME:PATH", help="A drafter in a folder; the trees are stored there.")
    ],
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="One prompt per line, or .jsonl.", rich_help_panel=INPUT)
    ] = None,
    source: Annotated[
        str, typer.Option(metavar="S", help="Without a file: pieces of this training text.", rich_help_panel=INPUT)
    ] = "stdlib",
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Most prompts.", rich_help_panel=INPUT)] = 64,
    prompt_tokens: Annotated[
        int, typer.Option(metavar="N", min=2, help="Tokens of a piece.", rich_help_panel=INPUT)
    ] = 64,
    nodes: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Guesses of a tree; 0: as many as pay on this machine.", rich_help_panel=METHOD
        ),
    ] = 63,
    depth: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Guesses on the longest path; 0: the drafter's own.", rich_help_panel=METHOD
        ),
    ] = 0,
    temperatures: Annotated[
        str, typer.Option(metavar="T,T,...", help="A tree for each.", rich_help_panel=SAMPLING)
    ] = "0,1",
    max_new_tokens: NewTokens = 128,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Measure how often a drafter's guesses are right, and store the trees that suit it."""
    from foretoken.training.calibrate import run

    run(
        model,
        drafter,
        prompts=prompts,
        source=source,
        limit=limit,
        prompt_tokens=prompt_tokens,
        nodes=nodes,
        depth=depth,
        temperatures=numbers("--temperatures", temperatures),
        max_new_tokens=max_new_tokens,
        seed=seed,
        dtype=dtype,
        device=device,
    )
