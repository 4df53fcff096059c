"""The same heads on other targets: what a fine-tuned target costs the heads that were trained before."""

from collections.abc import Mapping, Sequence

import numpy as np

from foretoken.analysis.summary import Estimate, estimate
from foretoken.report.drawing import MOST, Chart, Key, chart, drawing
from foretoken.report.tables import DASH, Section, Table
from foretoken.study.views.series import cell, draw, slugs
from foretoken.study.views.trained import Measured, Values, agreement, overlap, top

MEASURES: dict[str, tuple[str, Values]] = {
    "overlap": ("Overlap", overlap),
    "agreement": ("Agreement", agreement),
    "top1": ("Top-1 accuracy", top(1)),
}


def section(measured: Sequence[Measured], texts: Mapping[str, str]) -> list[Section]:
    """One section of all heads that were measured on another target; none if there are none."""
    away = [m for m in measured if m.head.settings["elsewhere"]]
    if not away:
        return []
    own = {key_of(m): m for m in measured if not m.head.settings["elsewhere"]}
    charts = list[Chart]()
    places = list(dict.fromkeys((m.target, m.trained_on, m.head.data) for m in away))
    names = slugs([f"{target}-{trained_on}-{texts[data]}".lower() for target, trained_on, data in places])
    for at, name in zip(places, names, strict=True):
        members = [m for m in away if (m.target, m.trained_on, m.head.data) == at][:MOST]
        where = f"heads of {at[1]} on {at[0]}; {texts[at[2]]}"
        charts += [
            drift_chart(members, own, f"heads-drift-{kind}-{name}", f"{what} by depth, {where}", of)
            for kind, (what, of) in MEASURES.items()
        ]
    rows = list[list[str]]()
    for key in dict.fromkeys(map(key_of, away)):
        first = own.get(key)
        others = [m for m in away if key_of(m) == key]
        for m in others if first is None else [first, *others]:
            rows += differences(first, m, texts[m.head.data])
    head = ["heads", "target", "data", "guess", "positions"]
    head += [f"{what}{part}" for what in ("overlap", "agreement", "top-1") for part in ("", ", difference")]
    notes = [
        "Heads beside targets that they were not trained on. Decoding stays exact there; what is lost is acceptance. "
        "Differences are to the target that the heads were trained on, paired over the positions that both have. Each "
        "target is judged by its own law, and top-1 against the text."
    ]
    return [Section("Drift: the same heads on other targets", notes, [Table("By target", head, rows, 3)], charts)]


def key_of(m: Measured) -> tuple[str, str, str, str]:
    """What files of the same heads on the same text share."""
    return m.drafter, m.trained_on, m.head.data, m.head.settings["heads"]


def drift_chart(
    members: Sequence[Measured], own: Mapping[tuple[str, str, str, str], Measured], name: str, caption: str, of: Values
) -> Chart:
    """A dashed line per drafter over the number of the guess, and a solid one for the target that it was trained on."""
    figure, axes = drawing(3.1)
    for i, m in enumerate(members):
        for one, dashed in ((own.get(key_of(m)), False), (m, True)):
            if one is not None:
                means = one.means(of(one))
                draw(axes, list(means), list(means.values()), i, dashed)
    deepest = max(m.depths[-1] for m in members)
    axes.set_xlim(0.7, deepest + 0.3)
    axes.set_xticks(range(1, deepest + 1))
    axes.set_ylim(0, min(1.0, axes.get_ylim()[1]))
    axes.set_xlabel("guess; dashed: the other target")
    return chart(name, figure, caption, [Key(m.drafter, i) for i, m in enumerate(members)])


def differences(first: Measured | None, m: Measured, text: str) -> list[list[str]]:
    """A row per guess, with the difference to the heads' own target, if that was measured."""
    paired = [] if first is None or m is first else pairs(first, m)
    rows = list[list[str]]()
    for k, depth in enumerate(m.depths):
        row = [m.drafter, m.target, text, str(depth), f"{len(m.rows):,}"]
        for _, of in MEASURES.values():
            found = None if first is None else difference(first, m, of, k, paired)
            row += [cell(estimate(of(m)[:, k], m.groups)), signed(found)]
        rows.append(row)
    return rows


def pairs(one: Measured, other: Measured) -> list[tuple[int, int]]:
    """Rows of both files that stand at the same place."""
    index = {p: i for i, p in enumerate(one.places)}
    return [(index[p], i) for i, p in enumerate(other.places) if p in index]


def difference(
    one: Measured, other: Measured, of: Values, guess: int, paired: Sequence[tuple[int, int]]
) -> Estimate | None:
    """Of `other` minus `one`, where both were measured."""
    if not paired:
        return None
    here, there = (np.array(x, dtype=np.int64) for x in zip(*paired, strict=True))
    return estimate(of(other)[there, guess] - of(one)[here, guess], other.groups[there])


def signed(found: Estimate | None) -> str:
    return DASH if found is None else ("+" if found.mean >= 0 else "") + cell(found)
