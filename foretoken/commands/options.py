"""Options that several commands share."""

import math
from typing import Annotated

import typer

from foretoken.errors import UserError

METHOD, SAMPLING, MODEL, INPUT, OUTPUT = "Method", "Sampling", "Model", "Input", "Output"

Model = Annotated[str, typer.Argument(help="Folder of a transformers checkpoint, or a hub name.", show_default=False)]
Drafter = Annotated[
    str,
    typer.Option(metavar="NAME[:PATH]", help="What guesses; `foretoken drafters` lists them.", rich_help_panel=METHOD),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the drafter; repeatable.", rich_help_panel=METHOD),
]
Rule = Annotated[
    str,
    typer.Option(
        help="Which guesses survive: match, rejection and block are exact, lossy_... are not.", rich_help_panel=METHOD
    ),
]
NewTokens = Annotated[int, typer.Option(metavar="N", help="Most tokens of an answer.", rich_help_panel=SAMPLING)]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End the answer before this text; repeatable.", rich_help_panel=SAMPLING),
]
Temperature = Annotated[float, typer.Option(metavar="T", help="0 is greedy.", rich_help_panel=SAMPLING)]
TopK = Annotated[int, typer.Option(metavar="K", help="Keep the K likeliest tokens; 0: all.", rich_help_panel=SAMPLING)]
TopP = Annotated[
    float, typer.Option(metavar="P", help="Keep the likeliest tokens of mass P.", rich_help_panel=SAMPLING)
]
MinP = Annotated[
    float,
    typer.Option(metavar="P", help="Keep tokens at least P times as likely as the peak.", rich_help_panel=SAMPLING),
]
Repetition = Annotated[
    float, typer.Option(metavar="X", help="Divide positive logits of seen tokens; 1: off.", rich_help_panel=SAMPLING)
]
Presence = Annotated[
    float, typer.Option(metavar="X", help="Subtract once from logits of emitted tokens.", rich_help_panel=SAMPLING)
]
Frequency = Annotated[
    float, typer.Option(metavar="X", help="Subtract per occurrence in the output.", rich_help_panel=SAMPLING)
]
Seed = Annotated[int, typer.Option(metavar="S", help="Same seed, same sample.", rich_help_panel=SAMPLING)]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="D", help="float32, bfloat16, ...; as saved if not given.", rich_help_panel=MODEL),
]
Device = Annotated[
    str | None, typer.Option(metavar="D", help="cpu, cuda, ...; a GPU if there is one.", rich_help_panel=MODEL)
]
Attention = Annotated[
    str | None, typer.Option(metavar="A", help="transformers' attention: sdpa, eager, ...", rich_help_panel=MODEL)
]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="Compile the model's steps for this processor.", rich_help_panel=MODEL),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        metavar="Q", help="int8: rounded weights, which are another model; needs torchao.", rich_help_panel=MODEL
    ),
]
Show = Annotated[bool, typer.Option("--show", help="Colour each token by how it came.", rich_help_panel=OUTPUT)]


def numbers(option: str, text: str) -> list[float]:
    """The numbers in `text`, separated by commas."""
    try:
        found = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        found = []
    if not found or not all(0 <= n < math.inf for n in found):
        raise UserError(f"{option} is {text!r}; give numbers of 0 or more, separated by commas.")
    return found
