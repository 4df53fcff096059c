"""What a report says, section by section, before it is a page: the comparison first, then what it rests on."""

from collections.abc import Sequence

from foretoken.bench.report.details import acceptance, batches, by_task, forwards, parts, predictions
from foretoken.bench.report.figures import Method, Overall
from foretoken.bench.report.summary import Summary
from foretoken.bench.rows import PLAIN, Row, Run
from foretoken.report.tables import (
    DASH,
    Alarm,
    Section,
    Shown,
    Table,
    amount,
    counted,
    fixed,
    listed,
    percent,
    sameness,
    size,
    times,
)


def sections(summary: Summary) -> list[Section]:
    """The report on one folder, but for its texts."""
    return [
        conditions(summary),
        comparison(summary),
        by_task(summary),
        acceptance(summary),
        parts(summary),
        forwards(summary),
        predictions(summary),
        batches(summary),
        exactness(summary),
        *skipped(summary),
    ]


def headline(summary: Summary) -> str:
    """The fastest exact method, in a sentence."""
    for m in summary.methods:
        first = summary.temperatures[0]
        found = summary.overall.get((m.name, first, summary.base))
        if m.exact and not m.peer and m.name != PLAIN and found is not None:
            return (
                f"{m.name}: {times(found.mean)} plain decoding at temperature {first:g}, batch {summary.base}, "
                "the fastest of the exact methods."
            )
    return "No exact method was measured beside plain decoding."


def conditions(summary: Summary) -> Section:
    """What was measured, on what, by which commands."""
    rows, runs = summary.results.rows, summary.runs
    prompts = {t: len({r.prompt for r in rows if r.task == t}) for t in summary.tasks}
    facts = [
        *facts_of(runs),
        ("prompts per task", listed(f"{task} {n}" for task, n in prompts.items())),
        ("new tokens, at most", f"{max(r.tokens for r in rows):,}"),
        ("repeats", str(len({r.repeat for r in rows}))),
        ("temperatures", listed(f"{t:g}" for t in summary.temperatures)),
        ("batch sizes", listed(summary.batches)),
    ]
    calls = Table(
        "Commands", ("run", "date", "command"), [(r.id, r.date.replace("T", " "), r.command) for r in runs], 3
    )
    notes = [Alarm(f"Rows come from runs that differ in {what}.") for what in changes(summary)]
    return Section("Conditions", notes, [Table("What was measured", ("condition", "value"), facts, 2), calls])


