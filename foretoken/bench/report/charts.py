"""The figures of a comparison."""

from foretoken.bench.report.figures import Cell
from foretoken.bench.report.summary import Summary
from foretoken.bench.rows import PLAIN
from foretoken.report.drawing import (
    BAND,
    INK,
    MARKERS,
    MOST,
    SOFT,
    Chart,
    Key,
    colour,
    drawing,
    keys_of,
    line,
    powers,
    sideways,
    svg,
)
from foretoken.show import visible


def styles(summary: Summary) -> dict[str, int]:
    """The fastest methods, the same in every figure, and how each is drawn."""
    first = summary.temperatures[0], summary.base
    means = {m.name: o.mean for m in summary.methods if (o := summary.overall.get((m.name, *first)))}
    names = sorted((m.name for m in summary.methods if m.name != PLAIN), key=lambda n: -means.get(n, 0.0))
    return {name: i for i, name in enumerate(names[:MOST])}


def most_accepting(summary: Summary, temperature: float) -> dict[str, int]:
    """The methods of the most tokens per forward, drawn as in the other figures; new ones take what is left over."""
    taus = {m.name: m.tau.get(temperature, 0.0) for m in summary.methods if temperature in m.acceptance}
    names, style = sorted(taus, key=lambda n: -taus[n])[:MOST], styles(summary)
    free = iter(set(range(MOST)) - {style[name] for name in names if name in style})
    return {name: style[name] if name in style else next(free) for name in names}


def speedups(summary: Summary, temperature: float) -> Chart | None:
    """Speed-up per method and task: medians, quartiles, and the mean over tasks."""
    methods = [m.name for m in summary.methods if (m.name, temperature, summary.base) in summary.overall]
    methods = [name for name in methods if name != PLAIN]
    if not methods:
        return None
    tasks = summary.tasks
    lane = min(0.11, 0.44 / len(tasks))  # inches
    block = 0.3 + lane * len(tasks)
    figure, axes = drawing(block * len(methods) + 0.95)
    axes.set_ylim(block * len(methods), -0.05)
    axes.set_yticks([])
    right = 0.0
    for i, name in enumerate(methods):
        top = i * block
        axes.text(0.01, top + 0.09, visible(name), transform=sideways(axes), va="center", color=INK, parse_math=False)
        mean = summary.overall[name, temperature, summary.base].mean
        axes.plot([mean, mean], [top + 0.18, top + block - 0.06], color=INK, linewidth=1.4)
        for j, task in enumerate(tasks):
            found = summary.cells.get((name, task, temperature, summary.base))  # pyright: ignore[reportArgumentType, reportCallIssue]
            if found is None or found.speedup is None:
                continue
            y = top + 0.2 + lane * (j + 0.5)
            axes.plot([found.speedup.low, found.speedup.high], [y, y], color=colour(j), linewidth=1.6)
            axes.plot([found.speedup.median], [y], color=colour(j), marker=MARKERS[j % MOST], markersize=4.5)
            right = max(right, found.speedup.high)
    axes.set_xlim(0, max(right * 1.04, 1.1))
    axes.axvline(1, color=SOFT, linestyle="--", linewidth=0.9, zorder=0)
    axes.tick_params(top=True, labeltop=True)
    axes.set_xlabel("times plain decoding")
    keys = [*(Key(task, j % MOST) for j, task in enumerate(tasks)), Key("geometric mean of the tasks", -1)]
    where = f"temperature {temperature:g}, batch {summary.base}"
    caption = f"Speed-up at {where}: each task's median, and a line between its quartiles"
    return Chart("speedups", svg(figure, f"speedups-{temperature:g}"), caption, keys)


