"""The page of `foretoken analyze`: every finished analysis in a folder, as HTML, as Markdown and as figures."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import wrap

from foretoken.errors import UserError
from foretoken.page import text_of
from foretoken.report.drawing import save
from foretoken.report.layout import body, prose, whole
from foretoken.report.layout import write as write_pages
from foretoken.report.tables import Alarm, Section, Shown, Table, amount, escaped, listed
from foretoken.study import rows
from foretoken.study.rows import Head, Rows

KINDS = ("marginal", "layers", "heads")
"""Analyses that write rows."""
FIGURES = "figures"
BRIEF = {"marginal": 0, "layers": 1, "heads": 0}
"""The section of each kind whose first table a terminal shows."""
BESIDE = ("parameters", "layers", "positions", "first at layer", "settled by half depth", "top-5")
"""Columns that only the page has room for."""
HEAD = 9
"""Characters of a line of a column's name there."""
NAMES = 4
"""Models in the heading."""
INTRODUCTION = "What language models know about tokens further ahead, measured by foretoken analyze."


def write(folder: Path, out: Path | None = None) -> list[Path]:
    """Write index.html, index.md and figures of what is finished in the folder, into `out` or there."""
    out = folder if out is None else out
    files = {kind: rows.found(folder, kind) for kind in KINDS}
    heads = [f.head for some in files.values() for f in some]
    waiting = unfinished(folder, heads)
    parts = [part for kind in (*KINDS, "ceiling") for part in sections(folder, kind, files)]
    more = ceiling_heads(folder)
    if not parts:
        raise UserError(
            f"{str(folder)!r} holds no finished analysis"
            + (f" ({listed(waiting)} is not complete)" if waiting else "")
            + "; run `foretoken analyze marginal MODEL --data F --out` with that folder, to its end."
        )
    waited = [Alarm(f"{name} is not complete and left out.") for name in waiting]
    parts = [*parts, conditions([*heads, *more], waited)]
    charts = [c for part in parts for c in part.charts]
    assert len({c.name for c in charts}) == len(charts)  # each is a file
    heading = f"foretoken analyze: {some(dict.fromkeys(Path(h.model).name for h in [*heads, *more]))}"
    links = "\n".join(f"![{escaped(c.caption)}]({FIGURES}/{c.name}.svg)\n" for c in charts)
    text = f"# {escaped(heading)}\n\n{INTRODUCTION}\n\n{prose(parts)}\n## Figures\n\n{links}"
    written = write_pages(out, "index", whole(heading, f"<p>{text_of(INTRODUCTION)}</p>", body(parts)), text)
    for c in charts:
        written += save(c, out / FIGURES)
    return written


def brief(folder: Path, kind: str) -> tuple[list[Shown], list[Table]]:
    """What a terminal shows of one kind of analysis: verdicts, and the first tables."""
    if kind == "ceiling":
        (part,) = sections(folder, "ceiling", {})
        return list(part.notes[:-1]), [distinct(table) for table in part.tables]
    found = rows.found(folder, kind)
    parts = sections(folder, kind, {kind: found}) if found else []
    return [], [distinct(part.tables[0]) for part in parts[BRIEF[kind] :][:1] if part.tables]


def distinct(table: Table) -> Table:
    """The table for a narrow screen: no errors, and no columns of words, but for the last, that say one thing only."""
    words = range(table.left - 1)
    dropped = [i for i in words if len({str(row[i]) for row in table.rows}) == 1]
    dropped += [i for i, name in enumerate(table.head) if name in BESIDE]
    kept = [i for i in range(len(table.head)) if i not in dropped]
    rows_kept = [[str(row[i]).partition(" ±")[0] for i in kept] for row in table.rows]
    left = sum(i < table.left for i in kept)
    head = ["\n".join(wrap(table.head[i], HEAD)) for i in kept]
    return replace(table, head=head, rows=rows_kept, left=left)


def sections(folder: Path, kind: str, files: dict[str, list[Rows]]) -> list[Section]:
    """Everything about one kind of analysis."""
    if kind == "ceiling":
        from foretoken.study.views import ceiling

        ceilings = ceiling.found(folder)
        return ceiling.sections(ceilings) if ceilings else []
    if not files[kind]:
        return []
    if kind == "marginal":
        from foretoken.study.views import marginal

        return marginal.sections(files[kind])
    if kind == "layers":
        from foretoken.study.views import layers

        found = layers.sections(files[kind])
        return [*found[:-1], *(replace(last, free=layers.strip_html(files[kind])) for last in found[-1:])]
    from foretoken.study.views import heads

    return heads.sections(files[kind], files.get("marginal", []))


def ceiling_heads(folder: Path) -> list[Head]:
    """The heads of those analyses that leave no rows."""
    from foretoken.study.views import ceiling

    return [replace(c.head, kind="ceiling") for c in ceiling.found(folder)]


def unfinished(folder: Path, heads: Sequence[Head]) -> list[str]:
    """Names of files of rows that have no end yet."""
    finished = {rows.file_of(folder, head) for head in heads}
    found = sorted(path for kind in KINDS for path in folder.glob(f"{kind}-*.jsonl"))
    return [path.name for path in found if path not in finished]


def some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    first = list(names)
    return listed(first[:NAMES]) + (f" and {len(first) - NAMES} more" if len(first) > NAMES else "")


def conditions(heads: Sequence[Head], waiting: Sequence[Shown]) -> Section:
    """What was analysed, how and on what."""
    analysed = [
        (h.kind, h.label, amount(h.parameters), h.data, listed(f"{k} {v}" for k, v in h.settings.items()), h.model)
        for h in heads
    ]
    names = ("analysis", "model", "parameters", "data", "settings", "path")
    machines: dict[str, list[str]] = {}
    for h in heads:
        used = machines.setdefault(listed(f"{k} {v}" for k, v in h.machine.items()), [])
        used.append(f"{h.kind} {h.label}")
    made_on = [(machine, listed(dict.fromkeys(used))) for machine, used in machines.items() if machine]
    tables = [
        Table("What was analysed", names, analysed, 2, words=("data", "settings", "path")),
        Table("Machines", ("machine", "analyses"), made_on, 2),
    ]
    return Section("Conditions", waiting, folded=tables[: 1 + bool(made_on)])
