"""`foretoken drafters`: every drafter with its settings, from its module alone."""

import dataclasses
import inspect
from types import ModuleType

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from foretoken.drafters import module_of, names

EVERY = "Every drafter takes adaptive=true: its drafts are only as deep as has paid (docs/adaptive.md)."


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    name: str
    default: str
    meaning: str


def show() -> None:
    """Print the list."""
    console = Console(highlight=False, markup=False)
    for name in names():
        module = module_of(name)
        console.print(Text(name, "bold"))
        console.print(Padding(summary(module), (0, 0, 0, 2)))
        grid = Table.grid(padding=(0, 2), pad_edge=False)
        for setting in settings(module):
            grid.add_row(Text(setting.name, "cyan"), Text(setting.default), Text(setting.meaning, "dim"))
        if grid.row_count:
            console.print(Padding(grid, (0, 0, 0, 4)))
        console.print()
    console.print(Text(EVERY))


def summary(module: ModuleType) -> str:
    """The first line of the module's docstring."""
    return (module.__doc__ or "").strip().partition("\n")[0]


def settings(module: ModuleType) -> list[Setting]:
    """The fields of the module's `Config`, each with the line of its docstring that explains it."""
    kinds = [kind for kind in module.Config.__mro__ if dataclasses.is_dataclass(kind)]
    meanings = {k: v for kind in reversed(kinds) for k, v in explained(inspect.getdoc(kind) or "").items()}
    found: list[Setting] = []
    inherited = [field.name for kind in kinds[1:] for field in dataclasses.fields(kind)]
    for field in sorted(dataclasses.fields(module.Config), key=lambda f: f.name in inherited):
        if field.default is not dataclasses.MISSING:
            default = repr(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = repr(field.default_factory())
        else:
            default = "required"
        found.append(Setting(field.name, default, meanings.get(field.name, "")))
    return found


def explained(doc: str) -> dict[str, str]:
    """{name: meaning} of a docstring of `name  meaning` lines; indented lines go on with the meaning before them."""
    found: dict[str, str] = {}
    name = ""
    for line in doc.splitlines():
        first, gap, rest = line.partition("  ")
        if line.startswith(" ") and name:
            found[name] += " " + line.strip()
        elif gap and first.isidentifier():
            name = first
            found[name] = rest.strip()
        else:
            name = ""
    return found
