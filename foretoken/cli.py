"""The command `foretoken`. It only parses: each subcommand imports its module when it runs, so that help is instant."""

import io
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from foretoken.errors import UserError


class Commands(TyperGroup):
    """Turns what a user did wrong into one sentence on stderr and exit code 2; a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            sentence = str(error)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            sentence = "Memory ran out; use a smaller batch, fewer new tokens or a smaller --dtype."
        except KeyboardInterrupt:
            typer.echo(err=True)  # the shell's prompt starts a line of its own
            raise typer.Exit(130) from None
        typer.echo(f"foretoken: {sentence}", err=True)
        raise typer.Exit(2)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that an allocation failed, on the host or on a GPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


app = typer.Typer(
    name="foretoken",
    cls=Commands,
    help="Several tokens per forward pass from any transformers causal LM, with the output unchanged.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

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
Show = Annotated[bool, typer.Option("--show", help="Colour each token by how it came.", rich_help_panel=OUTPUT)]


@app.command()
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
    ask = Ask(model, drafter, set_ or [], rule, max_new_tokens, stop or [], sampling, dtype, device, attention)
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


@app.command()
def chat(
    model: Model,
    drafter: Drafter = "suffix",
    set_: Settings = None,
    rule: Rule = "match",
    max_new_tokens: NewTokens = 512,
    stop: Stop = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Repetition = 1.0,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    attention: Attention = None,
    show: Show = False,
) -> None:
    """Talk to a model on the terminal."""
    from foretoken.answer import Ask
    from foretoken.chat import chat as talk

    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    ask = Ask(model, drafter, set_ or [], rule, max_new_tokens, stop or [], sampling, dtype, device, attention)
    talk(ask, show=show)


@app.command()
def check(
    model: Model,
    dtype: Dtype = None,
    device: Device = None,
    attention: Attention = None,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Run trees through a model and compare with sequential forwards: can it be decoded exactly?"""
    from json import dumps

    from foretoken.answer import quiet_loading
    from foretoken.check import as_dict, render
    from foretoken.check import check as compare
    from foretoken.loading import load

    quiet_loading(model)
    report = compare(load(model, dtype=dtype, device=device, attention=attention))
    typer.echo(dumps(as_dict(report)) if json else render(report))
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def bench_step(
    model: Annotated[str, typer.Argument(help="A model, or synthetic-134m for random weights.", show_default=False)],
    widths: Annotated[str, typer.Option(metavar="N,N,...", help="Tokens per forward.")] = "1,2,4,8,16,32,64",
    context: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens read before.")] = 256,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Measurements of each width.")] = 15,
    dtype: Dtype = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Write the measurement as JSON.")] = None,
) -> None:
    """Measure what a forward costs at each width."""
    asked = numbers("--widths", widths)
    if min(asked) < 1 or any(n != int(n) for n in asked):
        raise UserError(f"--widths is {widths!r}; give whole numbers of 1 or more, separated by commas.")
    from foretoken.bench.step import run

    run(model, dtype, [int(n) for n in asked], context, repeats, out)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; see recipes/.", show_default=False)],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="In place of what the recipe says.", show_default=False),
    ] = None,
) -> None:
    """Train heads for a model, or a model with heads, as a recipe says; broken off, the same command goes on."""
    try:
        from foretoken.training.loop import run
    except ImportError as error:
        raise UserError(f"Training needs {error.name}; run `pip install 'foretoken[train]'`.") from error

    run(recipe, settings or [])


@app.command()
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


@app.command()
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


@app.command()
def demo() -> None:
    """Decode with every drafter on a model that travels with the package, and compare with plain decoding."""
    from foretoken.demo import run

    if not run():
        raise typer.Exit(1)


@app.command()
def drafters() -> None:
    """List every drafter with its settings and their defaults."""
    from foretoken.catalogue import show

    show()


def numbers(option: str, text: str) -> list[float]:
    """The numbers in `text`, separated by commas."""
    try:
        found = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise UserError(f"{option} is {text!r}; give numbers of 0 or more, separated by commas.")
    return found


def main() -> None:
    """Run the command line. Warnings of libraries are not for its users, unless Python was asked to show them."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    app(prog_name="foretoken")


if __name__ == "__main__":
    main()
