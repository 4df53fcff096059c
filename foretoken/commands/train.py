"""`foretoken train`."""

from pathlib import Path
from typing import Annotated

import typer

from foretoken.errors import UserError


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