def facts_of(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Model, machine and versions; several values where runs differ."""
    names = ("processor", "threads", "memory_gib")
    lists = [
        ("model", [r.model for r in runs]),
        ("parameters", [f"{r.parameters:,}" for r in runs]),
        ("weights", [size(r.weights) for r in runs]),
        ("dtype", [r.dtype for r in runs]),
        ("device", [r.device for r in runs]),
        ("machine", [machine(r) for r in runs]),
        ("memory bandwidth", [f"{r.bandwidth_gb_s:.3g} GB/s" for r in runs]),
        ("versions", [listed(f"{k} {v}" for k, v in r.machine.items() if k not in names) for r in runs]),
        ("settings", [listed(f"{k} {v}" for k, v in r.settings.items()) for r in runs]),
    ]
    return [(name, "; ".join(dict.fromkeys(v for v in values if v))) for name, values in lists if any(values)]


def machine(run: Run) -> str:
    known = run.machine
    threads = f"{known['threads']} threads" if "threads" in known else ""
    memory = f"{known['memory_gib']} GiB" if "memory_gib" in known else ""
    return ", ".join(part for part in (str(known.get("processor", "")), threads, memory) if part)


def changes(summary: Summary) -> list[str]:
    """In which conditions the runs that left rows differ, with the values."""
    used = {r.run for r in summary.results.rows}
    facts = [dict(facts_of([r])) for r in summary.runs if r.id in used]
    names = [n for n in dict.fromkeys(n for f in facts for n in f) if n != "memory bandwidth"]  # each measures its own
    values = {n: list(dict.fromkeys(f.get(n, "nothing") for f in facts)) for n in names}
    return [f"{name}: {' / '.join(found)}" for name, found in values.items() if len(found) > 1]


def comparison(summary: Summary) -> Section:
    """The seeds' table, measured."""
    tables = [compared(summary, [m for m in summary.methods if not m.peer])]
    peers = [m for m in summary.methods if m.peer]
    if peers:
        tables.append(compared_peers(summary, peers))
    notes: list[Shown] = [
        "Speed-up: tokens per second over plain decoding's in the same round, the median over groups of prompts and "
        f"repeats; of these the geometric mean over {counted(len(summary.tasks), 'task')} at batch {summary.base}, "
        "the least and the greatest in brackets. τ: tokens per forward of the target, bonus tokens included, the "
        "prompt's forward not."
    ]
    if summary.unmatched:
        notes.append(f"{counted(summary.unmatched, 'row')} without a plain row in the same round: not compared.")
    return Section("Comparison", notes, tables)


def compared(summary: Summary, methods: Sequence[Method]) -> Table:
    """Method, speed-up, tokens per forward, extra parameters and memory, exactness, requirements."""
    head = [
        "method",
        *(f"speed-up, T={t:g}" for t in summary.temperatures),
        *(f"τ, T={t:g}" for t in summary.temperatures),
        *("extra parameters", "extra memory", "exact?", "same as plain", "requires"),
    ]
    rows = [
        (
            m.name,
            *(mean(o, summary) for o in overalls(summary, m)),
            *(fixed(m.tau.get(t)) for t in summary.temperatures),
            f"{amount(m.extra_parameters)} ({percent(m.share)})" if m.extra_parameters else "none",
            size(m.extra_memory) if m.extra_memory else "none",
            verdict(m),
            sameness(m.same, m.judged, m.exact) if m.name != PLAIN else DASH,
            m.requires or "nothing",
        )
        for m in methods
    ]
    return Table("Methods", head, rows, words=("exact?", "same as plain", "requires"))


def brief(summary: Summary) -> Table:
    """The same as narrow as a terminal, other programs included."""
    head = [
        "method",
        *(f"T={t:g}" for t in summary.temperatures),
        *(f"τ T={t:g}" for t in summary.temperatures),
        *("exact?", "same as plain"),
    ]
    rows = [
        (
            m.name,
            *(times(o.mean if o else None) for o in overalls(summary, m)),
            *(fixed(m.tau.get(t)) for t in summary.temperatures),
            *(verdict(m), sameness(m.same, m.judged, m.exact) if m.name != PLAIN else DASH),
        )
        for m in summary.methods
    ]
    caption = (
        f"Speed-up over plain decoding, batch {summary.base}, geometric mean of {counted(len(summary.tasks), 'task')}"
    )
    return Table(caption, head, rows, words=("exact?", "same as plain"))


def overalls(summary: Summary, method: Method) -> list[Overall | None]:
    """Its speed-up at each temperature, at the smallest batch."""
    return [summary.overall.get((method.name, t, summary.base)) for t in summary.temperatures]


def compared_peers(summary: Summary, peers: Sequence[Method]) -> Table:
    """Other programs on the same prompts, over our plain decoding and over theirs."""
    head = ["program"]
    for t in summary.temperatures:
        head += [f"over our plain, T={t:g}", f"over its own plain, T={t:g}"]
    head += ["exact?", "same as plain", "requires"]
    rows: list[list[Shown]] = []
    for m in peers:
        row: list[Shown] = [m.name]
        for t in summary.temperatures:
            key = (m.name, t, summary.base)
            row += [mean(summary.overall.get(key), summary), mean(summary.own.get(key), summary)]
        rows.append([*row, verdict(m), sameness(m.same, m.judged, m.exact), m.requires or "nothing"])
    return Table("Other programs", head, rows, words=("exact?", "same as plain", "requires"))


def mean(found: Overall | None, summary: Summary) -> str:
    """The mean and the range; and over how many tasks, if not all."""
    if found is None:
        return DASH
    some = f", {found.tasks} of {len(summary.tasks)} tasks" if found.tasks < len(summary.tasks) else ""
    return f"{times(found.mean)} ({found.least:.2f}{DASH}{found.most:.2f}{some})"


def verdict(method: Method) -> Shown:
    return "exact" if method.exact else Alarm(f"LOSSY: {method.rule}")


def exactness(summary: Summary) -> Section:
    """Every output that is not plain decoding's though it should be."""
    if not summary.differing:
        return Section("Same as plain?", ["Every output that should be plain decoding's is, token for token."])
    exact = {m.name: m.exact for m in summary.methods}
    groups: dict[tuple[str, float, int], list[Row]] = {}
    for row in summary.differing:
        groups.setdefault((row.method, row.temperature, row.batch), []).append(row)
    rows: list[list[Shown]] = []
    for (name, t, batch), some in groups.items():
        judged = sum(c.judged for c in summary.cells.values() if (c.place.method, *c.place[2:]) == (name, t, batch))
        gaps = [r.differs["gap"] for r in some if r.differs and r.differs.get("gap") is not None]
        count = f"{len(some)} of {judged}"
        rows.append(
            [name, f"{t:g}", str(batch), Alarm(count) if exact[name] else count, significant(max(gaps, default=None))]
        )
    head = ("method", "T", "batch", "outputs that differ", "largest gap")
    notes = [
        "Gap: between the target's two best logits where the outputs part. Near 0 it is a tie that rounding decided; "
        "otherwise the rule is lossy, or there is a bug."
    ]
    folded = differing(summary.differing)
    return Section(
        "Same as plain?", notes, [Table("Outputs that are not plain decoding's", head, rows)], folded=[folded]
    )


def differing(rows: Sequence[Row]) -> Table:
    """Where each of the outputs parts from plain decoding's."""
    head = ("method", "task", "prompt", "T", "batch", "first at", "tokens", "gap")
    lines: list[list[str]] = []
    for r in rows:
        found = r.differs or {}
        tokens = " / ".join(map(str, found.get("tokens", ())))
        place = (r.method, r.task, r.prompt, f"{r.temperature:g}", str(r.batch), str(found.get("position", DASH)))
        lines.append([*place, tokens, significant(found.get("gap"))])
    return Table("Where they part", head, lines, 3)


def significant(value: float | None) -> str:
    return DASH if value is None else f"{value:.3g}"


def skipped(summary: Summary) -> list[Section]:
    """What did not run."""
    rows = [
        (s.method, str(s.batch or "all"), "all" if s.temperature is None else f"{s.temperature:g}", s.reason)
        for s in summary.skips
    ]
    if not rows:
        return []
    return [Section("Not measured", [], [Table("Skipped", ("method", "batch", "T", "reason"), rows, 4)])]