def acceptance(summary: Summary, temperature: float) -> Chart | None:
    """P(the first i guesses were accepted) against i."""
    style = most_accepting(summary, temperature)
    found = {m.name: m.acceptance[temperature].unconditional for m in summary.methods if m.name in style}
    if not found:
        return None
    figure, axes = drawing(3.1)
    for name, shares in found.items():
        line(axes, range(1, len(shares) + 1), shares, style[name])
    depth = max(len(shares) for shares in found.values())
    axes.set_xlim(0.7, depth + 0.3)
    axes.set_xticks(range(1, depth + 1, 1 + depth // 12))
    axes.set_ylim(0, 1)
    axes.set_xlabel("depth i")
    axes.set_ylabel("P(first i guesses accepted)")
    caption = f"Acceptance against depth at temperature {temperature:g}, batch {summary.base}, all tasks together"
    return Chart("acceptance", svg(figure, f"acceptance-{temperature:g}"), caption, keys_of(style, found))


def forwards(summary: Summary) -> Chart | None:
    """Milliseconds of a forward against its width, and the floor that the memory's bandwidth sets."""
    if not summary.forwards:
        return None
    figure, axes = drawing(3.1)
    for i, some in enumerate(summary.forwards[:MOST]):
        line(axes, some.widths, [s * 1e3 for s in some.seconds], i)
    widths = sorted({w for some in summary.forwards for w in some.widths})
    powers(axes, widths)
    axes.set_ylim(bottom=0)
    keys = [Key(f"batch {some.batch}", i) for i, some in enumerate(summary.forwards[:MOST])]
    if summary.floor is not None:
        axes.axhline(summary.floor * 1e3, color=INK, linestyle="--", linewidth=1)
        keys.append(Key(f"bandwidth floor, {summary.floor * 1e3:.3g} ms", -2))
    axes.set_xlabel("width, tokens fed per prompt")
    axes.set_ylabel("ms per forward")
    return Chart("forwards", svg(figure, "forwards"), "Time of the target's forward against its width", keys)


def predictions(summary: Summary) -> Chart | None:
    """Predicted against measured speed-up, and the band of 10 % around the measured one."""
    style = styles(summary)
    pairs = [c for c in summary.cells.values() if predicted(c)]
    if not pairs:
        return None
    figure, axes = drawing(3.9)
    points = [(c.place.method, c.speedup.median, c.predicted) for c in pairs if c.speedup and c.predicted is not None]
    end = 1.06 * max(max(x, y) for _, x, y in points)
    axes.fill_between([0, end], [0, 0.9 * end], [0, 1.1 * end], color=BAND, linewidth=0, zorder=0)
    axes.plot([0, end], [0, end], color=SOFT, linestyle="--", linewidth=0.9, zorder=1)
    for name, measured, expected in points:
        i = style.get(name)
        look = (SOFT, ".") if i is None else (colour(i), MARKERS[i])
        axes.plot([measured], [expected], color=look[0], marker=look[1], markersize=5, alpha=0.85)
    axes.set_xlim(0, end)
    axes.set_ylim(0, end)
    axes.set_xlabel("measured speed-up")
    axes.set_ylabel("predicted speed-up")
    keys = keys_of(style, {name for name, _, _ in points})
    if any(name not in style for name, _, _ in points):
        keys.append(Key("other methods", -3))
    caption = "Predicted against measured speed-up of every cell; the band is 10 % around the measured one"
    return Chart("predictions", svg(figure, "predictions"), caption, keys)


def batches(summary: Summary, temperature: float) -> Chart | None:
    """Speed-up against batch size."""
    style = styles(summary)
    found = {
        name: {b: o for b in summary.batches if (o := summary.overall.get((name, temperature, b)))} for name in style
    }
    found = {name: some for name, some in found.items() if some}
    if not found or len(summary.batches) < 2:
        return None
    figure, axes = drawing(3.3)
    for name, some in found.items():
        i = style[name]
        x = [b * 2 ** ((i - (MOST - 1) / 2) * 0.02) for b in some]  # side by side, so that the bars stay readable
        bars = [[o.mean - o.low for o in some.values()], [o.high - o.mean for o in some.values()]]
        axes.errorbar(x, [o.mean for o in some.values()], yerr=bars, fmt="none", ecolor=colour(i), elinewidth=1.1)
        line(axes, x, [o.mean for o in some.values()], i)
    axes.axhline(1, color=SOFT, linestyle="--", linewidth=0.9, zorder=0)
    powers(axes, summary.batches)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch")
    axes.set_ylabel("times plain decoding")
    caption = (
        f"Speed-up against batch at temperature {temperature:g}: geometric means of the tasks' medians and quartiles"
    )
    return Chart("batches", svg(figure, f"batches-{temperature:g}"), caption, keys_of(style, found))


def predicted(cell: Cell) -> bool:
    """Whether a cell has both figures."""
    return cell.speedup is not None and cell.predicted is not None
