"""What the figures of all analyses share: how models and texts are called and drawn, and axes of model sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foretoken.analysis.summary import Estimate, Floats, Whole
from foretoken.report.drawing import MARKERS, MOST, Key, colour
from foretoken.report.tables import DASH, amount
from foretoken.study.rows import Head

if TYPE_CHECKING:
    from matplotlib.axes import Axes

APART = 0.12
"""Of an axis, between the labels of two model sizes."""
SPAN = 6.0
"""What the top of an axis of magnitudes is over its bottom, at least."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One of the charts that show the same for several files.

    name     what the chart's name ends in
    where    what its caption ends in
    members  of each line the number of the file and its label; drawn in the style of its place
    """

    name: str
    where: str
    members: list[tuple[int, str]]

    def keys(self) -> list[Key]:
        return [Key(label, i) for i, (_, label) in enumerate(self.members)]


def data_labels(heads: Sequence[Head]) -> list[str]:
    """A short name for each file's text: of a path its last part, unless two texts share it."""
    stems: dict[str, set[str]] = {}
    for head in heads:
        stems.setdefault(Path(head.data).stem, set()).add(head.data)
    return [stem if len(stems[stem := Path(h.data).stem]) == 1 else h.data for h in heads]


def panels(heads: Sequence[Head]) -> list[Panel]:
    """One chart for all files or, if these are too many lines, one per text, with models from the smallest to the
    largest."""
    texts = data_labels(heads)
    kinds, models = list(dict.fromkeys(texts)), {h.label for h in heads}
    if len(heads) <= MOST or len(kinds) == 1:
        chosen = spread(len(heads))
        labels = [
            h.label if len(kinds) == 1 else text if len(models) == 1 else f"{h.label}, {text}"
            for h, text in zip(heads, texts, strict=True)
        ]
        return [Panel("", some(len(chosen), len(heads)), [(i, labels[i]) for i in chosen])]
    found = list[Panel]()
    for kind, name in zip(kinds, slugs(kinds), strict=True):
        own = [i for i, text in enumerate(texts) if text == kind]
        chosen = [own[i] for i in spread(len(own))]
        members = [(i, heads[i].label) for i in chosen]
        found.append(Panel(f"-{name}", f"; {kind}{some(len(chosen), len(own))}", members))
    return found


def spread(count: int) -> list[int]:
    """Which of so many lines are drawn: all, or as many as can be told apart, the first and the last among them."""
    return list(range(count)) if count <= MOST else [round(i * (count - 1) / (MOST - 1)) for i in range(MOST)]


def some(shown: int, count: int) -> str:
    return "" if shown == count else f"; {shown} of {count} models"


def slugs(names: Sequence[str]) -> list[str]:
    """Names for files, all different."""
    found = list[str]()
    for name in names:
        slug = "".join(c if c.isascii() and (c.isalnum() or c in "-.") else "_" for c in name)
        found.append(slug if slug not in found else f"{slug}-{len(found)}")
    return found


def matrix(rows: Sequence[Mapping[str, Any]], key: str) -> Floats:
    """The lists under a key as [N, D], NaN where a row has none or a shorter one."""
    found = [row.get(key) or [] for row in rows]
    values = np.full((len(rows), max(map(len, found), default=0)), np.nan)
    for i, one in enumerate(found):
        values[i, : len(one)] = [np.nan if v is None else v for v in one]
    return values


def vector(rows: Sequence[Mapping[str, Any]], key: str) -> Floats:
    """The numbers under a key as [N], NaN where a row has none."""
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=np.float64)


def groups(rows: Sequence[Mapping[str, Any]]) -> Whole:
    """[N]: the document of each row; of a single document the window."""
    documents = np.array([row["document"] for row in rows], dtype=np.int64)
    return documents if len(set(documents.tolist())) > 1 else np.array([row["window"] for row in rows], dtype=np.int64)


def draw(axes: "Axes", x: Sequence[float], y: Sequence[Estimate | None], style: int, dashed: bool = False) -> None:
    """A line through the means, and a bar of one standard error to each side; dashed lines have hollow markers.

    Where several means stand at one x there is no line.
    """
    points = [(at, e) for at, e in zip(x, y, strict=True) if e is not None]
    tone, alone = colour(style), len({at for at, _ in points}) < len(points)
    axes.errorbar(
        [at for at, _ in points],
        [e.mean for _, e in points],
        yerr=[e.error or 0.0 for _, e in points],
        color=tone,
        ecolor=tone,
        elinewidth=1,
        linewidth=1.4,
        linestyle="none" if alone else "--" if dashed else "-",
        marker=MARKERS[style % MOST],
        markersize=4.5,
        markerfacecolor="none" if dashed else tone,
    )


def sizes(axes: "Axes", parameters: Sequence[int]) -> None:
    """A logarithmic axis of model sizes; a size too near to the one before it goes without a label."""
    values = sorted(set(parameters))
    axes.set_xscale("log")
    width = log(values[-1] / values[0]) or 1.0
    shown = list[int]()
    for value in values:
        if not shown or log(value / shown[-1]) / width > APART:
            shown.append(value)
    axes.set_xticks(values, [amount(v) if v in shown else "" for v in values])
    axes.minorticks_off()
    axes.margins(x=0.06)
    axes.set_xlabel("parameters")


def magnitudes(axes: "Axes") -> None:
    """A logarithmic axis of what is drawn already, labelled at 1, 2, 5, 10, ...: one of these is always in sight."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    wider = max(1.0, SPAN / (high / low)) ** 0.5
    axes.set_ylim(low / wider, high * wider)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()


def cell(found: Estimate | None, digits: int = 3) -> str:
    """The mean and its standard error."""
    if found is None:
        return DASH
    return f"{found.mean:.{digits}f}" + ("" if found.error is None else f" ± {found.error:.{digits}f}")
