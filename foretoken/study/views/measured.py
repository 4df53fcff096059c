"""A file of `foretoken analyze marginal` as arrays, and the charts and tables that show several beside each other."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np

from foretoken.analysis.summary import Bin, Estimate, Floats, Whole, binned, columns, edges, estimate
from foretoken.report.drawing import INK, Chart, Key, chart, drawing
from foretoken.report.tables import DASH, Table
from foretoken.study.rows import Rows
from foretoken.study.views.series import Panel, cell, draw, groups, magnitudes, matrix, sizes, vector

BINS = 8
"""Bins of the positions of all files together; each holds about as many."""
FEW = 10
"""Positions without which a bin is not drawn."""
SHARES = (0.0, 1.03)
"""An axis of shares, whose markers at 1 are whole."""


class Measured:
    """The rows of a file, and the names it goes by."""

    def __init__(self, file: Rows, text: str) -> None:
        self.head, self.rows, self.end = file.head, file.rows, file.end or {}
        self.names = (file.head.label, text)
        self._groups: Whole = groups(self.rows)

    def matrix(self, key: str) -> Floats:
        """[N, D]."""
        return matrix(self.rows, key)

    def column(self, key: str, i: int) -> Floats:
        """[N]."""
        return column(self.matrix(key), i)

    def vector(self, key: str) -> Floats:
        """[N]."""
        return vector(self.rows, key)

    @cached_property
    def rank(self) -> Floats:
        return self.matrix("rank")

    @cached_property
    def greedy(self) -> Floats:
        return self.matrix("greedy")

    def means(self, values: Floats) -> list[Estimate | None]:
        """Of each column of [N, D]."""
        return columns(values, self._groups)

    def mean(self, values: Floats) -> Estimate | None:
        """Of [N]."""
        return estimate(values, self._groups)

    def bins(self, x: Floats, y: Floats, borders: Sequence[float]) -> list[Bin]:
        return binned(x, y, self._groups, borders)


Values = Callable[[Measured], Floats]
"""A number for each position and depth, [N, D]."""
Mean = Callable[[Measured], Estimate | None]
"""A number for a file."""


def column(values: Floats, i: int) -> Floats:
    """A column of [N, D], NaN if there are fewer."""
    return values[:, i] if i < values.shape[1] else np.full(len(values), np.nan)


def by_depth(
    found: Sequence[Measured],
    shown: Sequence[Panel],
    name: str,
    caption: str,
    lines: Mapping[str, Values],
    axes_names: tuple[str, str] = ("depth", "accuracy"),
    limits: tuple[float, float] | None = SHARES,
) -> list[Chart]:
    """A chart per panel: a line for each file and, dashed, another for the second of `lines`."""
    charts = list[Chart]()
    for panel in shown:
        figure, axes = drawing(3.1)
        deepest = 1
        for style, (i, _) in enumerate(panel.members):
            for values, dashed in zip(lines.values(), (False, True), strict=False):
                means = found[i].means(values(found[i]))
                deepest = max(deepest, len(means))
                draw(axes, range(1, len(means) + 1), means, style, dashed)
        axes.set_xlim(0.7, deepest + 0.3)
        axes.set_xticks(range(1, deepest + 1))
        if limits:
            axes.set_ylim(*limits)
        axes.set_xlabel(axes_names[0])
        axes.set_ylabel(axes_names[1])
        charts.append(chart(name + panel.name, figure, caption + panel.where, [*panel.keys(), *strokes(lines)]))
    return charts


def over_size(
    found: Sequence[Measured],
    name: str,
    caption: str,
    lines: Mapping[str, Mean],
    ylabel: str,
    limits: tuple[float, float] | None = None,
) -> list[Chart]:
    """A line per text over the size of the model, logarithmic without limits; nothing if there is one size."""
    parameters = sorted({m.head.parameters for m in found})
    if len(parameters) < 2:
        return []
    figure, axes = drawing(3.1)
    texts = list(dict.fromkeys(m.names[1] for m in found))
    for style, text in enumerate(texts):
        some = [m for m in found if m.names[1] == text]
        for mean, dashed in zip(lines.values(), (False, True), strict=False):
            draw(axes, [m.head.parameters for m in some], [mean(m) for m in some], style, dashed)
    sizes(axes, parameters)
    if limits:
        axes.set_ylim(*limits)
    else:
        magnitudes(axes)
    axes.set_ylabel(ylabel)
    return [chart(name, figure, caption, [*(Key(text, i) for i, text in enumerate(texts)), *strokes(lines)])]


def by_bin(
    shown: Sequence[Panel],
    bins: Sequence[Sequence[Bin]],
    name: str,
    caption: str,
    axes_names: tuple[str, str],
    floor: tuple[str, Callable[[Floats], Floats]] | None = None,
) -> list[Chart]:
    """A chart per panel whose bins are full: a line for each file, and a dashed one in ink for what is proved."""
    charts = list[Chart]()
    for panel in shown:
        if all(b.y.count < FEW for i, _ in panel.members for b in bins[i]):
            continue
        figure, axes = drawing(3.1)
        keys, right = panel.keys(), 0.0
        for style, (i, _) in enumerate(panel.members):
            full = [b for b in bins[i] if b.y.count >= FEW]
            draw(axes, [b.x for b in full], [b.y for b in full], style)
            right = max([right, *(b.x for b in full)])
        if floor:
            x = np.linspace(0, right, 200)
            axes.plot(x, floor[1](x), color=INK, linestyle="--", linewidth=1)
            keys.append(Key(floor[0], -2))
        axes.set_ylim(*SHARES)
        axes.set_xlabel(axes_names[0])
        axes.set_ylabel(axes_names[1])
        charts.append(chart(name + panel.name, figure, caption + panel.where, keys))
    return charts


def borders(values: Sequence[Floats]) -> list[float]:
    """Of the bins of all files."""
    return edges(np.concatenate(values), BINS)


def strokes(lines: Mapping[str, object]) -> list[Key]:
    """What solid and dashed lines are, where there are both."""
    return [Key(name, style) for name, style in zip(lines, (-4, -2), strict=False)] if len(lines) > 1 else []


def depth_table(caption: str, found: Sequence[Measured], lines: Mapping[str, Values], what: str = "depth") -> Table:
    """A line for each file and each of `lines`, a column per depth."""
    rows = [(*m.names, name, m.means(of(m))) for m in found for name, of in lines.items()]
    deepest = max(len(means) for *_, means in rows)
    head = ("model", "data", "", *(f"{what} {k}" for k in range(1, deepest + 1)))
    padded = [[*names, *map(cell, means), *[DASH] * (deepest - len(means))] for *names, means in rows]
    return Table(caption, head, padded, 3)
