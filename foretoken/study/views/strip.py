"""A text whose tokens are coloured by how unsure the model was of them, and by how deep it had to look.

Figure 3 of Mehra et al. 2025 (arXiv:2502.09419): entropy over one sequence, by model size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foretoken.analysis.summary import Floats
from foretoken.page import text_of
from foretoken.report.drawing import INK, LINE, Chart, chart, drawing
from foretoken.show import visible
from foretoken.study.rows import Row, Rows
from foretoken.study.views.series import data_labels, spread, vector

ACROSS = 32
"""Tokens on a line of a figure."""
LETTERS = 8
"""Of a token, in a figure."""
LEVELS = 16
"""Shades of a page's strips."""
UPRIGHT: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "bottom", "color": INK, "parse_math": False}
SIGNS = {"\n": "\N{RETURN SYMBOL}", "\t": "\N{RIGHTWARDS ARROW TO BAR}", " ": "\N{MIDDLE DOT}"}


@dataclass(frozen=True, slots=True)
class Strip:
    """One text as several models read it.

    texts    of its tokens, the first one left out: nothing foretold it
    models   their labels, from the smallest to the largest
    entropy  [M, T] nats, of the law that was to predict each token
    settled  [M, T] the same law's settled layer over the model's layers
    """

    data: str
    texts: list[str]
    models: list[str]
    entropy: Floats
    settled: Floats


@dataclass(frozen=True, slots=True)
class Shade:
    """What colours mean: values [M, T] from 0 to `most`."""

    name: str
    title: str
    values: Floats
    most: float
    unit: str
    colours: str

    def level(self, value: float) -> int:
        return round(value / self.most * (LEVELS - 1)) if self.most > 0 else 0


def shades(strip: Strip) -> list[Shade]:
    return [
        Shade("entropy", "Entropy", strip.entropy, float(strip.entropy.max()), "nats", "Blues"),
        Shade("settled", "Depth at which the final token was settled", strip.settled, 1.0, "of the layers", "Oranges"),
    ]


def strips(files: Sequence[Rows], names: Sequence[str]) -> list[Strip]:
    """One for each text and tokenizer; `names` are what the files' texts are called."""
    groups: dict[tuple[object, ...], list[tuple[Rows, str]]] = {}
    for file, name in zip(files, names, strict=True):
        if text := kept(file)["text"]:
            key = (file.head.data, file.head.settings["tokenizer"], kept(file)["window"], *text)
            groups.setdefault(key, []).append((file, name))
    return [strip_of([f for f, _ in group], group[0][1]) for group in groups.values()]


def kept(file: Rows) -> Row:
    return (file.end or {}).get("strip") or {"window": 0, "text": []}


def strip_of(files: Sequence[Rows], data: str) -> Strip:
    """The strip of files that hold the same text."""
    files = [files[i] for i in spread(len(files))]
    texts = list(kept(files[0])["text"])
    rows = [[r for r in f.rows if r["window"] == kept(f)["window"]][: len(texts)] for f in files]
    settled = [vector(r, "settled") / f.head.settings["layers"] for f, r in zip(files, rows, strict=True)]
    entropy = np.stack([vector(r, "entropy") for r in rows])
    return Strip(data, texts, [f.head.label for f in files], entropy, np.stack(settled))


# ------------------------------------------------------------------------------------------------------------ figures


def strip_charts(files: Sequence[Rows], names: Sequence[str]) -> list[Chart]:
    """Two figures for each text."""
    found = strips(files, names)
    return [
        strip_chart(strip, shade, f"layers-strip-{shade.name}" + (f"-{i}" if i else ""))
        for i, strip in enumerate(found)
        for shade in shades(strip)
    ]


