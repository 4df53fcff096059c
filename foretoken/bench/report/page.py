"""`foretoken report`: a page that needs nothing but itself, and the same as Markdown."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from foretoken.bench import rows
from foretoken.bench.report.contents import brief, headline, sections
from foretoken.bench.report.samples import Samples, samples
from foretoken.bench.report.summary import Predict, Summary, summarize
from foretoken.bench.report.versus import brief as brief_versus
from foretoken.bench.report.versus import versus
from foretoken.errors import UserError
from foretoken.page import marked, text_of
from foretoken.report.layout import body, prose, whole, write
from foretoken.report.tables import escaped, terminal

OPEN = 3
"""Texts that stand open."""
LEGEND = """<p class="legend"><span><span class="d">drafted</span> guessed, and accepted by the target</span>
<span><span class="t">target</span> emitted by the target itself</span>
<span><span class="step"></span>a forward begins</span></p>"""


def run(folders: Sequence[Path], out: Path | None, predict: Predict) -> None:
    """Write the report on one folder, or on two beside each other, and print the comparison."""
    if not 1 <= len(folders) <= 2:
        raise UserError(f"{len(folders)} folders came; give one to report on, or two to compare.")
    found = [summarize(rows.read(folder), predict, repr(str(folder))) for folder in folders]
    console = Console(highlight=False)
    place = folders[0] if out is None else out
    if len(found) == 1:
        written = write(place, "report", page(found[0]), text(found[0]))
        console.print(terminal(brief(found[0])))
    else:
        names = [folder.resolve().name for folder in folders]
        parts = versus(*found)
        heading = f"{names[0]} (A) and {names[1]} (B)"
        name = "compare_" + "".join(c if c.isalnum() or c in "-_." else "_" for c in names[1])
        written = write(place, name, whole(heading, "", body(parts)), f"# {escaped(heading)}\n\n{prose(parts)}")
        for table in parts[0].tables:
            console.print(terminal(table))
        console.print(terminal(brief_versus(*found)))
    for file in written:
        console.print(str(file), markup=False, soft_wrap=True)


def page(summary: Summary) -> str:
    """The report as a whole HTML page."""
    found = samples(summary)
    content = body(sections(summary)) + (texts(found) if found else "")
    return whole(title(summary), f"<p>{text_of(headline(summary))}</p>", content)


def text(summary: Summary) -> str:
    """The report as Markdown; the coloured texts are on the page only."""
    return f"# {escaped(title(summary))}\n\n{escaped(headline(summary))}\n\n{prose(sections(summary))}"


def title(summary: Summary) -> str:
    models = dict.fromkeys(r.model.rstrip("/").rpartition("/")[2] for r in summary.runs)
    return f"foretoken bench: {', '.join(models) or 'no run line'}"


def texts(found: Samples) -> str:
    """One prompt's coloured text by each method, the fastest first."""
    first = found.rows[0]
    where = f"Prompt {first.prompt} of {first.task}, temperature {first.temperature:g}, batch {first.batch}."
    note = f"<p>{text_of(found.note)}</p>" if found.note else ""
    blocks: list[str] = []
    for i, (row, spans) in enumerate(zip(found.rows, found.spans, strict=True)):
        rate = "" if row.tokens_per_forward is None else f": {row.tokens_per_forward:.2f} tokens per forward"
        lossy = "" if row.exact else f' <span class="lossy">LOSSY: {text_of(row.rule)}</span>'
        blocks.append(
            f"<details{' open' if i < OPEN else ''}><summary>{text_of(row.method)}{rate}{lossy}</summary>\n"
            f'<div class="text">{marked(spans)}</div></details>'
        )
    joined = "\n".join(blocks)
    return f"""<section>
<h2>Which tokens were guessed</h2>
<p>{text_of(where)}</p>
{note}
{LEGEND}
{joined}
</section>"""
