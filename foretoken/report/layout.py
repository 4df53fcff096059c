"""Sections of tables and figures as a page of HTML or as Markdown."""

from collections.abc import Sequence
from pathlib import Path

from foretoken.errors import UserError
from foretoken.page import STYLE, text_of, write_file
from foretoken.report.drawing import MARKERS, MOST, SERIES, Chart, Key
from foretoken.report.tables import Alarm, Section, escaped, html, markdown


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
    inner = "\n".join((notes, tables, figures, part.free, folded))
    return f"<section>\n<h2>{text_of(part.title)}</h2>\n{inner}\n</section>"


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
        -4: '<path class="l" d="M0 6h16"/>',
    }
    tone = "soft" if key.style == -3 else "ink"
    return f'<svg class="key" viewBox="0 0 16 12" style="color:var(--{tone})">{lines[key.style]}</svg>'


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
