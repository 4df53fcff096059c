"""What `foretoken analyze layers` found: how early a model's layers come to its final law.

Figure 2 of Mehra et al. 2025 (arXiv:2502.09419) is the divergence from the final law over depth, in a direction and
through a lens that the paper does not name: here are both directions and both lenses. Figure 3, entropy along a text,
is in `strip`.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from foretoken.analysis.summary import Estimate, Floats, Whole, columns, estimate, within
from foretoken.report.drawing import Chart, chart, drawing
from foretoken.report.tables import Section, Table, amount
from foretoken.study.rows import Rows
from foretoken.study.views.series import Panel, cell, data_labels, draw, groups, matrix, panels, vector
from foretoken.study.views.strip import strip_charts, strip_html

__all__ = ["sections", "strip_html"]

LENSES = {"normed": "with the final norm", "raw": "without the final norm"}
DIRECTIONS = {"kl_final_layer": "KL(final || layer)", "kl_layer_final": "KL(layer || final)"}


class Measured:
    """A file's rows as arrays: [N], or [N, L + 1] with a column per layer."""

    def __init__(self, file: Rows, text: str) -> None:
        self.head, self.rows, self.text = file.head, file.rows, text
        self._found: dict[tuple[str, str], Floats] = {}

    @property
    def names(self) -> tuple[str, str]:
        return self.head.label, self.text

    @property
    def layers(self) -> int:
        return int(self.head.settings["layers"])

    @property
    def half(self) -> int:
        """The layer at half depth; of an odd number the later."""
        return (self.layers + 1) // 2

    @cached_property
    def groups(self) -> Whole:
        return groups(self.rows)

    @cached_property
    def settled(self) -> Floats:
        return vector(self.rows, "settled")

    def values(self, lens: str, name: str) -> Floats:
        if (lens, name) not in self._found:
            self._found[lens, name] = matrix([row[lens] for row in self.rows], name)
        return self._found[lens, name]

    def means(self, values: Floats) -> list[Estimate | None]:
        return columns(values, self.groups)

    def mean(self, values: Floats) -> Estimate | None:
        return estimate(values, self.groups)


Values = Callable[[Measured], Floats]
"""A number for each position and layer [N, L + 1]."""


def measure(lens: str, name: str) -> Values:
    return lambda m: m.values(lens, name)


def settled_by(m: Measured) -> Floats:
    """[N, L + 1]: 1 from the layer on at which the position is settled."""
    return (m.settled[:, None] <= np.arange(m.layers + 1)).astype(np.float64)


def sections(files: list[Rows]) -> list[Section]:
    """Distance over depth, settled tokens over depth, and the strips of one text."""
    files = [f for f in files if f.rows]
    if not files:
        return []
    found = [Measured(f, text) for f, text in zip(files, data_labels([f.head for f in files]), strict=True)]
    shown = panels([f.head for f in files])
    return [distance(found, shown), exits(found, shown), along_a_text(found, files)]


# ----------------------------------------------------------------------------------------------------------- sections


def distance(found: Sequence[Measured], shown: Sequence[Panel]) -> Section:
    """Figure 2, in both directions and through both lenses."""
    charts = list[Chart]()
    for lens, how in LENSES.items():
        for name, title in DIRECTIONS.items():
            slug = f"layers-{name.replace('_', '-')}-{lens}"
            caption = f"{title} over depth, nats, layers read {how}"
            charts += by_depth(found, shown, slug, caption, [measure(lens, name)], title, log=True)
    notes = [
        "A layer's law is its hidden state through the model's own output head (logit lens), with the final norm in "
        "between or without. Layer 0 is the embedding. With the norm the last layer's law is the model's own, so its "
        "divergence is 0, which a logarithmic axis cannot show; without the norm it need not be: the head learnt on "
        "normed states, and takes the size of others for certainty.",
        "KL(final || layer) grows where the layer misses what the model will say, KL(layer || final) where the layer "
        "says what the model will not. ± and bars: one standard error, with positions of one document (of one window, "
        "where there is but one document) as one group.",
    ]
    head = ("model", "data", "at half depth", *(f"{t}, {lens}" for lens in LENSES for t in DIRECTIONS.values()))
    rows = [
        (*m.names, f"layer {m.half} of {m.layers}", *(nats(half(m, lens, d)) for lens in LENSES for d in DIRECTIONS))
        for m in found
    ]
    tables = [Table("Divergence from the final law at half depth, nats", head, rows, 3)]
    folded = [layer_table(found, lens, how) for lens, how in LENSES.items()]
    return Section("How far each layer is from the final law", notes, tables, charts, folded)


