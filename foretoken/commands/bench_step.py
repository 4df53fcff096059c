"""`foretoken bench-step`."""

from typing import Annotated

import typer

from foretoken.commands.options import Dtype, numbers
from foretoken.errors import UserError


def bench_step(
    model: Annotated[str, typer.Argument(help="A model, or synthetic-134m for random weights.", show_default=False)],
    widths: Annotated[str, typer.Option(metavar="N,N,...", help="Tokens per forward.")] = "1,2,4,8,16,32,64",
    context: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens read before.")] = 256,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Measurements of each width.")] = 15,
    dtype: Dtype = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Write the measurement as JSON.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Measure the compiled step as well.")] = False,
) -> None:
    """Measure what a forward costs at each width."""
    asked = numbers("--widths", widths)
    if min(asked) < 1 or any(n != int(n) for n in asked):
        raise UserError(f"--widths is {widths!r}; give whole numbers of 1 or more, separated by commas.")
    from foretoken.bench.step import run

    run(model, dtype, [int(n) for n in asked], context, repeats, out, compiled)
