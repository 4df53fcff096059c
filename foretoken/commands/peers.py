"""`foretoken peers`."""

from typing import Annotated

import typer


def peers(
    install: Annotated[
        str | None, typer.Option(metavar="NAME", help="Make the environment of this peer: minutes, and up to 3.4 GB.")
    ] = None,
    index: Annotated[
        str | None, typer.Option(metavar="URL", help="Where pip finds torch, for example its processor-only builds.")
    ] = None,
) -> None:
    """List the libraries that `foretoken bench` can measure beside foretoken, or install one."""
    from foretoken.bench.peers import environments

    if install is not None:
        environments.install(install, index)
    environments.show()
