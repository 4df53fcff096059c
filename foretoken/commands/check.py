"""`foretoken check`."""

from typing import Annotated

import typer

from foretoken.commands.options import Attention, Compile, Device, Dtype, Model, Quantize


def check(
    model: Model,
    dtype: Dtype = None,
    device: Device = None,
    attention: Attention = None,
    quantize: Quantize = None,
    compiled: Compile = False,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Run trees through a model and compare with sequential forwards: can it be decoded exactly?"""
    from json import dumps

    from foretoken.answer import quiet_loading
    from foretoken.check import as_dict, render
    from foretoken.check import check as compare
    from foretoken.loading import load
    from foretoken.progress import progress

    quiet_loading(model)
    with progress() as update:
        target = load(
            model,
            dtype=dtype,
            device=device,
            attention=attention,
            quantize=quantize,
            compile=compiled,
            progress=lambda stage: update(f"compiling the step: {stage}", 0, 1),
        ).settled()
    report = compare(target)
    typer.echo(dumps(as_dict(report)) if json else render(report))
    if not report.ok:
        raise typer.Exit(1)
