"""How many guesses of ideal drafters a model would accept, as the rows of `foretoken analyze marginal` tell.

Guess i is the token i + 1 places ahead. An ideal independent head guesses by the marginal law q_i, without seeing the
tokens between; an ideal sequential drafter knows the model's law p_i behind its own guesses.
"""

from collections.abc import Sequence

import numpy as np

from foretoken.analysis.summary import Floats, chains, within
from foretoken.report.tables import DASH, Section, Table, fixed
from foretoken.study.views.measured import FEW, Measured, Values, borders, by_bin, by_depth, depth_table
from foretoken.study.views.series import Panel, cell


def rejection(m: Measured) -> Floats:
    """[N, K-1]: heads that draw from q, under rejection sampling at temperature 1 (arXiv:2211.17192)."""
    return chains(m.matrix("ratio"), m.matrix("overlap"))


def likeliest(m: Measured) -> Floats:
    """[N, K-1]: heads that say q's likeliest token, at temperature 1."""
    return chains(m.matrix("hit"), m.matrix("top"))


def sequential(m: Measured) -> Floats:
    """[N, K-1]: a drafter that says p's likeliest token, at temperature 1; one that draws from p has 1 throughout."""
    return chains(m.matrix("sure"), m.matrix("peak"))


def greedy(m: Measured) -> Floats:
    """[N, K-1]: heads that say q's likeliest token, at temperature 0."""
    right = within(m.greedy[:, 1:], 1)
    return chains(right, right)


KINDS: dict[str, Values] = {
    "T=1, heads draw from the marginal": rejection,
    "T=1, heads say the marginal's likeliest": likeliest,
    "T=1, sequential drafter says the likeliest": sequential,
    "T=0, heads say the marginal's likeliest": greedy,
}


def guesses(found: Sequence[Measured], shown: Sequence[Panel]) -> Section:
    """P(the first i guesses are accepted) for drafters that know their law exactly."""
    drawn: dict[str, Values] = {"heads draw from the marginal": rejection, "heads say its likeliest token": likeliest}
    said: dict[str, Values] = {"sequential drafter": sequential, "heads": likeliest}
    axes, first = ("guess i", "P(first i guesses accepted)"), "Guesses of ideal drafters accepted at temperature"
    charts = [
        *by_depth(found, shown, "guesses-heads", f"{first} 1: independent heads", drawn, axes),
        *by_depth(found, shown, "guesses-sequential", f"{first} 1, where each says the likeliest token", said, axes),
        *by_depth(found, shown, "guesses-greedy", f"{first} 0: independent heads", {"": greedy}, axes),
    ]
    notes = [
        "Guess i is the token i + 1 places ahead: the model has said the one between by then. Heads guess it from the "
        "text alone, by the marginal law of that depth, renormalised; a sequential drafter knows the model's law "
        "behind its own guesses. One that draws from that law at temperature 1, or says its likeliest token at "
        "temperature 0, is always accepted.",
        "T: the temperature. At T=1 the chances are means over paths drawn from the model, at T=0 they are counted on "
        "its greedy continuation. τ: tokens per forward with all guesses of the table, 1 plus their sum.",
    ]
    table = depth_table("P(the first i guesses are accepted)", found, KINDS, "i =")
    sums = [1 + sum(e.mean for e in m.means(of(m)) if e) for m in found for of in KINDS.values()]
    rows = [[*row, fixed(total)] for row, total in zip(table.rows, sums, strict=True)]
    whole = Table(table.caption, [*table.head, "τ"], rows, table.left)
    return Section("Guesses that would be accepted", notes, [whole], charts)


def information(found: Sequence[Measured], shown: Sequence[Panel]) -> Section:
    """Guess 1 of an ideal head against what the token between tells about it."""
    limits = borders([m.vector("information") for m in found])
    overlap = [m.bins(m.vector("information"), m.column("overlap", 0), limits) for m in found]
    caption = "Overlap of guess 1 with the model's law, by information"
    axes = "I(next token; the one after it), nats", "overlap"
    charts = by_bin(shown, overlap, "information", caption, axes, ("1 - sqrt(I / 2), proved", floor))
    rows = list[tuple[str, ...]]()
    for m, bins in zip(found, overlap, strict=True):
        least = {b.low: b.y for b in m.bins(m.vector("information"), floor(m.vector("information")), limits)}
        rows += [
            (
                *m.names,
                f"{b.low:.3f}{DASH}{b.high:.3f}",
                *(f"{b.y.count:,}", f"{b.x:.3f}", cell(b.y), fixed(least[b.low].mean, 3)),
            )
            for b in bins
        ]
    head = ("model", "data", "information, nats", "positions", "mean information", "overlap", "mean floor")
    notes = [
        "Overlap: the chance that the guess of an ideal head, which does not see the next token, is accepted. In the "
        "mean over next tokens it is at least 1 - sqrt(I / 2) in every context (Pinsker's and Jensen's inequalities), "
        "I being the mutual information of the next token and the one after it. That holds for the exact marginal; "
        "the summed one may miss it by the mass that was left out. Of each position one next token was drawn.",
        f"The information of all files is cut into {len(limits) - 1} bins of about as many positions each; bins of "
        f"fewer than {FEW} are not drawn.",
    ]
    folded = [Table("Overlap of guess 1 by information", head, rows, 2)]
    return Section("What the token between tells", notes, charts=charts, folded=folded)


def floor(information: Floats) -> Floats:
    """1 - sqrt(I / 2), or 0."""
    return np.maximum(0.0, 1 - np.sqrt(np.maximum(information, 0.0) / 2))
