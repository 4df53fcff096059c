"""The command `foretoken`. It only parses: each subcommand imports its module when it runs, so that help is instant."""

import io
import os
import sys
import warnings
from typing import Any

import typer

from foretoken.commands.analyze import analyze
from foretoken.commands.bench import bench
from foretoken.commands.bench_step import bench_step
from foretoken.commands.calibrate import calibrate
from foretoken.commands.chat import chat
from foretoken.commands.check import check
from foretoken.commands.demo import demo
from foretoken.commands.distill_data import distill_data
from foretoken.commands.drafters import drafters
from foretoken.commands.explain import explain
from foretoken.commands.generate import generate
from foretoken.commands.group import Group
from foretoken.commands.peers import peers
from foretoken.commands.plan import plan
from foretoken.commands.report import report
from foretoken.commands.train import train
from foretoken.commands.tune import tune
from foretoken.errors import UserError

COMMANDS = (
    *(generate, chat, check, explain),
    *(bench, report, tune, peers, bench_step),
    *(train, distill_data, calibrate),
    *(demo, drafters),
)


class Commands(Group):
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
for command in COMMANDS:
    app.command()(command)
app.add_typer(plan, name="plan")
app.add_typer(analyze, name="analyze")


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
