"""`foretoken tune`: the drafter and draft that are fastest on this machine, for one batch size and temperature.

Three measurements: seconds of a forward by width, seconds of proposals at a few corners of each kind of tree, and which
guesses are right at every place of a few texts. From these the speed of every candidate is computed; the best few are
then decoded side by side with plain decoding, and the fastest is chosen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from random import Random
from statistics import mean, median, stdev
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from foretoken.bench.engine import Watch, decode
from foretoken.bench.methods import Method, methods
from foretoken.bench.predict import running
from foretoken.bench.rows import PLAIN
from foretoken.bench.shapes import Candidate, Known, candidates
from foretoken.bench.tasks import Prompt, prompts
from foretoken.costs import Costs, measure
from foretoken.decode import Request
from foretoken.drafter import Drafter
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.generation import decode_all, end_tokens
from foretoken.loading import load
from foretoken.machine import Machine
from foretoken.progress import Update, progress
from foretoken.rules import Match
from foretoken.sampling import Sampling
from foretoken.target import Target
from foretoken.tuned import Tuned, opened

CORNER = 24
"""New tokens of the decoding that times a corner."""
FINALISTS = 4
"""Candidates that are decoded to see, the best of each kind."""
RACES = 7
"""Times that each is."""
TRUSTED = 0.05
"""Relative error of a computed speed, against which that of a measured one is weighed."""
PAYS = 1.02
"""A drafter is worth its while from this speed-up on."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A candidate with its speed over plain decoding's, computed and, of finalists, measured.

    error  relative standard error of the measured one
    """

    candidate: Candidate
    predicted: float
    measured: float | None = None
    error: float = 0.0

    @property
    def expected(self) -> float:
        """Of a finalist: between the computed and the measured speed, nearer to the one that is surer.

        Drafts that differ little are told apart by the walk and not by a machine whose speed moves by more than that.
        """
        trust = self.error**2 / (self.error**2 + TRUSTED**2)
        return (self.measured or 0.0) ** (1 - trust) * self.predicted**trust


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was found.

    best      the fastest, or None: plain decoding is
    scored    every candidate, the best prediction first
    forwards  seconds of the target's forwards by width and batch size
    refused   drafters that cannot run, with the reason
    """

    best: Scored | None
    scored: list[Scored]
    forwards: dict[int, Costs]
    refused: dict[str, str]


