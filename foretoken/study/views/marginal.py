"""What `foretoken analyze marginal` found: what an ordinary model knows about tokens further ahead.

Depth k is the token k places after the last one read. Figures 1 and 4 of Mehra et al. 2025 (arXiv:2502.09419) are among
these; the others are this project's own.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from foretoken.analysis.summary import Estimate, Floats, within
from foretoken.report.drawing import Chart
from foretoken.report.tables import DASH, Section, Table, amount
from foretoken.study.rows import Rows
from foretoken.study.views.guesses import guesses, information
from foretoken.study.views.measured import (
    FEW,
    SHARES,
    Mean,
    Measured,
    Values,
    borders,
    by_bin,
    by_depth,
    column,
    depth_table,
    over_size,
)
from foretoken.study.views.series import Panel, cell, data_labels, panels

LEAST = float(np.finfo(np.float32).tiny)
"""Chances below count as this one, for their logarithm."""

READ = (1.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1e9)
"""Tokens read, where bins of them begin, and an end."""


def sections(files: list[Rows]) -> list[Section]:
    """Accuracy against the text and against the model, over depth, size and entropy; chances; guesses; cost."""
    files = [f for f in files if f.rows]
    if not files:
        return []
    heads = [f.head for f in files]
    found = [Measured(f, text) for f, text in zip(files, data_labels(heads), strict=True)]
    shown = panels(heads)
    return [
        against_text(found, shown),
        against_own(found, shown),
        over_models(found),
        determinism(found, shown),
        contexts(found, shown),
        chances(found, shown),
        guesses(found, shown),
        information(found, shown),
        cost(found),
    ]


def text_in(best: int) -> Values:
    """Whether the text's token is among the likeliest."""
    return lambda m: within(m.rank, best)


def own_in(best: int) -> Values:
    """Whether the model's own is."""
    return lambda m: within(m.greedy, best)


def against_text(found: Sequence[Measured], shown: Sequence[Panel]) -> Section:
    """Figure 1 over depth: what the text says."""
    what = "accuracy against the text's token, by depth"
    charts = [
        *by_depth(found, shown, "text-top5", f"Top-5 {what}", {"top-5": text_in(5)}),
        *by_depth(found, shown, "text-top1", f"Top-1 {what}", {"top-1": text_in(1)}),
    ]
    notes = [
        "The law of depth 1 is the model's next-token law. That of depth k is got from the same model, without "
        "training: the mean of its next-token laws behind all continuations of k - 1 tokens, weighted by their "
        "probability; continuations outside of the nucleus are left out. Top-5 accuracy is how often the token that "
        "the text has there is among the law's five likeliest.",
        "Bars, and what follows ±: one standard error, the positions of a document counted as one group (those of a "
        "window, where there is a single document).",
    ]
    table = depth_table("Accuracy against the text's token", found, {"top-5": text_in(5), "top-1": text_in(1)})
    return Section("What the text says further ahead", notes, [table], charts)


def against_own(found: Sequence[Measured], shown: Sequence[Panel]) -> Section:
    """The same: what the model itself would say."""
    what = "accuracy against the model's own greedy continuation, by depth"
    charts = [
        *by_depth(found, shown, "own-top5", f"Top-5 {what}", {"top-5": own_in(5)}),
        *by_depth(found, shown, "own-top1", f"Top-1 {what}", {"top-1": own_in(1)}),
    ]
    notes = [
        "The same laws, compared with the tokens that the model itself says at temperature 0 behind the text so far, "
        "not with the text's. At depth 1 both are the same by definition."
    ]
    table = depth_table(
        "Accuracy against the model's own greedy continuation", found, {"top-5": own_in(5), "top-1": own_in(1)}
    )
    return Section("What the model itself says further ahead", notes, [table], charts)


