"""The page of `foretoken analyze`: every finished analysis in a folder, as HTML, as Markdown and as figures."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

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
INTRODUCTION = "What language models know about tokens further ahead, measured by foretoken analyze."


def write(folder: Path, out: Path | None = None) -> list[Path]:
    """Write index.html, index.md and figures of what is finished in the folder, into `out` or there."""
    out = folder if out is None else out
    files = {kind: rows.found(folder, kind) for kind in KINDS}
    heads = [f.head for some in files.values() for f in some]
    waiting = unfinished(folder, heads)
    parts, more = analyses(folder, files)
    if not parts:
        raise UserError(
            f"{str(folder)!r} holds no finished analysis"
            + (f" ({listed(waiting)} is not complete)" if waiting else "")
            + "; run `foretoken analyze marginal MODEL --data F --out` with that folder, to its end."
        )
    parts = [conditions([*heads, *more], waiting), *parts]
    charts = [c for part in parts for c in part.charts]
    assert len({c.name for c in charts}) == len(charts)  # each is a file
    heading = f"foretoken analyze: {listed(dict.fromkeys(h.label for h in [*heads, *more]))}"
    links = "\n".join(f"![{escaped(c.caption)}]({FIGURES}/{c.name}.svg)\n" for c in charts)
    text = f"# {escaped(heading)}\n\n{INTRODUCTION}\n\n{prose(parts)}\n## Figures\n\n{links}"
    written = write_pages(out, "index", whole(heading, f"<p>{text_of(INTRODUCTION)}</p>", body(parts)), text)
    for c in charts:
        written += save(c, out / FIGURES)
    return written


def analyses(folder: Path, files: dict[str, list[Rows]]) -> tuple[list[Section], list[Head]]:
    """The sections of every analysis that left something, and the heads of those that leave no rows."""
    parts = list[Section]()
    if files["marginal"]:
        from foretoken.study.views import marginal

        parts += marginal.sections(files["marginal"])
    if files["layers"]:
        from foretoken.study.views import layers

        found = layers.sections(files["layers"])
        parts += [*found[:-1], *(replace(last, free=layers.strip_html(files["layers"])) for last in found[-1:])]
    if files["heads"]:
        from foretoken.study.views import heads

        parts += heads.sections(files["heads"], files["marginal"])
    from foretoken.study.views import ceiling

    ceilings = ceiling.found(folder)
    if ceilings:
        parts += ceiling.sections(ceilings)
    return parts, [replace(c.head, kind="ceiling") for c in ceilings]


def unfinished(folder: Path, heads: Sequence[Head]) -> list[str]:
    """Names of files of rows that have no end yet."""
    finished = {rows.file_of(folder, head) for head in heads}
    found = sorted(path for kind in KINDS for path in folder.glob(f"{kind}-*.jsonl"))
    return [path.name for path in found if path not in finished]


def conditions(heads: Sequence[Head], waiting: Sequence[str]) -> Section:
    """What was analysed, how and on what."""
    notes: list[Shown] = [Alarm(f"{name} is not complete and left out.") for name in waiting]
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
    return Section("Conditions", notes, tables[: 1 + bool(made_on)])
