"""`foretoken distill-data`."""

from pathlib import Path
from typing import Annotated

import typer

from foretoken.commands.options import (
    INPUT,
    OUTPUT,
    Attention,
    Device,
    Drafter,
    Dtype,
    Model,
    NewTokens,
    Seed,
    Settings,
    Temperature,
    TopP,
)


def distill_data(
    model: Model,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="The .jsonl to write, or to go on with.", show_default=False, rich_help_panel=OUTPUT
        ),
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help='One prompt per line, or .jsonl with "prompt" or "turns".', rich_help_panel=INPUT
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Each prompt of the file is what a user says.", rich_help_panel=INPUT)
    ] = False,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="S",
            help="Text to take prompts from: files, a folder, a glob, hf:NAME, stdlib.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(metavar="N", min=2, help="Tokens of a prompt from a source.", rich_help_panel=INPUT)
    ] = 64,
    cuts: Annotated[
        int, typer.Option(metavar="N", min=1, help="Prompts from each document of a source.", rich_help_panel=INPUT)
    ] = 1,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Most prompts.", rich_help_panel=INPUT)] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Prompts decoded together.", rich_help_panel=INPUT)
    ] = 8,
    drafter: Drafter = "suffix",
    set_: Settings = None,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    attention: Attention = None,
) -> None:
    """Let a model write training data for what is to guess it; broken off, the same command goes on."""
    from foretoken.training.distill import run

    run(
        model,
        out,
        prompts=prompts,
        source=source,
        chat=chat,
        prompt_tokens=prompt_tokens,
        cuts=cuts,
        limit=limit,
        drafter=drafter,
        settings=set_ or [],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        attention=attention,
    )
