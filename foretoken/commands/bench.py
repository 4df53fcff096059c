"""`foretoken bench`."""

from pathlib import Path
from typing import Annotated

import typer

from foretoken.commands.options import (
    INPUT,
    METHOD,
    OUTPUT,
    SAMPLING,
    Attention,
    Compile,
    Device,
    Dtype,
    Model,
    numbers,
)
from foretoken.errors import UserError


def bench(
    model: Model,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="The folder for rows.jsonl.", show_default=False, rich_help_panel=OUTPUT),
    ],
    drafters: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:PATH][,KEY=VALUE],...",
            help="Compared with plain decoding: methods, or @FILE of `foretoken tune`; rule=R judges by another rule; "
            "repeatable. Without: prompt_lookup,suffix,jacobi,lookahead.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            metavar="P,P", help="Other programs: transformers, vllm, llama_cpp, openvino.", rich_help_panel=METHOD
        ),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(
            metavar="TASK|FILE,...",
            help="code, copy, random, chat, translation, ... or files of prompts.",
            rich_help_panel=INPUT,
        ),
    ] = "code",
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts of each task.", rich_help_panel=INPUT)] = 8,
    prompt_tokens: Annotated[
        int, typer.Option(metavar="N", min=2, help="Tokens of a prompt cut from a text.", rich_help_panel=INPUT)
    ] = 96,
    batch: Annotated[str, typer.Option(metavar="N,N", help="Prompts decoded together.", rich_help_panel=INPUT)] = "1",
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=2, help="Most tokens of an answer.", rich_help_panel=SAMPLING)
    ] = 128,
    temperature: Annotated[str, typer.Option(metavar="T,T", help="0 is greedy.", rich_help_panel=SAMPLING)] = "0",
    seed: Annotated[int, typer.Option(metavar="S", help="Of prompts and samples.", rich_help_panel=SAMPLING)] = 0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on behind end tokens.", rich_help_panel=SAMPLING)
    ] = False,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Measurements of each prompt.")] = 3,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what the folder holds.", rich_help_panel=OUTPUT)
    ] = False,
    dtype: Dtype = None,
    device: Device = None,
    attention: Attention = None,
    compiled: Compile = False,
) -> None:
    """Compare methods with plain decoding on your model, prompts and machine; broken off, --resume goes on."""
    from foretoken.bench.cells import Ask
    from foretoken.bench.compare import run, show

    sizes = numbers("--batch", batch)
    if any(n < 1 or n != int(n) for n in sizes):
        raise UserError(f"--batch is {batch!r}; give whole numbers of 1 or more, separated by commas.")
    ask = Ask(
        model,
        drafters or ["prompt_lookup,suffix,jacobi,lookahead"],
        prompts,
        out,
        [p.strip() for p in (peers or "").split(",") if p.strip()],
        limit,
        prompt_tokens,
        max_new_tokens,
        list(dict.fromkeys(map(int, sizes))),
        list(dict.fromkeys(numbers("--temperature", temperature))),
        repeats,
        seed,
        ignore_eos,
        dtype,
        device,
        attention,
        resume,
        compiled,
    )
    try:
        show(run(ask), out)
    except KeyboardInterrupt:
        typer.echo(f"\nStopped; what was measured is in {out}, and the same command with --resume goes on.", err=True)
        raise typer.Exit(130) from None
