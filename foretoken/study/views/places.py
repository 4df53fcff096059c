"""Overlap of trained heads by what the target has read, and by where in the document it stands."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from foretoken.analysis.summary import Bin, Floats, Whole, binned
from foretoken.report.drawing import INK, Chart, Key, chart, drawing
from foretoken.report.tables import DASH, Section, Table
from foretoken.study.views.series import cell, draw
from foretoken.study.views.trained import CEILING, Group, Place

SHOWN = 3
"""Guesses that have figures of their own."""
FIRST = 8
"""Tokens of the first bin; each of the others ends at twice the end of the one before it."""
FEW = 10
"""Positions without which a bin is not drawn."""


@dataclass(frozen=True, slots=True)
class Axis:
    """
    name   of figures
    what   the overlap is shown against
    label  under the axis
    field  of a place; what is counted there begins with `least`
    """

    name: str
    what: str
    label: str
    field: int
    least: int


AXES = (
    Axis("context", "context length", "tokens read in the window, up to", 2, 1),
    Axis("position", "position in the document", "tokens of the document so far, up to", 1, 0),
)


@dataclass(frozen=True, slots=True)
class Binned:
    """A drafter's overlaps by guess, or the marginal law's, or its floor's, and the style that they are drawn in."""

    name: str
    style: int
    bins: dict[int, list[Bin]]


def by_place(group: Group) -> Section:
    """Overlap against what the target has read, and against where in the document it stands."""
    charts, folded = list[Chart](), list[Table]()
    for axis in AXES:
        found = [
            Binned(m.drafter, i if m in group.drawn else -1, bins_of(axis, m.places, m.overlap, m.groups, m.depths))
            for i, m in enumerate(group.members)
        ]
        if (law := group.marginal) is not None:
            guesses, floor = range(1, law.overlap.shape[1] + 1), law.floor[:, None]
            found.append(Binned("marginal law", CEILING, bins_of(axis, law.places, law.overlap, law.groups, guesses)))
            found.append(Binned("floor: 1 - sqrt(I/2)", -2, bins_of(axis, law.places, floor, law.groups, [1])))
        charts += [c for i in range(1, SHOWN + 1) if (c := bin_chart(group, found, axis, i))]
        folded.append(bin_table(found, axis))
    said = [
        "Context is what the target had read in its window, position where that stands in the document: a window that "
        "begins late in a document holds late positions with short contexts. Bins of fewer than "
        f"{FEW} positions are not drawn."
    ]
    return Section(f"Trained heads by context and position: {group.where}", said, charts=charts, folded=folded)


def borders(most: float) -> list[float]:
    """1, 9, 17, 33, 65, ...: where bins 1-8, 9-16, 17-32, ... begin, the last beyond `most`."""
    found, end = [1.0], FIRST
    while found[-1] <= most:
        found.append(end + 1.0)
        end *= 2
    return found


def bins_of(
    axis: Axis, places: Sequence[Place], values: Floats, groups: Whole, guesses: Sequence[int]
) -> dict[int, list[Bin]]:
    """The values [N, K] of each guess in bins of what the axis counts, from 1."""
    x = np.array([place[axis.field] + 1 - axis.least for place in places], dtype=np.float64)
    edges = borders(float(x.max()))
    return {guess: binned(x, values[:, k], groups, edges) for k, guess in enumerate(guesses)}


def bin_chart(group: Group, found: Sequence[Binned], axis: Axis, guess: int) -> Chart | None:
    """A line per drafter over bins, named by where they end; None if no drafter that is drawn guesses so far."""
    members = [one for one in found if one.style != -1 and guess in one.bins]
    if not any(0 <= one.style < CEILING for one in members):
        return None
    figure, axes = drawing(3.1)
    ends = sorted({b.high for one in members for b in one.bins[guess]})
    for one in members:
        some = [b for b in one.bins[guess] if b.y.count >= FEW]
        x, y = [ends.index(b.high) for b in some], [b.y for b in some]
        if one.style >= 0:
            draw(axes, x, y, one.style, one.style == CEILING)
        else:
            axes.plot(x, [e.mean for e in y], color=INK, linestyle="--", linewidth=1)
    axes.set_xticks(range(len(ends)), [f"{end - 1:.0f}" for end in ends])
    axes.set_ylim(0, 1)
    axes.set_xlabel(axis.label)
    caption = f"Overlap of guess {guess} by {axis.what}; {group.where}"
    keys = [Key(one.name, one.style) for one in members]
    return chart(f"heads-{axis.name}{guess}-{group.name}", figure, caption, keys)


def bin_table(found: Sequence[Binned], axis: Axis) -> Table:
    """A row per drafter and bin, a column per guess."""
    deepest = max(max(one.bins) for one in found)
    rows = list[list[str]]()
    for one in found:
        for b in next(iter(one.bins.values())):
            same = {i: next((o.y for o in some if o.low == b.low), None) for i, some in one.bins.items()}
            cells = [cell(same.get(i)) for i in range(1, deepest + 1)]
            rows.append([one.name, f"{b.low:.0f}{DASH}{b.high - 1:.0f}", f"{b.y.count:,}", *cells])
    head = ["drafter", axis.what, "positions", *(f"guess {i}" for i in range(1, deepest + 1))]
    return Table(f"Overlap by {axis.what}", head, rows)
