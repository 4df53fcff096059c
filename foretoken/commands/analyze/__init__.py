"""`foretoken analyze`: what a model knows about its future, and what that is worth."""

import typer

from foretoken.commands.analyze.ceiling import ceiling
from foretoken.commands.analyze.heads import heads
from foretoken.commands.analyze.layers import layers
from foretoken.commands.analyze.marginal import marginal
from foretoken.commands.group import Group

analyze = typer.Typer(
    cls=Group, help="Find out what a model knows about its future, on your text.", no_args_is_help=True
)
for command in (ceiling, marginal, layers, heads):
    analyze.command()(command)