def over_models(found: Sequence[Measured]) -> Section:
    """Figures 1 and 4 over the size of the model."""
    deepest = max(m.rank.shape[1] for m in found)
    accuracy = {f"depth {k}": column_mean(text_in(5), k - 1) for k in (2, 3) if k <= deepest}
    nuclei = {
        "top-0.99": column_mean(lambda m: m.matrix("nucleus"), 0),
        "top-0.9": column_mean(lambda m: m.matrix("nucleus"), 1),
    }
    text = "Top-5 accuracy against the text's token, by model size"
    tokens = "Mean number of tokens in the nucleus of the next-token law, by model size"
    charts = [
        *over_size(found, "size-top5", text, accuracy, "accuracy", SHARES),
        *over_size(found, "size-nucleus", tokens, nuclei, "tokens"),
    ]
    rows = [
        (
            *m.names,
            amount(m.head.parameters),
            f"{len(m.rows):,}",
            *(cell(mean(m), 2) for mean in nuclei.values()),
            cell(m.mean(m.vector("entropy"))),
            *(cell(mean(m)) for mean in accuracy.values()),
        )
        for m in found
    ]
    head = (
        *("model", "data", "parameters", "positions", "top-0.99 nucleus", "top-0.9 nucleus", "entropy, nats"),
        *(f"top-5 at {depth}".replace("depth ", "depth\N{NO-BREAK SPACE}") for depth in accuracy),
    )
    notes = [
        "Nucleus: the fewest tokens whose probabilities sum to 0.99 or to 0.9. Nucleus and entropy are those of the "
        "next-token law; accuracy is against the text's token."
    ]
    if not charts:
        notes.append("One size of model was analysed: a figure over sizes needs more of them (--models).")
    return Section("Models of different size", notes, [Table("By model and data", head, rows, 2)], charts)


def column_mean(of: Values, i: int) -> Mean:
    return lambda m: m.mean(column(of(m), i))


def determinism(found: Sequence[Measured], shown: Sequence[Panel]) -> Section:
    """Depth 2 where the next token is sure, and where it is not."""
    limits = borders([m.vector("entropy") for m in found])
    text, own = (
        [m.bins(m.vector("entropy"), column(of(m), 1), limits) for m in found] for of in (text_in(1), own_in(1))
    )
    axes = "entropy of the next-token law, nats", "accuracy at depth 2"
    what, over = "Top-1 accuracy at depth 2 against", "by the entropy of the next-token law"
    charts = [
        *by_bin(shown, text, "entropy-text", f"{what} the text's token, {over}", axes),
        *by_bin(shown, own, "entropy-own", f"{what} the model's own greedy token, {over}", axes),
    ]
    rows = list[tuple[str, ...]]()
    for m, texts, mine in zip(found, text, own, strict=True):
        other = {b.low: b.y for b in mine}
        rows += [
            (
                *m.names,
                f"{b.low:.3f}{DASH}{b.high:.3f}",
                *(f"{b.y.count:,}", f"{b.x:.3f}", cell(b.y), cell(other.get(b.low))),
            )
            for b in texts
        ]
    head = ("model", "data", "entropy", "positions", "mean entropy", "text's token", "own token")
    folded = [Table("Top-1 accuracy at depth 2 by entropy of the next-token law", head, rows, 2)]
    notes = [
        f"The entropies of all files are cut into {len(limits) - 1} bins of about as many positions each. A point "
        f"stands at a bin's mean entropy; bins of fewer than {FEW} positions are not drawn."
    ]
    return Section("Where the next token is sure", notes, charts=charts, folded=folded)


