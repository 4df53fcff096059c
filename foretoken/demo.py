"""Every drafter on a model that travels with the package, each compared with plain decoding token for token."""

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from foretoken.drafters import make_drafter
from foretoken.generation import Output, generate
from foretoken.loading import load
from foretoken.target import Target

ASSETS = Path(__file__).parent / "assets"
PROMPTS = (
    "Once upon a time, there was a little girl named Lily. She had a red ball",
    "Tom and his dog went to the park. The sun was warm and",
    "The big bear was sad because he lost his hat. A small bird said",
    "One day, a boy found a shiny stone near the river. He",
)
DRAFTERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("none", {}),
    ("prompt_lookup", {}),
    ("suffix", {}),
    ("jacobi", {}),
    ("lookahead", {}),
    ("early_exit", {"layers": 6, "width": 3}),
    ("draft_model", {"path": str(ASSETS / "stories260K")}),
    ("draft_model", {"path": str(ASSETS / "stories260K"), "width": 3}),
)


@dataclass(frozen=True, slots=True)
class Run:
    """All prompts through one drafter."""

    name: str
    tokens: int
    forwards: int
    tokens_per_forward: float
    seconds: float
    same: bool


def measure(target: Target, name: str, settings: dict[str, Any], temperature: float, plain: list[Output]) -> Run:
    """The prompts decoded together with one drafter; without `plain` outputs it is the plain run itself."""
    drafter = make_drafter(name, target, settings)
    began = perf_counter()
    outputs: list[Output] = generate(
        target, list(PROMPTS), drafter=drafter, max_new_tokens=160, temperature=temperature, seed=1
    )
    seconds = perf_counter() - began
    same = all(a.token_ids == b.token_ids for a, b in zip(outputs, plain, strict=True)) if plain else True
    if not plain:
        plain.extend(outputs)
    tokens, forwards = sum(len(o.token_ids) for o in outputs), sum(o.forwards for o in outputs)
    shown = "".join(f", {k} {v}" for k, v in settings.items() if k != "path")
    return Run(name + shown, tokens, forwards, (tokens - len(outputs)) / forwards, seconds, same)


def table(title: str, runs: list[Run]) -> Table:
    columns = ("drafter", "tokens", "forwards", "tokens/forward", "seconds", "same as plain")
    shown = Table(*columns, title=title, title_justify="left")
    for column in shown.columns[1:5]:
        column.justify = "right"
    for r in runs:
        verdict = "[green]yes[/]" if r.same else "[bold red]NO[/]"
        shown.add_row(
            r.name, str(r.tokens), str(r.forwards), f"{r.tokens_per_forward:.2f}", f"{r.seconds:.2f}", verdict
        )
    return shown


def run() -> bool:
    """Print the tables; whether every drafter's output was that of plain decoding."""
    console = Console(highlight=False)
    target = load(ASSETS / "bitstories3M", dtype="float32", device="cpu")
    console.print(
        f"Target bitstories3M (3.3M parameters), draft model stories260K; {len(PROMPTS)} prompts decoded together.\n"
    )
    good, first = True, ""
    for temperature in (0.0, 1.0):
        plain: list[Output] = []
        runs = [measure(target, name, settings, temperature, plain) for name, settings in DRAFTERS]
        console.print(table(f"temperature {temperature:g}", runs))
        good = good and all(r.same for r in runs)
        first = first or PROMPTS[0] + plain[0].text
    console.print(f"\n[dim]The first story, temperature 0:[/]\n{first}\n")
    console.print("Every output is the plain one, token for token." if good else "[bold red]Outputs differ.[/]")
    return good
