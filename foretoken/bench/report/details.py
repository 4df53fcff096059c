"""The sections of a report that rest on figures: each with its numbers as tables."""

from collections.abc import Sequence

from foretoken.bench.report import charts
from foretoken.bench.report.figures import Cell, Method, Overall, Spread
from foretoken.bench.report.summary import Summary, foretold, foretold_by_method, within
from foretoken.bench.rows import PLAIN
from foretoken.report.tables import DASH, Section, Shown, Table, fixed, percent, sameness, size, times


def by_task(summary: Summary) -> Section:
    """Speed-up per method and task, and every cell's numbers."""
    drawn = [charts.speedups(summary, t) for t in summary.temperatures]
    head = (
        *("method", "task", "T", "batch", "speed-up", "quartiles", "n", "over its own plain"),
        *("tokens/s", "quartiles of tokens/s", "τ", "same as plain"),
    )
    exact = {m.name: m.exact for m in summary.methods}
    rows = [row_of(c, exact[c.place.method]) for c in ordered(summary)]
    table = Table("Every cell; n: groups of prompts times repeats", head, rows, 2, words=("same as plain",))
    return Section("Speed-up per method and task", charts=[c for c in drawn if c], folded=[table])


def row_of(cell: Cell, exact: bool) -> list[Shown]:
    """A line of the table of cells."""
    speedup = cell.speedup
    return [
        *(cell.place.method, cell.place.task, f"{cell.place.temperature:g}", str(cell.place.batch)),
        times(speedup.median if speedup else None),
        quartiles(speedup),
        str(speedup.n if speedup else 0),
        times(cell.own.median if cell.own else None),
        *(f"{cell.rate.median:.1f}", quartiles(cell.rate, 1), fixed(cell.tau)),
        sameness(cell.same, cell.judged, exact),
    ]


def quartiles(spread: Spread | Overall | None, digits: int = 2) -> str:
    return DASH if spread is None else f"{spread.low:.{digits}f}{DASH}{spread.high:.{digits}f}"


def ordered(summary: Summary) -> list[Cell]:
    """Cells by temperature, batch and task, the fastest method first."""
    rank = {m.name: i for i, m in enumerate(summary.methods)}
    places = sorted(summary.cells, key=lambda p: (p.temperature, p.batch, summary.tasks.index(p.task), rank[p.method]))
    return [summary.cells[p] for p in places]


def acceptance(summary: Summary) -> Section:
    """How deep guesses are accepted."""
    drawn = [charts.acceptance(summary, t) for t in summary.temperatures]
    folded = [
        table
        for t in summary.temperatures
        if (methods := [m for m in summary.methods if t in m.acceptance])
        for table in depths(methods, t)
    ]
    notes = ["Unconditional: P(the first i guesses were accepted). Conditional: of guess i, those before it accepted."]
    return (
        Section("Acceptance", notes, charts=[c for c in drawn if c], folded=folded)
        if folded
        else Section("Acceptance", ["No guess was accepted."])
    )


def depths(methods: Sequence[Method], temperature: float) -> list[Table]:
    """Acceptance per depth, unconditional and conditional."""
    found = [(m.name, m.acceptance[temperature]) for m in methods]
    deepest = max(len(a.accepted) for _, a in found)
    head = ["method", "forwards", *(f"i={i}" for i in range(1, deepest + 1))]
    shares = [[name, f"{a.forwards:,}", *map(fixed, padded(a.unconditional, deepest))] for name, a in found]
    given = [[name, f"{a.forwards:,}", *map(fixed, padded(a.conditional, deepest))] for name, a in found]
    return [
        Table(f"Unconditional acceptance at temperature {temperature:g}", head, shares),
        Table(f"Conditional acceptance at temperature {temperature:g}", head, given),
    ]


def padded(values: Sequence[float | None], length: int) -> list[float | None]:
    return [*values, *[None] * (length - len(values))]


def parts(summary: Summary) -> Section:
    """Where the time goes."""
    head = ("method", "T", "prompts", "drafting", "forwards", "rest", "GB/s read", "peak memory")
    rows = [
        (
            *(m.name, f"{t:g}", percent(p.first), percent(p.draft), percent(p.verify), percent(p.own)),
            *(fixed(p.read_gb_s, 1), size(p.memory) if p.memory is not None else DASH),
        )
        for t in summary.temperatures
        for m in summary.methods
        if (p := m.parts.get(t))
    ]
    if not rows:
        return Section("Where the time goes", ["It was not timed."])
    note = "GB/s read: weights and cache that the target's forwards read, over their time."
    return Section("Where the time goes", [note], [Table(f"Shares of the time at batch {summary.base}", head, rows)])


def forwards(summary: Summary) -> Section:
    """What a forward costs."""
    title = "Time of a forward"
    chart = charts.forwards(summary)
    if chart is None:
        return Section(title, ["It was not timed."])
    head = ["width", *(f"{what}, batch {f.batch}" for f in summary.forwards for what in ("ms", "v"))]
    rows: list[list[str]] = []
    for width in sorted({w for f in summary.forwards for w in f.widths}):
        row = [str(width)]
        for f in summary.forwards:
            at = f.widths.index(width) if width in f.widths else None
            row += [DASH, DASH] if at is None else [fixed(f.seconds[at] * 1e3, 3), fixed(f.ratios[at])]
        rows.append(row)
    notes = ["v: time over that of width 1."]
    if summary.floor is not None:
        notes.append(
            f"Reading the weights from memory takes {summary.floor * 1e3:.3g} ms at this machine's bandwidth; no "
            "forward that reads them is faster."
        )
    return Section(title, notes, charts=[chart], folded=[Table("The target's forward", head, rows, 0)])


def predictions(summary: Summary) -> Section:
    """Whether the speed-ups are those that their parts predict."""
    title = "Predicted against measured speed-up"
    chart = charts.predictions(summary)
    if chart is None:
        return Section(title, ["Nothing was predicted: the costs of the parts were not timed."])
    good, total = within(foretold(summary).values())
    pooled, methods = within(foretold_by_method(summary).values())
    rows = [
        (
            *(c.place.method, c.place.task, f"{c.place.temperature:g}", str(c.place.batch)),
            *(times(c.speedup.median), times(c.predicted), fixed(c.predicted / c.speedup.median)),
        )
        for c in ordered(summary)
        if c.speedup and c.speedup.median and c.predicted is not None
    ]
    head = ("method", "task", "T", "batch", "measured", "predicted", "predicted / measured")
    notes = [
        f"Within 10 % of what was measured: {pooled} of {methods} (method, batch), over tasks and temperatures; "
        f"{good} of {total} single cells."
    ]
    return Section(title, notes, charts=[chart], folded=[Table("Predicted and measured", head, rows, 2)])


def batches(summary: Summary) -> Section:
    """Speed-up against batch size."""
    title = "Speed-up against batch"
    if len(summary.batches) < 2:
        return Section(title, [f"Only batch {summary.base} was measured."])
    drawn = [charts.batches(summary, t) for t in summary.temperatures]
    head = ["method", *(f"batch {b}" for b in summary.batches)]
    tables = [
        Table(
            f"Temperature {t:g}: geometric means of the tasks' medians, and of their quartiles",
            head,
            [
                [m.name, *(bars(summary.overall.get((m.name, t, b))) for b in summary.batches)]
                for m in summary.methods
                if m.name != PLAIN
            ],
        )
        for t in summary.temperatures
    ]
    return Section(title, charts=[c for c in drawn if c], folded=tables)


def bars(found: Overall | None) -> str:
    return DASH if found is None else f"{times(found.mean)} ({quartiles(found)})"
