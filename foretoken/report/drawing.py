"""Figures as SVG, to be part of a page: their colours are the page's, their texts are text.

A phone shows a figure about as wide as it is drawn, 360 points, so its letters keep their size there.
"""

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from foretoken.errors import UserError
from foretoken.show import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.0
"""Inches."""
MOST = 8
"""Lines in one figure."""
LETTERS, ROW = 64, 0.18
"""Of a line of small print as wide as a figure; and its height in inches."""
INK, SOFT, LINE, BAND = "#1b1f24", "#57606a", "#d0d7de", "#e7ebef"
SERIES = ("#0072b2", "#c04a00", "#008060", "#a6458c", "#9a6a00", "#2b8cbe", "#7a3b1e", "#4b5563")
"""Told apart by the colour-blind too; each has a marker of its own besides."""
MARKERS = "os^DvPX*"
NAMES = {INK: "ink", SOFT: "soft", LINE: "line", BAND: "track", **{c: f"s{i}" for i, c in enumerate(SERIES)}}
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "foretoken", "font.size": 10.0, "path.simplify": False}


@dataclass(frozen=True, slots=True)
class Key:
    """What a marker in a figure stands for.

    style  counts SERIES; in ink: -1 a stroke, -2 a dashed line, -3 a dot, -4 a line
    """

    label: str
    style: int


@dataclass(frozen=True, slots=True)
class Chart:
    """
    svg     for a page, whose colours it takes
    figure  what it was made of, to be saved as files of its own (None: it never is)
    """

    name: str
    svg: str
    caption: str
    keys: list[Key]
    figure: "Figure | None" = None


def keys_of(style: dict[str, int], found: Iterable[str]) -> list[Key]:
    shown = set(found)
    return [Key(name, i) for name, i in style.items() if name in shown]


def colour(i: int) -> str:
    return SERIES[i % MOST]


def line(axes: "Axes", x: Sequence[float] | range, y: Sequence[float], style: int) -> None:
    axes.plot(x, y, color=colour(style), marker=MARKERS[style % MOST], markersize=4.5, linewidth=1.5)


def powers(axes: "Axes", values: Sequence[int]) -> None:
    """A logarithmic axis whose ticks are the values, and no others."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(v) for v in values])
    axes.minorticks_off()


def sideways(axes: "Axes") -> Any:
    """Coordinates: x from 0 to 1 over the axes, y of the data."""
    return axes.get_yaxis_transform()


def drawing(height: float) -> "tuple[Figure, Axes]":
    """An empty figure of `height` inches, its frame drawn lightly."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("A report's figures need matplotlib; run `pip install 'foretoken[bench]'`.") from error
    import matplotlib

    with matplotlib.rc_context(SETTINGS):  # pyright: ignore[reportArgumentType]
        figure = Figure((WIDTH, height), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(which="both", colors=SOFT, labelcolor=INK)
    axes.tick_params(length=3)
    axes.grid(color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def chart(name: str, figure: "Figure", caption: str, keys: list[Key]) -> Chart:
    """The figure for a page and for files."""
    return Chart(name, svg(figure, name), caption, keys, figure)


def save(chart: Chart, folder: Path) -> list[Path]:
    """Write NAME.svg and NAME.png, which stand alone: on white, with their caption and their keys."""
    import matplotlib

    assert chart.figure is not None
    figure = chart.figure
    title = wrap(visible(chart.caption), LETTERS)
    figure.suptitle("\n".join(title), fontsize=9, color=INK, parse_math=False)
    figure.set_figheight(figure.get_figheight() + ROW * (len(title) + legend(figure, chart.keys)))
    files = [folder / f"{chart.name}.svg", folder / f"{chart.name}.png"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():  # pyright: ignore[reportArgumentType]
            warnings.simplefilter("ignore")
            figure.savefig(files[0], metadata={"Date": None}, facecolor="white")
            figure.savefig(files[1], dpi=200, facecolor="white", metadata={"Software": None})
    except OSError as error:
        raise UserError(
            f"{str(folder)!r} cannot be written to ({error.strerror}); give --out another folder."
        ) from error
    return files


def legend(figure: "Figure", keys: Sequence[Key]) -> int:
    """Add the legend below the figure; how many lines it has."""
    from matplotlib.lines import Line2D

    if not keys:
        return 0
    marks = [Line2D([], [], **look(key)) for key in keys]
    names = ["\n".join(wrap(visible(key.label), LETTERS)) for key in keys]
    columns = 2 if max(map(len, names)) <= LETTERS // 2 else 1
    found = figure.legend(marks, names, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    for text in found.get_texts():
        text.set_parse_math(False)
    return -(-sum(name.count("\n") + 1 for name in names) // columns)


def look(key: Key) -> dict[str, Any]:
    """How matplotlib draws the marker of a key."""
    if key.style >= 0:
        return {"color": colour(key.style), "marker": MARKERS[key.style % MOST], "markersize": 4.5}
    alone: dict[str, Any] = {"linestyle": "none", "markersize": 8}
    looks: dict[int, dict[str, Any]] = {
        -1: {**alone, "color": INK, "marker": "|"},
        -2: {"color": INK, "linestyle": "--"},
        -3: {**alone, "color": SOFT, "marker": "."},
        -4: {"color": INK},
    }
    return looks[key.style]


def svg(figure: "Figure", name: str) -> str:
    """The figure as an element for a page; every id in it begins with `name`, as several share the page."""
    import matplotlib

    file = StringIO()
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():  # pyright: ignore[reportArgumentType]
        warnings.simplefilter("ignore")  # a letter that the font for measuring lacks is the browser's to find
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    prefix = re.sub(r"[^a-z0-9-]", "_", name)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img" xmlns:xlink="http://www.w3.org/1999/xlink">', text
    )
    return re.sub("|".join(NAMES), lambda m: f"var(--{NAMES[m[0]]})", text)