class Tuner:
    """A target, texts, and the times that were measured with them."""

    def __init__(
        self, target: Target, texts: Sequence[Prompt], *, batch: int, temperature: float, new: int, seed: int
    ) -> None:
        self.target, self.batch = target, batch
        sampling, ends = Sampling(temperature=temperature, seed=seed), end_tokens(target)
        requests = [Request(p.ids, sampling, i, new, ends) for i, p in enumerate(texts)]
        if len(requests) < batch:
            raise UserError(f"Batch {batch} needs as many prompts and {len(requests)} came; give more, or --limit.")
        groups = [requests[i : i + batch] for i in range(0, len(requests) - batch + 1, batch)]
        self.plain = make_drafter(PLAIN, target)
        said = [[row.text for row in decode_all(target, self.plain, group, Match())] for group in groups]
        self.known = Known(groups, said)
        if self.known.tokens < 1:
            raise UserError("The texts end at once, so nothing can be measured; give other prompts.")
        context = mean(len(r.tokens) for g in groups for r in g) + new // 2
        sizes = sorted({*(1 << n for n in range(batch.bit_length())), batch})
        self.forwards = {size: measure(target.settled(), size, context=int(context)) for size in sizes}
        self.rest, _ = rest_of(self.watch(self.plain, CORNER))

    def watch(self, drafter: Drafter, new: int | None = None, most: int = 2) -> list[Watch]:
        """The requests decoded with a drafter, group by group; with `new`, only `most` groups and so many tokens."""
        groups = self.known.requests if new is None else self.known.requests[:most]
        short = [[replace(r, max_new_tokens=min(r.max_new_tokens, new or r.max_new_tokens)) for r in g] for g in groups]
        return [decode(self.target, drafter, Match(), g) for g in short]

    def forward(self, rows: int, width: int) -> float:
        """Seconds of a forward, between the timed batch sizes and widths by straight lines."""
        return float(
            np.interp(rows, list(self.forwards), [float(c.judging([width])[0]) for c in self.forwards.values()])
        )

    def seconds(self, forwards: Sequence[int], widths: Sequence[int], rest: Sequence[float]) -> float:
        """Of decoding a group whose rows need so many `forwards`, by the width and other work of each step."""
        rows = running(forwards, len(widths))
        return sum(self.forward(b, w) + r for b, w, r in zip(rows, widths, rest, strict=True))

    @property
    def plainly(self) -> float:
        """Seconds of plain decoding."""
        total = 0.0
        for requests, texts in zip(self.known.requests, self.known.texts, strict=True):
            steps = [len(t) - len(r.tokens) - 1 for r, t in zip(requests, texts, strict=True)]
            total += self.seconds(steps, [1] * max(steps), [self.rest] * max(steps))
        return total

    def score(self, found: Sequence[Candidate]) -> list[Scored]:
        """The candidates of one drafter with their computed speed."""
        scored: list[Scored] = []
        plain = self.plainly
        ordered = sorted(found, key=lambda c: c.kind)
        for _, kind in groupby(ordered, key=lambda c: c.kind):
            members = list(kind)
            rest = self.fit([c for c in members if c.corner])
            for c in members:
                seconds = sum(
                    self.seconds(w.forwards, w.widths, rest(w.levels, [n - 1 for n in w.widths])) for w in c.walks
                )
                scored.append(Scored(c, plain / seconds))
        return scored

    def fit(self, corners: Sequence[Candidate]) -> Callable[[Sequence[int], Sequence[int]], list[float]]:
        """Seconds of a step outside the forward, by levels and nodes: a plane through the corners, which are timed."""
        places, seconds = list[list[float]](), list[float]()
        for corner in corners:
            outside, nodes = rest_of(self.watch(corner.make(), CORNER))
            places.append([1.0, mean(levels for w in corner.walks for levels in w.levels), nodes])
            seconds.append(outside)
        plane, *_ = np.linalg.lstsq(np.array(places), np.array(seconds), rcond=1e-6)
        least = min(seconds)

        def rest(levels: Sequence[int], nodes: Sequence[int]) -> list[float]:
            at = np.stack([np.ones(len(levels)), np.asarray(levels), np.asarray(nodes)], 1)
            return np.maximum(at @ plane, 0.5 * least).tolist()

        return rest

    def race(self, finalists: Sequence[Scored], update: Callable[[int], None]) -> list[Scored]:
        """The finalists with their measured speed: paired with plain decoding, in a new order every time."""
        runners: dict[int, Drafter] = {i: s.candidate.make() for i, s in enumerate(finalists)} | {-1: self.plain}
        ratios: dict[int, list[float]] = {i: [] for i in runners}
        order = Random(0)
        for turn in range(RACES + 1):
            update(turn)
            times: dict[int, float] = {}
            for i in order.sample(list(runners), len(runners)):
                times[i] = sum(w.seconds - w.first for w in self.watch(runners[i]))
            for i in runners if turn else ():
                ratios[i].append(times[-1] / times[i])
        return [replace(s, measured=median(ratios[i]), error=error_of(ratios[i])) for i, s in enumerate(finalists)]


def error_of(ratios: Sequence[float]) -> float:
    """Relative standard error of the median."""
    return 1.25 * stdev(ratios) / len(ratios) ** 0.5 / median(ratios)


def rest_of(watches: Sequence[Watch]) -> tuple[float, float]:
    """(seconds of a step outside its forward, guesses of its draft), means over the steps of all groups."""
    drafts = [seconds for w in watches for seconds in w.drafts]
    if not drafts:
        return 0.0, 0.0
    usual = 5 * median(drafts)
    calm = [min(seconds, usual) for seconds in drafts]  # a pause of the machine is not the drafter's
    own = median(w.own / max(1, len(w.drafts)) for w in watches)
    return mean(calm) + own, mean(n - 1 for w in watches for n in w.widths)


def tunable(drafters: Sequence[str]) -> list[Method]:
    """The methods to choose from; `UserError` for what the tuner does not choose: rules, and drafts that adapt."""
    found = [m for m in methods(drafters) if m.name != PLAIN]
    if not found:
        raise UserError("Only plain decoding came, and it always takes part; give --drafters others, such as suffix.")
    for m in found:
        if m.rule != "match":
            raise UserError(
                f"{m.label!r} came with a rule, and drafts are tuned for the rule match; leave rule= out, or compare "
                "rules with `foretoken bench`."
            )
        if "adaptive" in opened(m.drafter, m.settings)[1]:
            raise UserError(
                f"{m.label!r} came with adaptive=, and a draft that adapts has no shape to choose; leave it out, and "
                "add it where the choice is used."
            )
    return found


