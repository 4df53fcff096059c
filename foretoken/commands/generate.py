"""`foretoken generate`."""

from pathlib import Path
from typing import Annotated

import typer

from foretoken.commands.options import (
    INPUT,
    OUTPUT,
    Attention,
    Compile,
    Device,
    Drafter,
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
    Show,
    Stop,
    Temperature,
    TopK,
    TopP,
)
from foretoken.errors import UserError


def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The prompt; - reads standard input.", rich_help_panel=INPUT)
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file that is the prompt.", rich_help_panel=INPUT)
    ] = None,
    batch_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help='One prompt per line, or .jsonl with "prompt" or "turns".', rich_help_panel=INPUT
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Prompts decoded together.", rich_help_panel=INPUT)
    ] = 8,
    drafter: Drafter = "suffix",
    set_: Settings = None,
    rule: Rule = "match",
    max_new_tokens: NewTokens = 128,
    stop: Stop = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Repetition = 1.0,
    presence_penalty: Presence = 0.0,
    frequency_penalty: Frequency = 0.0,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    attention: Attention = None,
    quantize: Quantize = None,
    compiled: Compile = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON per prompt.", rich_help_panel=OUTPUT)
    ] = False,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="With each token's log-probability.", rich_help_panel=OUTPUT)
    ] = False,
    show: Show = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page that shows how each token came.", rich_help_panel=OUTPUT),
    ] = None,
) -> None:
    """Continue a prompt, or every prompt of a file."""
    from foretoken.answer import Ask, answer
    from foretoken.prompts import batch, one_prompt

    if batch_file is not None and (prompt is not None or prompt_file is not None):
        raise UserError("--batch-file came with another prompt; give one of them.")
    texts = batch(batch_file) if batch_file is not None else [one_prompt(prompt, prompt_file)]
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
    ask = Ask(
        model,
        drafter,
        set_ or [],
        rule,
        max_new_tokens,
        stop or [],
        sampling,
        dtype,
        device,
        attention,
        quantize,
        compiled,
    )
    answer(
        ask,
        texts,
        lines=batch_file is not None,
        batch_size=batch_size,
        logprobs=logprobs,
        as_json=json,
        show=show,
        html=html,
    )
