"""Speed from parts: what a method should gain, from times measured apart and the forwards that its text needs.

One step takes draft + judging * forward(width, rows) + own seconds. Forwards were timed by width on no text at all;
proposals, own work and what a forward takes longer between them (`judging`) on other prompts. How many steps a group
needs, and how wide they are, follows from the text and not from the machine.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from statistics import median

import numpy as np

from foretoken.bench.rows import PLAIN, Cost, Results, Row


def predicted(results: Results, method: str, temperature: float, batch: int, task: str) -> float | None:
    """The method's speed over plain decoding's in one cell, in tokens per second; None if a part was not timed."""
    groups = groups_of(results.rows, method, temperature, batch, task)
    plain = groups_of(results.rows, PLAIN, temperature, batch, task)
    own = [cost_of(results.costs, name, temperature, batch, task) for name in (method, PLAIN)]
    forwards = {c.batch: c for c in results.costs if not c.method}
    if not groups or not plain or own[0] is None or own[1] is None or batch not in forwards:
        return None
    first = median(rows[0].first or 0.0 for rows in plain)  # prompts are read by the same forwards
    ours, theirs = (
        sum(first + seconds_of(rows, cost, forwards) for rows in parts) / sum(r.tokens for rows in parts for r in rows)
        for parts, cost in ((groups, own[0]), (plain, own[1]))
    )
    return theirs / ours


def groups_of(rows: Sequence[Row], method: str, temperature: float, batch: int, task: str) -> list[list[Row]]:
    """The rows of each group decoded together in this cell, one measurement of each."""
    cell = (method, temperature, batch, task)
    mine = [r for r in rows if (r.method, r.temperature, r.batch, r.task) == cell and r.forwards is not None]
    firsts: dict[int, str] = {}
    for row in mine:
        firsts.setdefault(row.group, f"{row.round} {row.repeat}")
    kept = [r for r in mine if f"{r.round} {r.repeat}" == firsts[r.group]]
    kept.sort(key=lambda r: r.group)
    return [list(rows) for _, rows in groupby(kept, key=lambda r: r.group)]


def cost_of(costs: Sequence[Cost], method: str, temperature: float, batch: int, task: str) -> Cost | None:
    """What a step of the method takes besides its forward, in this cell.

    Proposals depend on the text and the temperature. Own work does not depend on the text, `judging` on neither, so all
    that was timed of them at this batch size counts, the median of it, each over the machine's pace in its cell: one
    timing is at the mercy of its moment.
    """
    mine = [c for c in costs if (c.method, c.batch) == (method, batch)]
    here = [c for c in mine if (c.temperature, c.task) == (temperature, task)]
    if not here:
        return None
    paces = {(c.temperature, c.task): pace(costs, c) for c in mine}
    now = paces[temperature, task]
    own = median(c.own / paces[c.temperature, c.task] for c in mine if c.temperature == temperature)
    judging = median(c.judging / paces[c.temperature, c.task] for c in mine)
    return replace(here[-1], own=now * own, judging=now * judging)


def pace(costs: Sequence[Cost], cell: Cost) -> float:
    """How much longer than on their own forwards took when this cell was timed, by all its methods together."""
    place = (cell.temperature, cell.batch, cell.task)
    return median(c.judging for c in costs if c.method and (c.temperature, c.batch, c.task) == place)


def seconds_of(rows: Sequence[Row], cost: Cost, forwards: dict[int, Cost]) -> float:
    """Seconds of a group's steps: each row leaves when it has had its forwards."""
    steps = rows[0].steps or 0
    total = sum(rows[0].widths.values()) or 1
    seconds = steps * (cost.draft + cost.own)
    for count, group in groupby(running([r.forwards or 0 for r in rows], steps)):
        n = len(list(group))
        by_width = sum(share * forward(forwards, count, width) for width, share in rows[0].widths.items()) / total
        seconds += n * cost.judging * by_width
    return seconds


def running(forwards: Sequence[int], steps: int) -> list[int]:
    """Rows that take part in each of a group's steps: each leaves when it has had its `forwards`."""
    return [sum(n > step for n in forwards) for step in range(steps)]


def forward(forwards: dict[int, Cost], rows: int, width: int) -> float:
    """Seconds of one forward, between the timed batches and widths by straight lines."""
    sizes = sorted(forwards)
    by_size = [float(np.interp(width, forwards[b].widths, forwards[b].seconds)) for b in sizes]
    return float(np.interp(rows, sizes, by_size))
