"""`foretoken check`."""

from typing import Annotated

import typer

from foretoken.commands.options import Attention, Device, Dtype, Model


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
