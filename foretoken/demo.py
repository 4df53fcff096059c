"""Every drafter on a code model that travels with the package, each compared with plain decoding token for token."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from foretoken.drafters import make_drafter
from foretoken.generation import Output, generate
from foretoken.loading import load
from foretoken.target import Target
from foretoken.text import decode
from foretoken.training.prompts import ids_of, prompts_of
from foretoken.training.sources import documents
from foretoken.training.stdlib import HELD_OUT

ASSETS = Path(__file__).parent / "assets"
MODEL = ASSETS / "stdlib5M"
PROMPTS, TOKENS = 4, 160
DRAFTERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("none", {}),
    ("prompt_lookup", {}),
    ("suffix", {}),
    ("jacobi", {}),
    ("lookahead", {}),
    ("early_exit", {"layers": 5, "width": 3}),
    ("draft_model", {"path": str(ASSETS / "stdlib1M")}),
    ("draft_model", {"path": str(ASSETS / "stdlib1M"), "width": 3}),
    ("blockwise", {"path": str(ASSETS / "stdlib5M-blockwise")}),
    ("weighted_heads", {"path": str(ASSETS / "stdlib5M-weighted_heads")}),
    ("medusa", {"path": str(ASSETS / "stdlib5M-medusa")}),
    ("mtp", {"path": str(MODEL), "width": 1}),
    ("mtp", {"path": str(MODEL)}),
    ("deepseek_mtp", {"path": str(ASSETS / "stdlib5M-deepseek_mtp")}),
    ("eagle", {"path": str(ASSETS / "stdlib5M-eagle1")}),
    ("eagle", {"path": str(ASSETS / "stdlib5M-eagle3")}),
    ("hybrid", {"path": f"eagle:{ASSETS / 'stdlib5M-eagle3'}"}),
)


@dataclass(frozen=True, slots=True)
class Run:
    """All prompts through one drafter."""

    name: str
    forwards: int
    tokens_per_forward: float
    seconds: float
    same: bool


def pieces(target: Target) -> list[str]:
    """Beginnings of functions in packages of the standard library that the model was not trained on."""
    found = prompts_of(documents("stdlib", split="held_out"), target, length=96, cuts=2, seed=1)
    assert target.tokenizer is not None
    return [decode(target.tokenizer, ids_of(target, p)) for p in islice(found, 1, 20 * PROMPTS, 20)]


def measure(
    target: Target,
    prompts: list[str],
    name: str,
    settings: dict[str, Any],
    temperature: float,
    plain: list[Output],
) -> Run:
    """The prompts decoded together with one drafter; without `plain` outputs it is the plain run itself."""
    drafter = make_drafter(name, target, settings)
    began = perf_counter()
    outputs: list[Output] = generate(
        target, prompts, drafter=drafter, max_new_tokens=TOKENS, temperature=temperature, seed=1
    )
    seconds = perf_counter() - began
    same = all(a.token_ids == b.token_ids for a, b in zip(outputs, plain, strict=True)) if plain else True
    if not plain:
        plain.extend(outputs)
    tokens, forwards = sum(len(o.token_ids) for o in outputs), sum(o.forwards for o in outputs)
    return Run(title(name, settings), forwards, (tokens - len(outputs)) / forwards, seconds, same)


def title(name: str, settings: dict[str, Any]) -> str:
    """The method, the last word of its weights' folder where that says more, and its other settings."""
    kind = Path(str(settings.get("path", ""))).name.rpartition("-")[2]
    shown = kind if name in kind else f"{name} of {kind}" if name == "hybrid" else name
    return shown + "".join(f", {k} {v}" for k, v in settings.items() if k != "path")


def table(heading: str, runs: list[Run]) -> Table:
    columns = ("drafter", "forwards", "tokens/forward", "seconds", "same as plain")
    shown = Table(*columns, title=heading, title_justify="left")
    shown.columns[0].no_wrap = True
    for column in shown.columns[1:4]:
        column.justify = "right"
    for r in runs:
        verdict = "[green]yes[/]" if r.same else "[bold red]NO[/]"
        shown.add_row(r.name, str(r.forwards), f"{r.tokens_per_forward:.2f}", f"{r.seconds:.2f}", verdict)
    return shown


def run() -> bool:
    """Print the tables; whether every drafter's output was that of plain decoding."""
    console = Console(highlight=False)
    target = load(MODEL, dtype="float32", device="cpu")
    prompts = pieces(target)
    console.print(
        f"Target {MODEL.name}, trained on Python's standard library but {', '.join(HELD_OUT)}; "
        f"{len(prompts)} pieces of those decoded together, {TOKENS} tokens each.\n"
    )
    good, said = True, ""
    for temperature in (0.0, 1.0):
        plain: list[Output] = []
        runs = [measure(target, prompts, name, settings, temperature, plain) for name, settings in DRAFTERS]
        console.print(table(f"temperature {temperature:g}", runs))
        good = good and all(r.same for r in runs)
        said = prompts[-1] + plain[-1].text
    console.print("\n[dim]The last piece, continued at temperature 1:[/]")
    console.print(Syntax(said, "python", theme="ansi_dark", background_color="default", word_wrap=True))
    console.print("\nEvery output is the plain one, token for token." if good else "[bold red]Outputs differ.[/]")
    return good
