"""One prompt through every method, and which of its tokens were guessed."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foretoken.bench.report.summary import Summary
from foretoken.bench.rows import Row
from foretoken.show import Span, Spans


@dataclass(frozen=True, slots=True)
class Samples:
    """What the methods made of one prompt.

    spans  of each row
    note   why they are numbers and no text, or nothing
    """

    rows: list[Row]
    spans: list[list[Span]]
    note: str


def samples(summary: Summary) -> Samples | None:
    """The prompt that most methods decoded, the lowest temperature and batch first; None if no row has its tokens."""
    found: defaultdict[tuple[float, int, str, str], dict[str, Row]] = defaultdict(dict)
    for row in summary.results.rows:
        if row.repeat == 0 and row.ids and row.drafted and len(row.ids) == len(row.drafted):
            found[row.temperature, row.batch, row.task, row.prompt].setdefault(row.method, row)
    if not found:
        return None
    first = list(found)
    best = max(found, key=lambda k: (len(found[k]), -k[0], -k[1], -first.index(k)))
    rows = [found[best][m.name] for m in summary.methods if m.name in found[best]]
    models = {r.id: r.model for r in summary.runs}
    tokenizer, note = tokenizer_of(models.get(rows[0].run, ""))
    return Samples(rows, [numbers(r) if tokenizer is None else spans(tokenizer, r) for r in rows], note)


def tokenizer_of(model: str) -> tuple[Any, str]:
    """The tokenizer of a model that is on this machine, or None and a sentence."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True), ""
    except Exception as error:  # whatever is wrong with the files, the rest of the report is good
        reason = str(error).strip().split("\n")[0][:200]
        return None, f"The tokenizer of {model!r} could not be loaded here, so tokens are shown by number ({reason})."


def spans(tokenizer: Any, row: Row) -> list[Span]:
    """The text of a row. Its prompt's tokens are not in the row, so a first space may be missing."""
    made = Spans(tokenizer, [])
    made.push(row.ids or [], flags(row))
    made.finish()
    return made.take(1 << 40)


def numbers(row: Row) -> list[Span]:
    """The tokens of a row by number."""
    made: list[Span] = []
    step = 0
    for token, guessed in zip(row.ids or [], flags(row), strict=True):
        made.append(Span(f"{token} ", guessed, step))
        step += not guessed
    return made


def flags(row: Row) -> Sequence[bool]:
    return [flag == "1" for flag in row.drafted or ""]
