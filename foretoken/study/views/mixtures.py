"""Which layers heads read, where each reads a mixture of its own: heat maps and their numbers."""

from collections.abc import Sequence

from foretoken.report.drawing import Chart, chart, drawing
from foretoken.report.tables import Section, Table
from foretoken.study.views.series import slugs
from foretoken.study.views.trained import Group, Measured

LIGHT, DARK = "#f2f7fb", "#004f7c"
"""Colours of the smallest and the largest weight, on a light page and on a dark one."""


def mixtures(group: Group) -> list[Section]:
    """The weights that heads give to layers, if some do."""
    found = [(m, m.end["mixture"]) for m in group.members if m.end.get("mixture")]
    if not found:
        return []
    names = slugs([m.drafter for m, _ in found])
    charts = [heat(weights, m, group, name) for (m, weights), name in zip(found, names, strict=True)]
    tables = [
        Table(
            f"Weights of layers, {m.drafter}",
            ["guess", *layer_names(len(weights[0]))],
            [[str(i), *(f"{w:.3f}" for w in row)] for i, row in zip(m.depths, weights, strict=True)],
        )
        for m, weights in found
    ]
    said = [
        "Each head reads its own mixture of all layers' states (arXiv:2502.09419). Each state is brought to the size "
        "of the final one, so weights are shares. The final state is the last layer's, behind the final norm."
    ]
    return [Section(f"What heads read: {group.where}", said, charts=charts, folded=tables)]


def layer_names(count: int) -> list[str]:
    """Of the embedding, the layers and, last, the final state."""
    return ["embedding", *(f"layer {i}" for i in range(1, count - 1)), "final"]


def heat(weights: Sequence[Sequence[float]], m: Measured, group: Group, name: str) -> Chart:
    """A row per layer, the deepest on top, and a column per guess, with the weights in the cells."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    names, most = layer_names(len(weights[0])), max(map(max, weights))
    figure, axes = drawing(0.26 * len(names) + 0.8)
    colours = LinearSegmentedColormap.from_list("weights", [LIGHT, DARK])
    scale = PowerNorm(0.5, 0, most)  # small weights differ too
    cells = [[row[layer] for row in weights] for layer in range(len(names))]
    axes.grid(visible=False)
    axes.pcolormesh(cells, cmap=colours, norm=scale, edgecolors="#ffffff", linewidth=1)
    for y, row in enumerate(cells):
        for x, weight in enumerate(row):
            tone = "#ffffff" if scale(weight) > 0.5 else "#101418"
            axes.text(x + 0.5, y + 0.5, f"{weight:.3f}", ha="center", va="center", fontsize=9, color=tone)
    axes.set_xticks([i + 0.5 for i in range(len(weights))], [f"{i}" for i in m.depths])
    axes.set_yticks([i + 0.5 for i in range(len(names))], names)
    axes.set_xlabel("guess")
    caption = f"Weights that each head of {m.drafter} gives to the layers; {group.where}"
    return chart(f"heads-mixture-{name.lower()}-{group.name}", figure, caption, [])