def strip_chart(strip: Strip, shade: Shade, name: str) -> Chart:
    """Lines of `ACROSS` tokens, under each token a block per model."""
    models, lines = len(strip.models), -(-len(strip.texts) // ACROSS)
    text = 0.6 + 0.42 * max(len(short(token)) for token in strip.texts)  # blocks that the tokens' names take
    block = text + models
    figure, axes = drawing(0.125 * block * lines + 0.75)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks([])
    ticks = list[tuple[float, str]]()
    for line in range(lines):
        values = shade.values[:, line * ACROSS : (line + 1) * ACROSS]
        top = line * block + text
        edges = np.arange(values.shape[1] + 1), top + np.arange(models + 1)
        mesh = axes.pcolormesh(*edges, values, cmap=shade.colours, vmin=0, vmax=shade.most)
        if not line:
            bar = figure.colorbar(mesh, ax=axes, orientation="horizontal", fraction=0.02, aspect=60, pad=0.02)
            bar.set_label(shade.unit, fontsize=8, color=INK)
            bar.ax.tick_params(labelsize=7, length=2, colors=LINE, labelcolor=INK)
            bar.ax.spines[:].set_color(LINE)
        for x, token in enumerate(strip.texts[line * ACROSS : (line + 1) * ACROSS]):
            axes.text(x + 0.5, top - 0.25, short(token), fontsize=6, **UPRIGHT)
        ticks += [(top + i + 0.5, visible(label)) for i, label in enumerate(strip.models)]
    axes.set_xlim(0, min(ACROSS, len(strip.texts)))
    axes.set_ylim(lines * block, 0)
    axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks], fontsize=6, parse_math=False)
    return chart(name, figure, f"{shade.title} along a text, by model; {strip.data}", [])


def short(token: str) -> str:
    """A token's text in a line of a figure, cut after `LETTERS`."""
    text = visible("".join(SIGNS.get(c, c) if c != " " or not token.strip() else c for c in token)).strip()
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"


# --------------------------------------------------------------------------------------------------------------- page


def strip_html(files: Sequence[Rows]) -> str:
    """Every text as coloured tokens, with a block per model and colour; nothing if no file has a text."""
    files = [f for f in files if f.rows]
    found = strips(files, data_labels([f.head for f in files]))
    blocks = [block for strip in found for shade in shades(strip) for block in html_blocks(strip, shade)]
    return f'<style>{STYLE}</style>\n<div class="strips">\n' + "\n".join(blocks) + "\n</div>" if blocks else ""


def html_blocks(strip: Strip, shade: Shade) -> Iterator[str]:
    """A heading with the colours' scale, then a paragraph per model."""
    scale = "".join(f'<i class="{shade.name} c{level}"></i>' for level in range(LEVELS))
    yield (
        f"<h3>{text_of(shade.title)}: {text_of(strip.data)}</h3>\n"
        f'<p class="scale">0 <span>{scale}</span> {shade.most:.3g} {shade.unit}</p>'
    )
    for label, values in zip(strip.models, shade.values, strict=True):
        tokens = "".join(html_token(t, v, shade) for t, v in zip(strip.texts, values.tolist(), strict=True))
        yield f'<h4>{text_of(label)}</h4>\n<p class="strip {shade.name}">{tokens}</p>'


def html_token(text: str, value: float, shade: Shade) -> str:
    """A token; line breaks are shown and made, and a part of a character is a dot."""
    shown = text_of(text or SIGNS[" "]).replace("\n", SIGNS["\n"] + "\n")
    return f'<b class="c{shade.level(value)}" title="{value:.2f} {shade.unit}">{shown}</b>'


HUES = {"entropy": "0 114 178", "settled": "192 74 0"}
STYLE = """
.strips h3{font-size:.95rem;margin:1.4rem 0 .2rem}
.strips h4{font-size:.85rem;font-weight:600;margin:.7rem 0 .2rem;color:var(--soft)}
.strips .scale{font-size:.82rem;color:var(--soft);display:flex;gap:.4rem;align-items:center}
.strips .scale span{display:flex}
.strips .scale i{width:.7rem;height:.9rem}
.strips .strip{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.75;tab-size:4;max-width:none;font-size:.92rem}
.strips b{font-weight:400;padding:.12em 0;border-right:1px solid var(--paper)}
""" + "".join(
    f".strips .{name} .c{level},.strips i.{name}.c{level}"
    f"{{background:rgb({hue} / {0.75 * level / (LEVELS - 1):.2f})}}\n"
    for name, hue in HUES.items()
    for level in range(LEVELS)
)
"""Both schemes of the page read well on these: the colours are laid over its paper, three quarters thick at most."""
