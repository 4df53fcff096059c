"""What `foretoken analyze ceiling` found: how much drafters that know their law exactly could gain here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foretoken.errors import UserError
from foretoken.report.drawing import MOST, Chart, Key, chart, drawing, line
from foretoken.report.tables import DASH, Section, Table, fixed, times
from foretoken.study.rows import FORMAT, Head
from foretoken.study.views.series import data_labels, slugs

KINDS = {
    "independent": "independent heads",
    "independent_likeliest": "independent heads, likeliest token",
    "sequential": "sequential drafter",
    "sequential_likeliest": "sequential drafter, likeliest token",
    "lookup": "prompt lookup",
    "early_exit": "early exit",
}
"""What the figures call drafters, in the order in which they are drawn."""
TIMES = {
    "head": "output head, all guesses at once",
    "layer": "a layer and the output head",
    "own": "rest of a plain step",
}
"""What the tables call the parts of a step."""

Numbers = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ceiling:
    """A file.

    temperatures  of each the survival by guess of every kind of drafter
    times         over that of a width-1 forward: `v` by width, `head`, `layer`, `own`
    predicted     of each temperature and kind tokens per forward, speed-up, and the length that is best
    """

    head: Head
    depths: list[int]
    temperatures: Mapping[str, Numbers]
    times: Numbers
    predicted: Mapping[str, Mapping[str, Numbers]]
    verdict: str


def found(folder: Path) -> list[Ceiling]:
    """Every ceiling in the folder, smallest model first."""
    files = [read(path) for path in sorted(folder.glob("ceiling-*.json"))]
    return sorted(files, key=lambda c: (c.head.data, c.head.parameters))


def read(path: Path) -> Ceiling:
    """The file; `UserError` if it is of another kind or version."""
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        head = Head(**record.pop("head"))
        ceiling = Ceiling(head, **record)
        if ceiling.head.format != FORMAT:
            raise ValueError
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{str(path)!r} is no file that this version of `foretoken analyze ceiling` wrote; remove it and analyse "
            "again."
        ) from error
    return ceiling


def sections(files: Sequence[Ceiling]) -> list[Section]:
    """Verdicts, a table per temperature, and how guesses survive."""
    texts = data_labels([c.head for c in files])
    names = [(c.head.label, text) for c, text in zip(files, texts, strict=True)]
    verdicts = [
        c.verdict if len(files) == 1 else f"{a}, {b}: {c.verdict}" for (a, b), c in zip(names, files, strict=True)
    ]
    notes = [
        *verdicts,
        "Independent heads guess each token from the text alone, by the model's marginal law of that depth; a "
        "sequential drafter by the model's law behind its own guesses. Both know their law exactly. At temperature 1 "
        "they draw from it, or say its likeliest token where that is written. Speed-ups are predicted from these "
        "survivals and from the times of this machine, at the length that is best; length 0 is plain decoding. "
        "Prompt lookup was run.",
    ]
    temperatures = list(dict.fromkeys(t for c in files for t in c.predicted))
    return [
        Section(
            "Ceilings of tokens per forward",
            notes,
            [predictions(files, names, t) for t in temperatures],
            survivals(files, names),
            [survival_table(files, names), *times_tables(files, names)],
        )
    ]


def kind_name(kind: str) -> str:
    return KINDS.get(kind, kind.replace("_", " "))


def predictions(files: Sequence[Ceiling], names: Sequence[tuple[str, str]], temperature: str) -> Table:
    """Tokens per forward and speed-up of every kind of drafter."""
    rows = [
        (
            *name,
            kind_name(kind),
            *(fixed(p["tokens_per_forward"]), times(p["speedup"]), str(p.get("length", DASH))),
        )
        for name, c in zip(names, files, strict=True)
        for kind, p in c.predicted.get(temperature, {}).items()
    ]
    head = ("model", "data", "drafter", "tokens per forward", "predicted speed-up", "best length")
    return Table(f"Temperature {temperature}", head, rows, 3)


def curves(survival: Numbers) -> dict[str, list[float]]:
    """Survival by guess of every kind at one temperature, in the order of KINDS."""
    kinds = [*(k for k in KINDS if k in survival), *(k for k in survival if k not in KINDS)]
    lists = {k: survival[k]["survival"] if isinstance(survival[k], Mapping) else survival[k] for k in kinds}
    return {k: some for k, some in lists.items() if some}


def survivals(files: Sequence[Ceiling], names: Sequence[tuple[str, str]]) -> list[Chart]:
    """A chart for each file and temperature."""
    charts = list[Chart]()
    for c, (label, text), slug in zip(files, names, slugs([f"{a}-{b}" for a, b in names]), strict=True):
        for temperature, survival in c.temperatures.items():
            figure, axes = drawing(3.1)
            found = curves(survival)
            deepest = max(map(len, found.values()), default=1)
            for style, some in enumerate(found.values()):
                line(axes, range(1, len(some) + 1), some, style)
            axes.set_xlim(0.7, deepest + 0.3)
            axes.set_xticks(range(1, deepest + 1, 1 + deepest // 12))
            axes.set_ylim(0, 1.04)
            axes.set_xlabel("guess i")
            axes.set_ylabel("P(first i guesses accepted)")
            keys = [Key(kind_name(kind), style % MOST) for style, kind in enumerate(found)]
            caption = f"Survival of guesses at temperature {temperature}: {label}, {text}"
            charts.append(chart(f"ceiling-{slug}-{temperature}", figure, caption, keys))
    return charts


def survival_table(files: Sequence[Ceiling], names: Sequence[tuple[str, str]]) -> Table:
    """The charts' numbers."""
    rows = [
        (*name, temperature, kind_name(kind), some)
        for name, c in zip(names, files, strict=True)
        for temperature, survival in c.temperatures.items()
        for kind, some in curves(survival).items()
    ]
    deepest = max((len(row[-1]) for row in rows), default=0)
    head = ("model", "data", "T", "drafter", *(f"i = {i}" for i in range(1, deepest + 1)))
    cells = [[*row[:-1], *(fixed(s, 3) for s in row[-1]), *[DASH] * (deepest - len(row[-1]))] for row in rows]
    return Table("P(the first i guesses are accepted)", head, cells, 4)


def times_tables(files: Sequence[Ceiling], names: Sequence[tuple[str, str]]) -> list[Table]:
    """What the predictions rest on."""
    widths = sorted({int(w) for c in files for w in c.times["v"]})
    v = [
        (*name, *(fixed({int(w): r for w, r in c.times["v"].items()}.get(width)) for width in widths))
        for name, c in zip(names, files, strict=True)
    ]
    parts = list(dict.fromkeys(k for c in files for k in c.times if k != "v"))
    rest = [(*name, *(fixed(c.times.get(k), 3) for k in parts)) for name, c in zip(names, files, strict=True)]
    return [
        Table("Time of a forward over that of width 1", ("model", "data", *(f"width {w}" for w in widths)), v, 2),
        Table(
            "Time of a draft's parts over that of a forward of width 1",
            ("model", "data", *(TIMES.get(k, k) for k in parts)),
            rest,
            2,
        ),
    ]
