"""`foretoken plan`: what guessing would bring, and what heads would cost, before anything is trained."""

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

import typer

from foretoken.commands.group import Group
from foretoken.errors import UserError

if TYPE_CHECKING:
    from foretoken.analysis.sizes import Target
    from foretoken.analysis.speedup import Yield

ACCEPTANCE, TIME = "How often guesses are right", "Times, over the time of a forward over one token"

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What configurations call the number of a layer's experts."""

plan = typer.Typer(cls=Group, help="Work out what guessing brings and what heads cost.", no_args_is_help=True)


@plan.command()
def speed(
    alpha: Annotated[
        float | None,
        typer.Option(metavar="A", help="P(a guess is right), the same at every depth.", rich_help_panel=ACCEPTANCE),
    ] = None,
    survival: Annotated[
        str | None,
        typer.Option(metavar="P,P,...", help="P(the first i guesses are right), measured.", rich_help_panel=ACCEPTANCE),
    ] = None,
    conditional: Annotated[
        str | None,
        typer.Option(metavar="P,P,...", help="P(guess i is right | those before it are).", rich_help_panel=ACCEPTANCE),
    ] = None,
    accuracy: Annotated[
        str | None,
        typer.Option(
            metavar="P,P,...;P,...",
            help="For trees: P(the token of depth i is choice r), a row per depth.",
            rich_help_panel=ACCEPTANCE,
        ),
    ] = None,
    c: Annotated[
        float, typer.Option("--c", metavar="X", help="One draft (a level of guesses).", rich_help_panel=TIME)
    ] = 0.0,
    v: Annotated[
        str,
        typer.Option(
            "--v",
            metavar="W:X,... or FILE",
            help="A forward over W tokens, or what `foretoken bench-step --out` wrote; 1: all widths alike.",
            rich_help_panel=TIME,
        ),
    ] = "1",
    own: Annotated[
        float,
        typer.Option(metavar="X", help="The rest of a step: heads of all depths, the engine.", rich_help_panel=TIME),
    ] = 0.0,
    arithmetic: Annotated[
        float | None,
        typer.Option(metavar="X", help="Arithmetic of a guess over a token of the model; as --c if not given."),
    ] = None,
    most: Annotated[int, typer.Option(metavar="N", min=1, help="Guesses of the largest draft.")] = 16,
) -> None:
    """Tabulate what drafts of each size yield, and mark the one that is fastest."""
    from foretoken.analysis.speedup import between, chains, free, known, trees

    if sum(given is not None for given in (alpha, survival, conditional, accuracy)) != 1:
        raise UserError(
            "Say how often guesses are right with one of --alpha, --survival, --conditional and --accuracy."
        )
    for name, value in (("--c", c), ("--own", own), ("--arithmetic", arithmetic or 0.0)):
        if not 0 <= value < float("inf"):
            raise UserError(f"{name} is {value:g}; it is a ratio of two times or costs and must be 0 or more.")
    ratio = free if v.strip() == "1" else between(ratios(v))
    if known(ratio, 1) < 1:
        raise UserError("--v is given at width 1 alone; give it at larger widths too, where guesses are judged.")
    if accuracy is not None:
        found = trees(rows(accuracy), c, ratio, own, arithmetic, most)
    else:
        found = chains(chance(alpha, survival, conditional), c, ratio, own, arithmetic, most)
    show_yields(found, asked=most, alpha=alpha, c=c, tree=accuracy is not None)


def chance(alpha: float | None, survival: str | None, conditional: str | None) -> float | list[float]:
    """α or a survival, whichever was given."""
    from foretoken.analysis.speedup import survival_of

    if alpha is not None:
        if not 0 <= alpha <= 1:
            raise UserError(f"--alpha is {alpha:g}; it is a probability and must lie between 0 and 1.")
        return alpha
    if conditional is not None:
        return survival_of(probabilities("--conditional", conditional))
    found = probabilities("--survival", survival or "")
    for i, (before, here) in enumerate(pairwise(found), 2):
        if here > before:
            raise UserError(
                f"--survival rises from {before:g} to {here:g} at depth {i}; it is the share of steps whose first i "
                "guesses are all right, which cannot rise: give rates behind right guesses as --conditional."
            )
    return found


