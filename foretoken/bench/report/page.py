"""`foretoken report`: a page that needs nothing but itself, and the same as Markdown."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from foretoken.bench import rows
from foretoken.bench.report.charts import MARKERS, MOST, SERIES, Chart, Key
from foretoken.bench.report.contents import brief, headline, sections
from foretoken.bench.report.samples import Samples, samples
from foretoken.bench.report.summary import Predict, Summary, summarize
from foretoken.bench.report.tables import Alarm, Section, escaped, html, markdown, terminal
from foretoken.bench.report.versus import brief as brief_versus
from foretoken.bench.report.versus import versus
from foretoken.errors import UserError
from foretoken.page import STYLE, marked, text_of, write_file

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


def write(folder: Path, name: str, page: str, text: str) -> list[Path]:
    """The two files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{str(folder)!r} cannot be made ({error.strerror}); give --out a folder that you may write to."
        ) from error
    files = [folder / f"{name}.html", folder / f"{name}.md"]
    for file, content in zip(files, (page, text), strict=True):
        write_file(file, content.encode("utf-8", "replace").decode())  # half a character, from a broken name
    return files


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


def whole(heading: str, introduction: str, content: str) -> str:
    """A page around its sections."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text_of(heading)}</title>
<style>{STYLE}{REPORT}</style>
</head>
<body>
<main>
<header>
<h1>{text_of(heading)}</h1>
{introduction}
</header>
{content}
</main>
</body>
</html>
"""


def body(parts: Sequence[Section]) -> str:
    return "\n".join(section(part) for part in parts)


def section(part: Section) -> str:
    """A section of the page."""
    notes = "\n".join(
        f"<p{' class=lossy' if isinstance(note, Alarm) else ''}>{text_of(str(note))}</p>" for note in part.notes
    )
    tables, folded = "\n".join(map(html, part.tables)), "\n".join(map(html, part.folded))
    figures = "\n".join(map(figure, part.charts))
    if figures:
        figures = f'<div class="figures">\n{figures}\n</div>'
    if folded:
        folded = f"<details><summary>The numbers</summary>\n{folded}\n</details>"
    return f"<section>\n<h2>{text_of(part.title)}</h2>\n{notes}\n{tables}\n{figures}\n{folded}\n</section>"


def figure(chart: Chart) -> str:
    """A chart, what it shows, and what its markers stand for."""
    keys = "".join(f"<li>{marker(key)}{text_of(key.label)}</li>" for key in chart.keys)
    return f"<figure>\n<figcaption>{text_of(chart.caption)}</figcaption>\n{chart.svg}\n<ul>{keys}</ul>\n</figure>"


SHAPES = {
    "o": '<circle cx="8" cy="6" r="3.4"/>',
    "s": '<path d="M4.8 2.8h6.4v6.4h-6.4z"/>',
    "^": '<path d="M8 2l4 7.2h-8z"/>',
    "D": '<path d="M8 1.6l4.2 4.4l-4.2 4.4l-4.2-4.4z"/>',
    "v": '<path d="M8 10l4-7.2h-8z"/>',
    "P": '<path d="M6.6 2h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6v-2.8h2.6z"/>',
    "X": '<path d="M5.9 1.9l2.1 2.1l2.1-2.1l2 2l-2.1 2.1l2.1 2.1l-2 2l-2.1-2.1l-2.1 2.1l-2-2l2.1-2.1l-2.1-2.1z"/>',
    "*": '<path d="M8 1.2l1.3 3.2l3.4.3l-2.6 2.2l.8 3.4l-2.9-1.8l-2.9 1.8l.8-3.4l-2.6-2.2l3.4-.3z"/>',
}
"""matplotlib's markers, 16 by 12."""


def marker(key: Key) -> str:
    """The marker of a key as it is in the figure."""
    if key.style >= 0:
        inner = f'<path class="l" d="M0 6h16"/>{SHAPES[MARKERS[key.style % MOST]]}'
        return f'<svg class="key" viewBox="0 0 16 12" style="color:var(--s{key.style % MOST})">{inner}</svg>'
    lines = {
        -1: '<path class="l" d="M8 1v10"/>',
        -2: '<path class="l" d="M0 6h6m4 0h6"/>',
        -3: '<circle cx="8" cy="6" r="1.8"/>',
    }
    tone = "soft" if key.style == -3 else "ink"
    return f'<svg class="key" viewBox="0 0 16 12" style="color:var(--{tone})">{lines[key.style]}</svg>'


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


