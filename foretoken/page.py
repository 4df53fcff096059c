"""A page of HTML that shows how each token came, and needs nothing but itself."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

from foretoken.errors import UserError
from foretoken.generation import Output
from foretoken.show import Span, counts, visible


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt and what became of it."""

    prompt: str
    output: Output
    spans: list[Span]


def write_page(file: Path, answers: Sequence[Answer], settings: dict[str, str]) -> None:
    """Write the page of the answers."""
    write_file(file, page(answers, settings))


def write_file(file: Path, text: str) -> None:
    """Write `text` under a temporary name, then give it its own: nobody sees half of it."""
    draft = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text, "utf-8")
        draft.replace(file)
    except OSError as error:
        raise UserError(
            f"{str(file)!r} cannot be written ({error.strerror}); give a path in a folder that you may write to."
        ) from error
    finally:
        draft.unlink(missing_ok=True)


def page(answers: Sequence[Answer], settings: dict[str, str]) -> str:
    """A whole HTML page: the coloured texts, their numbers and the settings."""
    outputs = [a.output for a in answers]
    model = settings.get("model", "").rstrip("/").rpartition("/")[2]  # the settings have all of it
    rows = "\n".join(f"<tr><th>{text_of(k)}</th><td>{text_of(v)}</td></tr>" for k, v in settings.items())
    sections = "\n".join(section(a, i, len(answers)) for i, a in enumerate(answers, 1))
    total = f'<p class="total">{len(answers)} prompts: {counts(outputs)}</p>' if len(answers) > 1 else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>foretoken: {text_of(model)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{text_of(model)}</h1>
{verdict(outputs, settings.get("rule", ""))}
{total}
<p class="legend"><span><span class="d">drafted</span> guessed, and accepted by the target</span>
<span><span class="t">target</span> emitted by the target itself</span>
<span><span class="step"></span>a forward begins</span></p>
</header>
{sections}
<section>
<h2>Settings</h2>
<table>
{rows}
</table>
</section>
</main>
</body>
</html>
"""


def verdict(outputs: Sequence[Output], rule: str) -> str:
    """Whether the outputs are those of plain decoding."""
    if all(o.exact for o in outputs):
        return (
            f'<p class="verdict">Exact: the rule <em>{text_of(rule)}</em> leaves the target&rsquo;s law unchanged.</p>'
        )
    return f'<p class="verdict lossy">LOSSY: the rule <em>{text_of(rule)}</em> changes what the target would say.</p>'


def section(answer: Answer, number: int, total: int) -> str:
    """One prompt, its continuation and its numbers."""
    out = answer.output
    title = f"<h2>Prompt {number}</h2>\n" if total > 1 else ""
    rate = f"{len(out.token_ids) / out.seconds:,.0f}" if out.seconds > 0 else "&ndash;"
    share = sum(out.drafted) / len(out.drafted) if out.drafted else 0.0
    facts = [
        (f"{out.tokens_per_forward:.2f}", "tokens per forward"),
        (f"{len(out.token_ids):,}", "tokens"),
        (f"{out.forwards:,}", "forwards"),
        (f"{share:.0%}", "of tokens drafted"),
        (f"{out.seconds:.2f}", "seconds"),
        (rate, "tokens per second"),
    ]
    numbers = "\n".join(f"<div><dd>{value}</dd><dt>{name}</dt></div>" for value, name in facts)
    return f"""<section>
{title}<div class="text"><span class="prompt">{text_of(answer.prompt)}</span>{marked(answer.spans)}</div>
<dl>
{numbers}
</dl>
{bars(out.accepted_per_depth)}
</section>"""


def marked(spans: Sequence[Span]) -> str:
    """The text with one element per forward and, in it, one per run of drafted or emitted characters."""
    steps: list[str] = []
    for step, members in groupby(spans, key=lambda s: s.step):
        runs = [(d, "".join(s.text for s in run)) for d, run in groupby(members, key=lambda s: s.drafted)]
        inner = "".join(f'<span class="{"d" if d else "t"}">{text_of(t)}</span>' for d, t in runs)
        name = f"forward {step}" if step else "the prompt&rsquo;s forward"
        steps.append(f'<span class="step" title="{name}">{inner}</span>')
    return "".join(steps)


def bars(shares: Sequence[float]) -> str:
    """Acceptance per depth, a bar for each."""
    if not shares:
        return '<p class="none">No guess was accepted.</p>'
    rows = "\n".join(
        f'<tr><th>{depth}</th><td class="bar"><div><i style="width:{share:.1%}"></i></div></td>'
        f"<td>{share:.0%}</td></tr>"
        for depth, share in enumerate(shares, 1)
    )
    return f"""<table class="depths">
<caption>Forwards that accepted a guess of each depth</caption>
{rows}
</table>"""


def text_of(text: str) -> str:
    return escape(visible(text))


LIGHT = {
    "paper": "#ffffff",
    "ink": "#1b1f24",
    "soft": "#57606a",
    "line": "#d0d7de",
    "panel": "#f6f8fa",
    "drafted": "#c9f0d4",
    "drafted-ink": "#0b3d1e",
    "target": "#ffe3a3",
    "target-ink": "#4d2f00",
    "tick": "#6b7683",
    "track": "#e7ebef",
    "bar": "#2a8a4a",
    "lossy": "#a40e26",
}
DARK = {
    "paper": "#0f1419",
    "ink": "#e6edf3",
    "soft": "#9aa7b4",
    "line": "#30363d",
    "panel": "#171d24",
    "drafted": "#12452a",
    "drafted-ink": "#c5f5d5",
    "target": "#5a4000",
    "target-ink": "#ffe9b8",
    "tick": "#aab6c2",
    "track": "#232a32",
    "bar": "#3fb265",
    "lossy": "#ff9aa5",
}


def variables(colours: dict[str, str]) -> str:
    return ";".join(f"--{name}:{value}" for name, value in colours.items())


STYLE = f"""
:root{{color-scheme:light dark;{variables(LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{{variables(DARK)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}}
main{{max-width:52rem;margin:0 auto;padding:1.5rem 1rem 3rem}}
h1{{font-size:1.35rem;margin:0;overflow-wrap:anywhere}}
h2{{font-size:1rem;margin:2.2rem 0 .6rem}}
p{{margin:.4rem 0}}
.verdict,.total,.legend,.none{{color:var(--soft)}}
.lossy{{color:var(--lossy);font-weight:600}}
.legend{{display:flex;flex-wrap:wrap;gap:.3rem 1.4rem;font-size:.9rem;margin:.8rem 0 1rem}}
.text{{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.9;padding:1rem 1.1rem;background:var(--panel);
border:1px solid var(--line);border-radius:.5rem;tab-size:4}}
.prompt{{color:var(--soft)}}
.d,.t{{padding:.14em 0;-webkit-box-decoration-break:clone;box-decoration-break:clone}}
.d{{background:var(--drafted);color:var(--drafted-ink)}}
.t{{background:var(--target);color:var(--target-ink);font-weight:600}}
.step{{border-left:1.5px solid var(--tick);padding:.14em 0}}
.legend .step{{padding:.14em .2em}}
.step:hover{{outline:2px solid var(--tick)}}
.legend .d,.legend .t{{padding:.14em .4em;border-radius:.2em}}
dl{{display:grid;grid-template-columns:repeat(auto-fit,minmax(7.2rem,1fr));gap:.6rem;margin:1rem 0}}
dl div{{display:flex;flex-direction:column;padding:.5rem .7rem;border:1px solid var(--line);border-radius:.5rem}}
dd{{margin:0;font-size:1.35rem;font-weight:600;font-variant-numeric:tabular-nums;line-height:1.3}}
dt{{color:var(--soft);font-size:.82rem}}
table{{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}}
caption{{text-align:left;color:var(--soft);padding:.2rem 0 .4rem}}
th{{text-align:left;font-weight:400;color:var(--soft);padding:.2rem 1rem .2rem 0;vertical-align:top;white-space:nowrap}}
td{{padding:.2rem 0;overflow-wrap:anywhere}}
.depths th{{width:2rem;text-align:right;padding-right:.6rem}}
.depths td:last-child{{width:3.2rem;text-align:right}}
.bar div{{background:var(--track);border-radius:2px}}
.bar i{{display:block;height:.8rem;min-width:1px;background:var(--bar);border-radius:2px}}
@media print{{
:root{{{variables(LIGHT)}}}
body{{font-size:11pt}}
*{{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
dl,table{{break-inside:avoid}}
}}
"""