def tune(
    target: Target,
    drafters: Sequence[str],
    texts: Sequence[Prompt],
    *,
    batch: int = 1,
    temperature: float = 0.0,
    new: int = 64,
    seed: int = 0,
    update: Update = lambda what, done, total: None,
) -> Tuning:
    """The best of these drafters, each NAME[:PATH][,key=value ...] or @FILE, and of their drafts.

    drafters  settings that are given stay as they are; `UserError` if none of them can run
    texts     prompts like those to be decoded, `batch` or more
    """
    asked = tunable(drafters)
    update("decoding plainly", 0, len(asked))
    tuner = Tuner(target, texts, batch=batch, temperature=temperature, new=new, seed=seed)
    scored, refused = list[Scored](), dict[str, str]()
    for i, method in enumerate(asked):
        update(f"what {method.label} would guess", i, len(asked))
        try:
            found = list(candidates(target, method.drafter, dict(method.settings), tuner.known, tuner.watch))
            scored += tuner.score(found)
        except UserError as error:
            refused[method.label] = str(error)
    if not scored:
        reasons = " ".join(f"{label}: {reason}" for label, reason in refused.items())
        raise UserError(f"No drafter that was given can run here, so there is nothing to choose from. {reasons}")
    scored.sort(key=lambda s: -s.predicted)
    best_of_kind = {s.candidate.kind: s for s in reversed(scored)}
    finalists = sorted(best_of_kind.values(), key=lambda s: -s.predicted)[:FINALISTS]
    raced = tuner.race(finalists, lambda n: update("decoding with the best", n, RACES + 1))
    fastest = max(raced, key=lambda s: s.expected)
    best = fastest if fastest.expected >= PAYS else None
    known = {id(s.candidate): s for s in raced}
    return Tuning(best, [known.get(id(s.candidate), s) for s in scored], tuner.forwards, refused)


def chosen(tuning: Tuning, model: str, batch: int, temperature: float) -> Tuned:
    """The choice as it is written to a file."""
    always: dict[str, Any] = {
        "model": model,
        "temperature": temperature,
        "batch": batch,
        "machine": Machine.here().as_dict(),
    }
    if tuning.best is None:
        return Tuned(PLAIN, {}, predicted=1.0, measured=1.0, **always)
    candidate = tuning.best.candidate
    name, _, path = candidate.drafter.partition(":")
    drafter = f"{name}:{Path(path).resolve()}" if path and Path(path).exists() else candidate.drafter
    measured = tuning.best.measured or 0.0
    return Tuned(drafter, candidate.settings, predicted=tuning.best.predicted, measured=measured, **always)


def run(
    model: str,
    drafters: Sequence[str],
    tasks: str,
    out: Path,
    *,
    limit: int,
    batch: int,
    temperature: float,
    new: int,
    seed: int,
    dtype: str | None,
    device: str | None,
    attention: str | None,
    compile: bool = False,
) -> None:
    """Tune, print what was found and write the choice."""
    tunable(drafters)  # what can be refused at once is
    with progress() as update:
        target = load(
            model,
            dtype=dtype,
            device=device,
            attention=attention,
            compile=compile,
            progress=lambda stage: update(f"compiling: {stage}", 0, 1),
        )
        found = prompts(target, tasks, limit=max(limit, batch), new=new, seed=seed)
        tuning = tune(target, drafters, found, batch=batch, temperature=temperature, new=new, seed=seed, update=update)
    choice = chosen(tuning, model, batch, temperature)
    choice.write(out)
    show(tuning, choice, out)


def show(tuning: Tuning, choice: Tuned, out: Path) -> None:
    """Print the forwards, the best candidates and the choice."""
    console = Console(highlight=False)
    table = Table("width", *(f"batch {b}" for b in tuning.forwards), title="One forward, ms", title_justify="left")
    first = next(iter(tuning.forwards.values()))
    for i, width in enumerate(first.widths):
        table.add_row(str(width), *(f"{1e3 * c.forward[i]:.2f}" for c in tuning.forwards.values()))
    console.print(table)
    table = Table("draft", "tokens/forward", "predicted", "measured", title="Speed over plain decoding's")
    table.title_justify = "left"
    shown = [s for s in tuning.scored if s.measured is not None]
    others = {s.candidate.kind: s for s in reversed(tuning.scored) if s.measured is None}
    rest = sorted(others.values(), key=lambda s: -s.predicted)
    for s in [*shown, *(s for s in rest if s.candidate.kind not in {x.candidate.kind for x in shown})]:
        measured = "" if s.measured is None else f"{s.measured:.2f}"
        table.add_row(s.candidate.label, f"{s.candidate.tokens_per_forward:.2f}", f"{s.predicted:.2f}", measured)
    console.print(table)
    for label, reason in tuning.refused.items():
        console.print(f"{label} was left out: {reason}")
    how = f"batch {choice.batch}, temperature {choice.temperature:g}"
    if tuning.best is None:
        best = max(s.measured or 0.0 for s in tuning.scored)
        console.print(
            f"Plain decoding is fastest here ({how}): of the drafts that were decoded the best reached {best:.2f} "
            f"times its speed (drafts computed: {len(tuning.scored)})."
        )
    else:
        console.print(
            f"{tuning.best.candidate.label}: predicted {choice.predicted:.2f}, measured {choice.measured:.2f} times "
            f"plain decoding's speed ({how}; drafts computed: {len(tuning.scored)})."
        )
    console.print(f"Written to {out}; use it as --drafter @{out}")