def probabilities(option: str, text: str) -> list[float]:
    """The numbers in `text`, each between 0 and 1."""
    from foretoken.commands.options import numbers

    found = numbers(option, text)
    if wrong := [x for x in found if not x <= 1]:
        raise UserError(f"{option} has {wrong[0]:g}; give probabilities between 0 and 1, separated by commas.")
    return found


def rows(text: str) -> list[list[float]]:
    """[D][R], shorter rows filled with zeros."""
    found = [probabilities("--accuracy", row) for row in text.split(";")]
    for depth, row in enumerate(found, 1):
        if row != sorted(row, reverse=True) or sum(row) > 1 + 1e-9:
            raise UserError(
                f"--accuracy has {row} at depth {depth}; a depth's choices are different tokens, likeliest first: give "
                "falling numbers that add up to 1 at most."
            )
    return [row + [0.0] * (max(map(len, found)) - len(row)) for row in found]


def ratios(text: str) -> dict[int, float]:
    """Time by width, from `W:X,...` or from the file of `foretoken bench-step`."""
    import json
    from pathlib import Path

    if ":" not in text or Path(text).is_file():
        try:
            widths = json.loads(Path(text).read_text("utf-8"))["widths"]
            return {int(width): float(row["v"]) for width, row in widths.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"--v is {text!r}, which is no file that `foretoken bench-step --out` wrote; give one, or pairs like "
                "1:1,8:1.2,16:1.5."
            ) from None
    try:
        pairs = [part.split(":") for part in text.replace(",", " ").split()]
        found = {int(width): float(ratio) for width, ratio in pairs}
    except ValueError:
        found = {0: 0.0}
    if min(found) < 1 or not all(0 < ratio < float("inf") for ratio in found.values()):
        raise UserError(f"--v is {text!r}; give pairs of a width and a ratio above 0, like 1:1,8:1.2,16:1.5.")
    return found


def show_yields(found: "list[Yield]", *, asked: int, alpha: float | None, c: float, tree: bool) -> None:
    """Print the table and what follows from it."""
    from rich.console import Console
    from rich.table import Table

    from foretoken.analysis.speedup import best, most_tokens, pays

    console, fastest = Console(), best(found)
    table = Table("", *("guesses", "levels") if tree else ("guesses",), "tokens/forward", "speed-up", "arithmetic")
    for column in table.columns:
        column.justify = "right"
    for row in found:
        size = [str(row.guesses), str(row.levels)] if tree else [str(row.guesses)]
        cells = [*size, f"{row.tokens:.3f}", f"{row.speedup:.3f}", f"{row.operations:.2f}"]
        table.add_row("best" if row is fastest else "", *cells, style="bold" if row is fastest else "")
    console.print(table)
    say = [verdict(found, fastest, asked)]
    if alpha is not None:
        if alpha < 1:
            say.append(f"No chain yields more than 1 / (1 - alpha) = {most_tokens(alpha):.3f} tokens per forward.")
        if not pays(alpha, c):
            say.append(f"Chains can only pay if alpha is above c, and {alpha:g} is not above {c:g}.")
    for sentence in say:
        console.print(sentence, highlight=False)


def verdict(found: "list[Yield]", fastest: "Yield", asked: int) -> str:
    """What the table says, in a sentence or two."""
    if not fastest.guesses:
        return "Drafting does not pay: no draft here is faster than plain decoding."
    guesses = "1 guess" if fastest.guesses == 1 else f"{fastest.guesses} guesses"
    text = f"Fastest: {guesses}, {fastest.speedup:.2f} times plain decoding, {fastest.tokens:.2f} tokens per forward."
    if fastest is not found[-1]:
        return text
    if len(found) - 1 < asked:
        return text + " Nothing is known of larger drafts: give more depths, or --v at larger widths."
    return text + " It is the largest that was tried: ask for more with --most."


