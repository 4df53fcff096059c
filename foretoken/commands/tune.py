"""`foretoken tune`."""

from pathlib import Path
from typing import Annotated

import typer

from foretoken.commands.options import INPUT, METHOD, OUTPUT, SAMPLING, Attention, Compile, Device, Dtype, Model


def tune(
    model: Model,
    drafters: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:PATH][,KEY=VALUE],...",
            help="What to choose from, or @FILE; what is given stays. Without: prompt_lookup,suffix,lookahead.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(
            metavar="TASK|FILE,...", help="Text like yours: your own prompts, or a task.", rich_help_panel=INPUT
        ),
    ] = "code",
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts of each task.", rich_help_panel=INPUT)] = 8,
    batch: Annotated[
        int, typer.Option(metavar="N", min=1, help="Prompts decoded together.", rich_help_panel=INPUT)
    ] = 1,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=8, help="Most tokens of an answer.", rich_help_panel=SAMPLING)
    ] = 96,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0, help="0 is greedy.", rich_help_panel=SAMPLING)
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="S", help="Of prompts and samples.", rich_help_panel=SAMPLING)] = 0,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The settings, for --drafter @FILE.", rich_help_panel=OUTPUT)
    ] = Path("tuned.json"),
    dtype: Dtype = None,
    device: Device = None,
    attention: Attention = None,
    compiled: Compile = False,
) -> None:
    """Choose the drafter and the draft that are fastest on this machine, or say that none pays."""
    from foretoken.bench.tune import run

    run(
        model,
        drafters or ["prompt_lookup,suffix,lookahead"],
        prompts,
        out,
        limit=limit,
        batch=batch,
        temperature=temperature,
        new=max_new_tokens,
        seed=seed,
        dtype=dtype,
        device=device,
        attention=attention,
        compile=compiled,
    )