def prose(parts: Sequence[Section]) -> str:
    """Sections as Markdown: the figures' numbers stand for them."""
    blocks: list[str] = []
    for part in parts:
        blocks.append(f"## {escaped(part.title)}\n")
        blocks += [
            f"**{escaped(str(note))}**\n" if isinstance(note, Alarm) else f"{escaped(str(note))}\n"
            for note in part.notes
        ]
        blocks += [markdown(table) for table in (*part.tables, *part.folded)]
    return "\n".join(blocks)


DARK_SERIES = ("#5ab4f0", "#ff8c4d", "#3fd0a0", "#e38bcb", "#e0b040", "#8fd3f5", "#c98a63", "#a8b3c0")
"""SERIES on a dark page."""


def series(colours: Sequence[str]) -> str:
    return ";".join(f"--s{i}:{colour}" for i, colour in enumerate(colours))


REPORT = f"""
:root{{{series(SERIES)}}}
@media (prefers-color-scheme:dark){{:root{{{series(DARK_SERIES)}}}}}
main{{max-width:68rem}}
h2{{font-size:1.15rem;margin:2.6rem 0 .6rem}}
p{{max-width:48rem}}
.wide{{overflow-x:auto;margin:.8rem 0;border:1px solid var(--line);border-radius:.5rem}}
.grid{{font-size:.85rem}}
.grid caption{{padding:.5rem .7rem;font-weight:600;color:var(--ink)}}
.grid th,.grid td{{padding:.3rem .7rem;text-align:right;white-space:nowrap;vertical-align:top;
border-top:1px solid var(--line)}}
.grid td{{overflow-wrap:normal}}
.grid .w{{text-align:left}}
.grid td.long{{white-space:normal;min-width:12rem;max-width:36rem;overflow-wrap:anywhere}}
.grid tbody th{{color:var(--ink);font-weight:600;position:sticky;left:0;background:var(--paper);
white-space:normal;overflow-wrap:anywhere;min-width:8rem;max-width:18rem}}
@media (max-width:40rem){{.grid tbody th{{max-width:9rem}}}}
.grid thead th{{white-space:normal;vertical-align:bottom}}
.figures{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,24rem),1fr));gap:1rem;align-items:start}}
figure{{margin:0;padding:.6rem;border:1px solid var(--line);border-radius:.5rem;break-inside:avoid;min-width:0}}
figcaption{{font-size:.85rem;font-weight:600}}
figure>svg{{display:block;width:100%;height:auto;max-width:36rem;margin:.3rem auto}}
figure>svg text{{font-family:system-ui,-apple-system,"Segoe UI",sans-serif!important}}
figure ul{{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:0;padding:0;font-size:.82rem}}
figure li{{display:flex;align-items:center;gap:.35rem;overflow-wrap:anywhere}}
.key{{width:1.4rem;height:.9rem;flex:none;fill:currentColor}}
.key .l{{stroke:currentColor;stroke-width:1.5}}
details{{margin:.6rem 0}}
summary{{cursor:pointer;padding:.3rem 0}}
@media print{{
:root{{{series(SERIES)}}}
@page{{margin:14mm 12mm}}
main{{max-width:none;padding:0}}
h2,section>p,figcaption,caption,summary{{break-after:avoid}}
p,.text{{break-inside:avoid}}
.wide{{overflow:visible;border:0;break-inside:avoid}}
.tall,.tall table{{break-inside:auto}}
.grid{{font-size:7pt}}
.grid th,.grid td{{padding:.15rem .3rem}}
.grid td.long{{min-width:0}}
.grid tbody th{{position:static}}
tr{{break-inside:avoid}}
thead{{display:table-header-group}}
.figures{{grid-template-columns:1fr 1fr}}
details::details-content{{content-visibility:visible;height:auto}}
}}
"""