@plan.command()
def costs(
    model: Annotated[
        str | None, typer.Option(metavar="PATH", help="A model's folder or hub name, in place of its sizes.")
    ] = None,
    hidden: Annotated[int, typer.Option(metavar="H", min=0, help="Size of the hidden state.")] = 0,
    vocab: Annotated[int, typer.Option(metavar="V", min=0, help="Tokens of the vocabulary.")] = 0,
    params: Annotated[float, typer.Option(metavar="N", min=0, help="Parameters of the model, like 7e9.")] = 0,
    inner: Annotated[
        int, typer.Option(metavar="F", min=0, help="Size of a layer's MLP; 0: 8/3 of H, as Llama has.")
    ] = 0,
    layers: Annotated[int, typer.Option(metavar="L", min=1, help="Layers of the model.")] = 32,
    heads: Annotated[
        int, typer.Option(metavar="K", min=2, help="Heads, the model's own included: they guess K - 1 tokens.")
    ] = 4,
    tokens: Annotated[int, typer.Option(metavar="T", min=1, help="Tokens of a sequence in training.")] = 2048,
) -> None:
    """Tabulate parameters, arithmetic and memory of every kind of head."""
    from foretoken.analysis.sizes import Target, usual_inner

    if model is not None:
        if hidden or vocab or params or inner:
            raise UserError("--model brings its own sizes; leave out --hidden, --vocab, --params and --inner.")
        target = sizes_of(model)
    else:
        given = {"--hidden": hidden, "--vocab": vocab, "--params": params}
        if missing := [name for name, value in given.items() if not value]:
            raise UserError(f"{missing[0]} is missing; give --model, or --hidden, --vocab and --params.")
        if not params < float("inf"):
            raise UserError(f"--params is {params:g}; give the number of the model's parameters, like 7e9.")
        target = Target(hidden, vocab, round(params), inner or usual_inner(hidden), layers)
    show_costs(target, heads, tokens)


def sizes_of(model: str) -> "Target":
    """The sizes of a model, counted on its modules; weights are neither read nor made."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from foretoken.analysis.sizes import Layer, Target

    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"{model!r} is no causal language model that can be opened ({reason}); name another.") from None
    text = config.get_text_config()
    count, hidden = int(text.num_hidden_layers), int(text.hidden_size)
    lists = [m for m in made.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    weights = list(lists[0][-1].parameters()) if lists else []
    attention = int(getattr(text, "num_attention_heads", None) or 1)
    groups = int(getattr(text, "num_key_value_heads", None) or attention)
    return Target(
        hidden,
        int(text.vocab_size),
        sum(p.numel() for p in made.parameters()),
        int(getattr(text, "intermediate_size", None) or 4 * hidden),
        count,
        groups * (hidden // attention),
        Layer(sum(w.numel() for w in weights), sum(w.numel() for w in weights if w.ndim > 1)) if weights else None,
        max(int(getattr(text, name, None) or 0) for name in EXPERTS),
    )


def show_costs(target: "Target", heads: int, tokens: int) -> None:
    """Print the table and what logits take."""
    from rich.console import Console
    from rich.table import Table

    from foretoken.analysis.sizes import FORWARD, KINDS, TRAINED, logits_bytes

    guesses, N = heads - 1, target.parameters
    unit, scale = ("GFLOP", 1e9) if N >= 1e9 else ("MFLOP", 1e6)
    console = Console()
    console.print(
        f"Heads that guess {guesses} token{'s' if guesses > 1 else ''} beside the model's own. Hidden size "
        f"{target.hidden:,}, vocabulary {target.vocab:,}.",
        highlight=False,
    )
    table = Table("", "parameters", "in all", "share", f"{unit}: draft", "train", "share")
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row(
        "the model", "", millions(N), "100%", f"{FORWARD * N / scale:.3f}", f"{TRAINED * N / scale:.3f}", "100%"
    )
    table.add_section()
    for kind in KINDS:
        h = kind(target, guesses)
        each = f"{h.units} x {millions(h.each)}"
        flops = f"{h.drafting / scale:.3f}", f"{h.training / scale:.3f}"
        table.add_row(h.kind, each, millions(h.parameters), f"{h.parameters / N:.2%}", *flops, f"{h.matrices / N:.2%}")
    console.print(table)
    at_once, alone = (logits_bytes(tokens, target.vocab, n) / 1e9 for n in (heads, 1))
    for line in (
        "Parameters: what the heads have of their own. Arithmetic per token: all matrices they multiply by, the "
        "model's output head included; a forward to draft, forward and backward to train.",
        f"Float32 logits of {tokens:,} tokens: {at_once:.3f} GB with {heads} heads at once, {alone:.3f} GB head by "
        "head; their gradients take as much again.",
        *([f"All {target.experts} experts of a layer are counted; a token uses fewer."] if target.experts else []),
    ):
        console.print(line, highlight=False)


def millions(number: float) -> str:
    """In millions or billions."""
    return f"{number / 1e9:.3f}B" if number >= 1e9 else f"{number / 1e6:.3f}M"