def contexts(found: Sequence[Measured], shown: Sequence[Panel]) -> Section:
    """Depths 1 and 2 against how much of the text the model has read."""
    charts = list[Chart]()
    tables = list[Table]()
    for depth in (1, 2):
        bins = [m.bins(m.vector("context"), column(text_in(1)(m), depth - 1), READ) for m in found]
        caption = f"Top-1 accuracy at depth {depth} against the text's token, by tokens read"
        charts += by_bin(shown, bins, f"context-{depth}", caption, ("tokens read in the window", "accuracy"))
        cells = [{b.low: cell(b.y) for b in some} for some in bins]
        body = [(*m.names, *(known.get(low, DASH) for low in READ[:-1])) for m, known in zip(found, cells, strict=True)]
        columns = [f"{low:g} to {high - 1:g}" for low, high in pairwise(READ[:-1])]
        tables.append(Table(caption, ("model", "data", *columns, f"{READ[-2]:g} and more"), body, 2))
    notes = ["Where a text repeats what it said, later tokens are surer: a point stands at the mean of its bin."]
    return Section("How much of the text is read", notes, charts=charts, folded=tables)


def chances(found: Sequence[Measured], shown: Sequence[Panel]) -> Section:
    """What the text costs in nats at each depth, and how much of the law was summed."""
    lines: dict[str, Values] = {"renormalised": lambda m: nats(m) - lost(m), "as summed": nats}
    axes = "depth", "nats"
    charts = by_depth(found, shown, "text-nats", "Mean -log chance of the text's token, by depth", lines, axes, None)
    folded = [
        depth_table("Mean -log chance of the text's token, nats", found, lines),
        depth_table("Mean probability of the paths that were summed", found, {"mass": lambda m: np.exp(-lost(m))}),
    ]
    notes = ["As summed, the chance lacks the paths outside of the nucleus; renormalised, it is over their mass."]
    zeros = sum(int((m.matrix("chance") < LEAST).sum()) for m in found)
    if zeros:
        notes.append(f"{zeros} chances of 0 count as {LEAST:.2g}.")
    return Section("Chance of the text's tokens", notes, charts=charts, folded=folded)


def nats(m: Measured) -> Floats:
    """[N, K]: -log chance, as the truncated sum gives it."""
    return -np.log(np.maximum(m.matrix("chance"), LEAST))


def lost(m: Measured) -> Floats:
    """[N, K]: -log of the mass that was summed; at depth 1 nothing is missing."""
    mass = m.matrix("mass")
    return -np.log(np.hstack([np.ones((len(mass), 1)), mass]))


def cost(found: Sequence[Measured]) -> Section:
    """What marginalising took."""
    charts = [
        *over_size(found, "cost-tokens", "Tokens read per position, by model size", {"": per("nodes")}, "tokens"),
        *over_size(found, "cost-seconds", "Seconds per position, by model size", {"": per("seconds")}, "seconds"),
    ]
    rows = [
        (
            *m.names,
            amount(m.head.parameters),
            *(f"{m.end['positions']:,}", f"{m.end['nodes']:,}", rate(per("nodes")(m))),
            *(f"{m.end['forwards']:,}", f"{m.end['seconds']:.1f}", rate(per("seconds")(m))),
        )
        for m in found
    ]
    head = (
        *("model", "data", "parameters", "positions", "tokens read", "per position", "forwards", "seconds"),
        "seconds per position",
    )
    folded = [depth_table("Mean number of paths per position", found, {"paths": lambda m: m.matrix("leaves")}, "level")]
    notes = [
        "Tokens read: one for each path that was followed; the text itself is read besides.",
        *dict.fromkeys(f"{m.names[0]}: {m.end['note'].rstrip('.')}." for m in found if m.end.get("note")),
        *(
            f"{m.names[0]}, {m.names[1]}: timed over {m.end['positions']:,} of {len(m.rows):,} positions; the others "
            "were read before."
            for m in found
            if m.end["positions"] < len(m.rows)
        ),
    ]
    return Section("Cost of marginalising", notes, [Table("Time and tokens", head, rows, 2)], charts, folded)


def per(key: str) -> Mean:
    """A total per position, which is no mean of rows and has no error; None if no position was timed."""

    def mean(m: Measured) -> Estimate | None:
        count = m.end["positions"]
        return Estimate(m.end[key] / count, None, count) if count else None

    return mean


def rate(found: Estimate | None) -> str:
    return DASH if found is None else f"{found.mean:.3g}"
