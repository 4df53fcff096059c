"""`foretoken explain`."""

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
    Frequency,
    MinP,
    Model,
    NewTokens,
    Presence,
    Quantize,
    Repetition,
    Rule,
    Seed,
    Settings,
    Temperature,
    TopK,
    TopP,
)

NAME = "NAME[:PATH]"


def explain(
    model: Model,
    b: Annotated[str, typer.Option("--b", metavar=NAME, help="What is explained.", rich_help_panel=METHOD)],
    a: Annotated[
        str, typer.Option("--a", metavar=NAME, help="What it is compared with.", rich_help_panel=METHOD)
    ] = "none",
    set_: Settings = None,
    set_a: Annotated[
        list[str] | None,
        typer.Option("--set-a", metavar="KEY=VALUE", help="The same for --a.", rich_help_panel=METHOD),
    ] = None,
    rule: Rule = "match",
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The prompt; - reads standard input.", rich_help_panel=INPUT)
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file that is the prompt.", rich_help_panel=INPUT)
    ] = None,
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Repetition = 1.0,
    presence_penalty: Presence = 0.0,
    frequency_penalty: Frequency = 0.0,
    seed: Seed = 0,
    number: Annotated[
        int, typer.Option(metavar="N", help="The prompt's number in its batch.", rich_help_panel=SAMPLING)
    ] = 0,
    dtype: Dtype = None,
    device: Device = None,
    attention: Attention = None,
    quantize: Quantize = None,
    compiled: Compile = False,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Find the first token at which two drafters' outputs part: a numerical tie or a bug?"""
    from foretoken.explain import run
    from foretoken.prompts import one_prompt

    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
    }
    found = run(
        model,
        one_prompt(prompt, prompt_file),
        a,
        b,
        settings_a=set_a or [],
        settings_b=set_ or [],
        rule=rule,
        sampling=sampling,
        number=number,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        device=device,
        attention=attention,
        quantize=quantize,
        compile=compiled,
        as_json=json,
    )
    if found == "bug":
        raise typer.Exit(1)
