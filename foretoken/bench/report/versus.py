"""Two comparisons beside each other: what differs in their conditions, then their cells."""

from collections.abc import Sequence

from foretoken.bench.report.contents import facts_of
from foretoken.bench.report.figures import Cell, Spread
from foretoken.bench.report.summary import Summary
from foretoken.bench.rows import PLAIN
from foretoken.report.tables import DASH, Alarm, Section, Shown, Table, counted, fixed, times


def versus(a: Summary, b: Summary) -> list[Section]:
    """The report on two folders."""
    return [conditions(a, b), cells(a, b), *alone(a, b)]


def conditions(a: Summary, b: Summary) -> Section:
    """Conditions and methods that are not the same in both."""
    changed, methods = differences(facts(a), facts(b)), differences(told(a), told(b))
    tables: list[Table] = []
    if changed:
        tables.append(Table("Conditions that differ", ("condition", "A", "B"), changed, 3))
    if methods:
        tables.append(Table("Methods whose settings differ", ("method", "A", "B"), methods, 3))
    notes: list[Shown] = [] if tables else ["Model, machine, versions, prompts and settings are the same in both."]
    if any(name in ("machine", "device", "versions") for name, *_ in changed):
        notes.append(Alarm("They ran on different machines or versions: compare speed-ups, not tokens per second."))
    return Section("What differs", notes, tables)


def facts(summary: Summary) -> dict[str, str]:
    """The conditions of one of them, in words."""
    rows = summary.results.rows
    return {
        **{k: v for k, v in facts_of(summary.runs) if k != "memory bandwidth"},  # measured anew by each
        "prompts": ", ".join(f"{t} {len({r.prompt for r in rows if r.task == t})}" for t in sorted(summary.tasks)),
        "new tokens, at most": str(max(r.tokens for r in rows)),
        "repeats": str(len({r.repeat for r in rows})),
        "seeds": ", ".join(map(str, sorted({r.seed for r in rows}))),
    }


def told(summary: Summary) -> dict[str, str]:
    """What each method was told."""
    return {
        m.name: ", ".join([m.drafter, *(f"{k} {v}" for k, v in sorted(m.settings.items())), f"rule {m.rule}"])
        for m in summary.methods
    }


def differences(a: dict[str, str], b: dict[str, str]) -> list[tuple[str, str, str]]:
    """Of the names in both, those with another value."""
    return [(name, a[name], b[name]) for name in a if name in b and a[name] != b[name]]


def cells(a: Summary, b: Summary) -> Section:
    """Every cell that is in both."""
    rank = {m.name: i for i, m in enumerate(a.methods)}
    both = [place for place in a.cells if place in b.cells]
    both.sort(key=lambda p: (p.temperature, p.batch, a.tasks.index(p.task), rank[p.method]))
    rows = [row_of(a.cells[place], b.cells[place]) for place in both]
    head = (
        *("method", "task", "T", "batch", "speed-up A", "speed-up B", "B / A", "so B is"),
        *("tokens/s A", "tokens/s B", "B / A of tokens/s", "so B writes", "τ A", "τ B"),
    )
    note = (
        "Medians. B is called faster or slower only where the ranges between the quartiles do not overlap. A speed-up "
        "is over plain decoding in the same round of the same folder."
    )
    if not rows:
        return Section("Cells in both", ["No method ran in the same task, temperature and batch size in both."])
    words = ("so B is", "so B writes")
    return Section("Cells in both", [note], [Table(counted(len(rows), "cell"), head, rows, 2, words)])


def row_of(a: Cell, b: Cell) -> list[Shown]:
    """A cell in both."""
    plain = a.place.method == PLAIN  # its speed-up is 1 in both
    x, y = (None, None) if plain else (a.speedup, b.speedup)
    return [
        *(a.place.method, a.place.task, f"{a.place.temperature:g}", str(a.place.batch)),
        *(times(x.median if x else None), times(y.median if y else None), fixed(ratio(x, y)), judged(x, y)),
        *(f"{a.rate.median:.1f}", f"{b.rate.median:.1f}", fixed(ratio(a.rate, b.rate)), judged(a.rate, b.rate)),
        *(fixed(a.tau), fixed(b.tau)),
    ]


def brief(a: Summary, b: Summary) -> Table:
    """The cells that one of them is faster in, for a terminal."""
    head = ("method", "task", "T", "batch", "speed-up A", "speed-up B", "B / A", "so B is")
    tables = cells(a, b).tables
    found = [row[: len(head)] for table in tables for row in table.rows]
    rows = [row for row in found if str(row[-1]) in ("faster", "slower")]
    return Table(f"Speed-ups that differ: {len(rows)} of {counted(len(found), 'cell')}", head, rows, 2, ("so B is",))


def ratio(a: Spread | None, b: Spread | None) -> float | None:
    return b.median / a.median if a and b and a.median else None


def judged(a: Spread | None, b: Spread | None) -> Shown:
    """Whether `b` is faster, where the ranges between the quartiles do not overlap."""
    if a is None or b is None:
        return DASH
    if b.low > a.high:
        return "faster"
    return Alarm("slower") if b.high < a.low else "the same"


def alone(a: Summary, b: Summary) -> list[Section]:
    """What only one of them has."""
    rows: list[tuple[str, str]] = []
    for name, mine, other in (("A", a, b), ("B", b, a)):
        left = [p for p in mine.cells if p not in other.cells]
        rows += [(name, text) for text in places(left, other)]
    if not rows:
        return []
    return [Section("In one of them only", [], [Table("Cells without a partner", ("in", "cell"), rows, 2)])]


def places(left: Sequence[tuple[str, str, float, int]], other: Summary) -> list[str]:
    """The cells in words; a method that the other lacks altogether is one line."""
    known = {m.name for m in other.methods}
    return list(
        dict.fromkeys(
            f"{m}, {task}, temperature {t:g}, batch {b}" if m in known else f"{m}, in every cell"
            for m, task, t, b in left
        )
    )
