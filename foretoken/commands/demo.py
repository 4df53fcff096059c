"""`foretoken demo`."""

import typer


def demo() -> None:
    """Decode with every drafter on a model that travels with the package, and compare with plain decoding."""
    from foretoken.demo import run

    if not run():
        raise typer.Exit(1)
