"""What `foretoken analyze heads` found: how good trained heads are, by depth, context and position, and their ceiling.

Guess i is of token t + 1 + i, made from the state at t. Its counterpart is the marginal law of depth i + 1, which
`foretoken analyze marginal` measures: what the model itself says of that token if nobody tells it the tokens between
(Mehra et al. 2025, arXiv:2502.09419).
"""

from collections.abc import Sequence
from os.path import normpath
from typing import TYPE_CHECKING

import numpy as np

from foretoken.analysis.summary import Floats, columns, estimate, within
from foretoken.report.drawing import INK, SOFT, Chart, Key, chart, drawing
from foretoken.report.tables import DASH, Section, Table, listed
from foretoken.study.rows import Rows
from foretoken.study.views import drift
from foretoken.study.views.mixtures import mixtures
from foretoken.study.views.places import by_place
from foretoken.study.views.series import cell, data_labels, draw, slugs
from foretoken.study.views.trained import (
    CEILING,
    LINES,
    Group,
    Marginal,
    Measured,
    Values,
    agreement,
    overlap,
    survival,
    top,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def sections(files: list[Rows], others: Sequence[Rows] = ()) -> list[Section]:
    """Of files of kind heads; `others` may hold the rows of the marginal laws, which are drawn as the ceiling."""
    files = [f for f in files if f.rows]
    texts = dict(zip([f.head.data for f in files], data_labels([f.head for f in files]), strict=True))
    measured = [Measured(f) for f in files]
    marginals = [Marginal(f) for f in others if f.head.kind == "marginal" and f.rows and f.end is not None]
    own = [m for m in measured if not m.head.settings["elsewhere"]]
    keys = list(dict.fromkeys((normpath(m.head.model), m.head.data) for m in own))
    named = [
        (next(m for m in own if (normpath(m.head.model), m.head.data) == key).target, texts[key[1]]) for key in keys
    ]
    found = list[Section]()
    for key, (target, text), name in zip(keys, named, slugs([f"{a}-{b}" for a, b in named]), strict=True):
        members = [m for m in own if (normpath(m.head.model), m.head.data) == key]
        marginal = next((one for one in marginals if one.matches(members[0])), None)
        group = Group(target, text, name.lower(), members, marginal)
        found += [by_depth(group), by_place(group), *mixtures(group)]
    return found + drift.section(measured, texts)


def by_depth(group: Group) -> Section:
    """Accuracy and acceptance of every guess, beside what bounds them."""
    ceiling = group.marginal
    charts = [
        depth_chart(
            group, "top1", "Top-1 accuracy against the text's token", top(1), ceiling and within(ceiling.rank, 1)
        ),
        depth_chart(
            group, "top5", "Top-5 accuracy against the text's token", top(5), ceiling and within(ceiling.rank, 5)
        ),
        depth_chart(
            group, "overlap", "Overlap with the target's law", overlap, ceiling and ceiling.overlap, bounds=True
        ),
        depth_chart(group, "agreement", "Agreement with the target's likeliest token", agreement),
        depth_chart(group, "survival", "Greedy chains: the first i guesses all agree", survival),
    ]
    tables = [depth_table("Overlap: acceptance of a drawn guess, those before it accepted", group, overlap)]
    if ceiling is not None:
        tables.append(beside(group, ceiling))
    folded = [
        depth_table("Agreement: acceptance at temperature 0, those before it the text's", group, agreement),
        depth_table("Survival: the first i guesses all agree", group, survival, tokens=True),
        depth_table("Top-1 accuracy against the text's token", group, top(1)),
        depth_table("Top-5 accuracy against the text's token", group, top(5)),
        depth_table("KL(target || guess), nats", group, lambda m: m.kl),
    ]
    return Section(f"Trained heads by depth: {group.where}", notes(group), tables, charts, folded)


def notes(group: Group) -> list[str]:
    """What the numbers mean, and what they are bounded by."""
    found = [
        "Guess i is of the token i + 1 places after the last one read: the target itself says the token between. All "
        "of it is teacher-forced: a guess is compared with the target's law behind the text's own tokens. Overlap, the "
        "sum of min(p, q), is then the chance that rejection sampling accepts a drawn guess, agreement what "
        "temperature 0 accepts. ± and bars: one standard error, with positions of one document (of one window, where "
        "there is but one document) as one group."
    ]
    told = [m.drafter for m in group.members if m.told]
    blind = [m.drafter for m in group.members if not m.told]
    if blind:
        found.append(
            f"Not told the tokens before their guess: {listed(blind)}. On text as the model would write it, the best "
            "such guess in KL is the marginal law; in overlap another may be a little better. The marginal's overlap "
            "is behind tokens that the model drew, the heads' behind the text's."
        )
    if told:
        found.append(f"Told the tokens before their guess: {listed(told)}. Their ceiling is 1.")
    if group.marginal is None:
        found.append("The marginal law of this model and text was not measured; `foretoken analyze marginal` does.")
    else:
        found.append(
            "Floor: a guess 1 drawn from the exact marginal is accepted with probability 1 - sqrt(I / 2) or more, I "
            "the information in nats that a token holds about the one after it (Pinsker's inequality); the mean over "
            "positions."
        )
    for m in group.members:
        if (lacking := float(np.isinf(m.rank).mean())) > 0:
            found.append(
                f"{m.drafter} has a draft vocabulary: {lacking:.1%} of the text's tokens are outside of it. Its KL is "
                "to the target's law within it."
            )
    if len(group.members) > LINES:
        found.append(f"Figures show {LINES} of {len(group.members)} drafters, tables all.")
    return found


def depth_chart(
    group: Group, name: str, caption: str, of: Values, ceiling: Floats | None = None, *, bounds: bool = False
) -> Chart:
    """A line per drafter over the number of the guess; the marginal law's is dashed."""
    figure, axes = drawing(3.1)
    keys = group.keys(group.drawn)
    for i, m in enumerate(group.drawn):
        means = m.means(of(m))
        draw(axes, list(means), list(means.values()), i)
    deepest = max(max(m.depths) for m in group.drawn)
    if ceiling is not None and group.marginal is not None:
        means = columns(ceiling, group.marginal.groups)[:deepest]
        draw(axes, range(1, len(means) + 1), means, CEILING, dashed=True)
        keys.append(Key("marginal law", CEILING))
    if bounds:
        keys += bound(axes, group, deepest)
    axes.set_xlim(0.7, deepest + 0.3)
    axes.set_xticks(range(1, deepest + 1))
    axes.set_ylim(0, 1.05 if bounds else min(1.0, axes.get_ylim()[1]))
    axes.set_xlabel("guess")
    return chart(f"heads-{name}-{group.name}", figure, f"{caption}, by depth; {group.where}", keys)


def bound(axes: "Axes", group: Group, deepest: int) -> list[Key]:
    """Draws the ceiling of drafters that are told everything and, if it is known, the floor of the marginal's guess."""
    axes.axhline(1, color=SOFT, linestyle="--", linewidth=0.9, zorder=0)
    axes.text(deepest + 0.28, 0.985, "ceiling if told the tokens before", ha="right", va="top", fontsize=8, color=SOFT)
    floor = None if group.marginal is None else estimate(group.marginal.floor, group.marginal.groups)
    if floor is None:
        return []
    axes.plot([0.82, 1.18], [floor.mean] * 2, color=INK, linestyle="--", linewidth=1.2)
    return [Key("floor: 1 - sqrt(I/2)", -2)]


def depth_table(caption: str, group: Group, of: Values, *, tokens: bool = False) -> Table:
    """A row per drafter, a column per guess; `tokens`: and 1 plus their sum."""
    deepest = max(max(m.depths) for m in group.members)
    head = ["drafter", "told", "positions", *(f"guess {i}" for i in range(1, deepest + 1))]
    rows = list[list[str]]()
    for m in group.members:
        means = m.means(of(m))
        row = [m.drafter, "yes" if m.told else "no", f"{len(m.rows):,}"]
        row += [cell(means.get(i)) for i in range(1, deepest + 1)]
        rows.append([*row, f"{1 + float(of(m).sum(1).mean()):.3f}"] if tokens else row)
    return Table(caption, [*head, "tokens per forward"] if tokens else head, rows, 2)


def beside(group: Group, marginal: Marginal) -> Table:
    """Heads and the marginal law at the positions that both were measured at."""
    index = {p: i for i, p in enumerate(marginal.places)}
    rows = list[list[str]]()
    for m in group.members:
        pairs = [(i, index[p]) for i, p in enumerate(m.places) if p in index]
        here, there = (np.array(x, dtype=np.int64) for x in (zip(*pairs, strict=True) if pairs else ([], [])))
        for k, depth in enumerate(m.depths):
            if depth > marginal.rank.shape[1] or not pairs:
                continue
            at = m.groups[here]
            law = [
                *(within(values[:, depth - 1], best) for values, best in ((marginal.rank, 1), (marginal.rank, 5))),
                marginal.overlap[:, depth - 1] if depth <= marginal.overlap.shape[1] else np.full(len(index), np.nan),
            ]
            own = [top(1)(m)[:, k], top(5)(m)[:, k], m.overlap[:, k]]
            cells = [cell(estimate(x, at)) for a, b in zip(own, law, strict=True) for x in (a[here], b[there])]
            floor = cell(estimate(marginal.floor[there], at)) if depth == 1 else DASH
            rows.append([m.drafter, "yes" if m.told else "no", f"{depth}", f"{len(pairs):,}", *cells, floor])
    head = ["drafter", "told", "guess", "positions"]
    head += [f"{what}{whose}" for what in ("top-1", "top-5", "overlap") for whose in ("", ", marginal")]
    return Table("Heads and the marginal law at the same positions", [*head, "floor"], rows, 2)