def exits(found: Sequence[Measured], shown: Sequence[Panel]) -> Section:
    """What a guess of an early layer is worth, and where the final token is found for good."""
    dashed = "; dashed: without the final norm"
    charts = [
        *by_depth(
            *(found, shown, "layers-agreement", f"How often the likeliest token is the final one, over depth{dashed}"),
            *([measure("normed", "agrees"), measure("raw", "agrees")], "share of tokens"),
        ),
        *by_depth(
            *(found, shown, "layers-overlap", f"Overlap of each layer's law with the final law, over depth{dashed}"),
            *([measure("normed", "overlap"), measure("raw", "overlap")], "1 - total variation"),
        ),
        *by_depth(
            *(found, shown, "layers-settled", "Tokens settled by each depth, with the final norm", [settled_by]),
            "share of tokens",
        ),
    ]
    notes = [
        "Settled: the earliest layer from which on the likeliest token, with the norm, stays the final one; first: the "
        "earliest whose likeliest token is the final one, whatever later layers say.",
        "Agreement and overlap are what an early exit at that layer would gain: the rate at which its single guess is "
        "accepted at temperature 0 and, by exact rejection sampling, at temperature 1.",
    ]
    head = (
        *("model", "data", "parameters", "layers", "positions", "settled at layer", "of depth", "first at layer"),
        *("settled by half depth", "entropy, nats", "next token top-1", "top-5"),
    )
    return Section(
        "Where the final token is found", notes, [Table("By model", head, list(map(facts, found)), 2)], charts
    )


def facts(m: Measured) -> tuple[str, ...]:
    """A model's line of the table."""
    ranks = m.values("normed", "rank")[:, -1]
    return (
        *m.names,
        amount(m.head.parameters),
        str(m.layers),
        f"{len(m.rows):,}",
        cell(m.mean(m.settled), 2),
        cell(m.mean(m.settled / m.layers)),
        cell(m.mean(vector(m.rows, "first")), 2),
        cell(m.mean(settled_by(m)[:, m.half])),
        cell(m.mean(vector(m.rows, "entropy"))),
        cell(m.mean(within(ranks, 1))),
        cell(m.mean(within(ranks, 5))),
    )


def along_a_text(found: Sequence[Measured], files: Sequence[Rows]) -> Section:
    """Figure 3: the same text as each model of one tokenizer reads it."""
    notes = [
        "Each token is coloured by the law that was to predict it: its entropy, and the depth at which the likeliest "
        "token had settled. Models that share a tokenizer read the same tokens."
    ]
    return Section("Entropy along a text", notes, charts=strip_charts(files, [m.text for m in found]))


# ------------------------------------------------------------------------------------------------- charts and tables


def by_depth(
    found: Sequence[Measured],
    shown: Sequence[Panel],
    name: str,
    caption: str,
    lines: Sequence[Values],
    ylabel: str,
    *,
    log: bool = False,
) -> list[Chart]:
    """A chart per panel: for each file a line over layer / L and, dashed, another for the second of `lines`."""
    charts = list[Chart]()
    for panel in shown:
        figure, axes = drawing(3.1)
        for style, (i, _) in enumerate(panel.members):
            m = found[i]
            depth = [layer / m.layers for layer in range(m.layers + 1)]
            for values, dashed in zip(lines, (False, True), strict=False):
                means = m.means(values(m))
                points = [None if log and e is not None and e.mean <= 0 else e for e in means]
                draw(axes, depth, points, style, dashed)
        axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel("depth: layer / layers of the model")
        axes.set_ylabel(ylabel, parse_math=False)
        if log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.02)
        charts.append(chart(name + panel.name, figure, caption + panel.where, panel.keys()))
    return charts


def half(m: Measured, lens: str, name: str) -> Estimate | None:
    return m.mean(m.values(lens, name)[:, m.half])


def layer_table(found: Sequence[Measured], lens: str, how: str) -> Table:
    """Every mean of every layer: the figures' numbers."""
    rows = list[tuple[str, ...]]()
    for m in found:
        ranks = m.values(lens, "rank")
        divergences = [m.means(m.values(lens, name)) for name in (*DIRECTIONS, "entropy")]
        shares = [m.values(lens, "agrees"), m.values(lens, "overlap"), within(ranks, 1), within(ranks, 5)]
        if lens == "normed":
            shares.append(settled_by(m))
        means = list(map(m.means, shares))
        rows += [
            (*m.names, str(layer), *(nats(d[layer]) for d in divergences), *(cell(s[layer]) for s in means))
            for layer in range(m.layers + 1)
        ]
    head = ("model", "data", "layer", *DIRECTIONS.values(), "entropy", "agreement", "overlap", "top-1", "top-5")
    return Table(f"Means by layer, {how}", head + ("settled",) * (lens == "normed"), rows, 2)


def nats(found: Estimate | None) -> str:
    """The mean with four digits and its standard error with two: divergences span many powers of ten."""
    if found is None or found.error is None:
        return cell(found, 4)
    return f"{found.mean:.4g} ± {found.error:.2g}"
