"""Groups of commands whose help comes at once."""

from typing import Any

from typer.core import TyperGroup


class Group(TyperGroup):
    """typer's group without what typer imports for each: pydantic to parse a flag, a Markdown reader to draw help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer's; before the name of a command there is no flag of the group to parse."""
        self.add_help_option = not args or args[0] not in self.commands
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print what typer would, but for the type of `--help`."""
        from rich.console import Console
        from rich.padding import Padding
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        console = Console(highlight=False)
        usage = Text(self.get_usage(ctx), "bold")
        usage.stylize("yellow", 0, len("Usage:"))
        console.print(Padding(usage, 1))
        console.print(Padding(Text(self.help or ""), (0, 1, 1, 1)))
        given: Any = self.get_params(ctx)
        options = [[*sorted(option.opts), option.help] for option in given]
        commands = [[name, (self.commands[name].help or "").partition("\n\n")[0]] for name in self.list_commands(ctx)]
        for title, rows, styles in (
            ("Options", options, ("bold cyan", "bold green")),
            ("Commands", commands, ("bold cyan",)),
        ):
            table = Table(box=None, show_header=False, pad_edge=False, expand=True)
            for style in styles:
                table.add_column(style=style, no_wrap=True)
            table.add_column(ratio=1)
            for row in rows:
                table.add_row(*(Text(" ".join(cell.split())) for cell in row))
            console.print(Panel(table, title=title, title_align="left", border_style="dim"))
