"""`foretoken bench`: every method on the same prompts, measured one after the other in a new order every time.

A round is one group of prompts, decoded once by plain decoding and by every method. Its rows are compared with each
other and with no other round's, so a machine that changes its speed meets all methods alike. Every row is on the disk
as soon as it is measured.
"""

import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import mean, median
from uuid import uuid4

from rich.console import Console

from foretoken.bench.cells import Ask, Group, groups, other, too_few
from foretoken.bench.engine import Watch, read_per_forward
from foretoken.bench.entries import Entry, Ours, Taken, Theirs, peer_methods
from foretoken.bench.methods import methods
from foretoken.bench.predict import forward, predicted, running
from foretoken.bench.rows import EVERY, FILE, PLAIN, Cost, Results, Run, Skip, Writer, read
from foretoken.bench.taken import rows_of
from foretoken.bench.tasks import Prompt, prompts
from foretoken.costs import measure
from foretoken.errors import UserError
from foretoken.graphs import quickened
from foretoken.loading import load
from foretoken.machine import Machine, read_bandwidth
from foretoken.progress import Update, progress
from foretoken.target import Target

WARM = 32
"""New tokens of the decoding that warms a method up and times its parts."""
TIMED = 2
"""Times that parts are timed; each step counts with its median."""


class Comparison:
    """One call of the command on a loaded target."""

    def __init__(self, ask: Ask, target: Target, writer: Writer, done: Results | None) -> None:
        self.ask, self.target, self.writer, self.run = ask, target, writer, uuid4().hex[:8]
        rows = done.rows if done is not None else []
        self.done = {(r.method, r.task, r.temperature, r.batch, r.group, r.repeat) for r in rows}
        costs = done.costs if done is not None else []
        self.known = {(c.method, c.task, c.temperature, c.batch) for c in costs}
        self.timed = {c.batch: c for c in costs if not c.method}  # forwards on no text
        self.plain: dict[tuple[str, float, int, int], list[list[int]]] = {}
        self.entries: list[Entry] = []
        self.skipped = set[Skip]()
        self.order = Random(ask.seed)

    def start(self, bandwidth: float, most: int) -> None:
        """Write what the rows of this call share, and make every method ready; one that cannot is left out."""
        model = self.target.model
        self.writer.write(
            [
                Run(
                    id=self.run,
                    command="foretoken " + " ".join(sys.argv[1:]),
                    date=datetime.now(UTC).isoformat(timespec="seconds"),
                    model=place_of(self.ask.model),
                    parameters=sum(p.numel() for p in model.parameters()),
                    weights=read_per_forward(self.target),
                    dtype=str(self.target.dtype).removeprefix("torch."),
                    device=str(self.target.device),
                    bandwidth_gb_s=bandwidth,
                    machine=Machine.here().as_dict(),
                    settings=self.ask.same(),
                )
            ]
        )
        for method in methods(self.ask.drafters):
            self.add(method.label, lambda method=method: Ours(method, self.target, self.ask))
        for name in peer_methods(self.ask.peers):
            self.add(name, lambda name=name: Theirs(name, self.ask, self.target, most))

    def add(self, label: str, make: Callable[[], Entry]) -> None:
        try:
            self.entries.append(make())
        except UserError as error:
            self.skip(label, str(error))

    def skip(self, label: str, reason: str, batch: int | None = None, temperature: float | None = None) -> None:
        """Say, once, why something does not run."""
        skip = Skip(self.run, label, reason, batch, temperature)
        if skip not in self.skipped:
            self.skipped.add(skip)
            self.writer.write([skip])

    def close(self) -> None:
        for entry in self.entries:
            entry.close()

    def missing(self, group: Group, repeat: int) -> list[Entry]:
        """The methods that have no row of this round yet; plain decoding as well if there is any."""
        cell = (group.task, group.temperature, group.batch, group.number, repeat)
        found = [e for e in self.entries if (e.label, *cell) not in self.done and self.takes(e, group)]
        if found and not any(e.label == PLAIN for e in found):
            found.insert(0, next(e for e in self.entries if e.label == PLAIN))
        return found

    def takes(self, entry: Entry, group: Group) -> bool:
        """Whether the method can decode such a group."""
        reason = entry.refuses(group)
        if reason is not None:
            self.skip(entry.label, reason, group.batch)
        return reason is None

    def everything(self, found: Sequence[Prompt], update: Update) -> None:
        """Every round that is not there yet."""
        for (task, batch), n in too_few(self.ask, found).items():
            self.skip(EVERY, f"The task {task!r} has fewer prompts ({n}) than are decoded together.", batch)
        asked = list(groups(self.ask, found))
        total, warmed = len(asked) * self.ask.repeats, set[tuple[str, float, int]]()
        for i, group in enumerate(asked):
            cell = (group.task, group.temperature, group.batch)
            what = f"{group.task}, temperature {group.temperature:g}, batch {group.batch}: rounds"
            for repeat in range(self.ask.repeats):
                update(what, i * self.ask.repeats + repeat, total)
                if not (entries := self.missing(group, repeat)):
                    continue
                if cell not in warmed:
                    warmed.add(cell)
                    self.warm(other(self.ask, group, found), entries)
                self.round(group, repeat, [e for e in entries if e in self.entries])

    def warm(self, group: Group, entries: Sequence[Entry]) -> None:
        """Run every method on prompts that do not count; of ours, time the parts of a step."""
        watches: dict[str, list[Watch]] = {}
        for turn in range(TIMED + 1):
            for entry in entries if turn == 0 else [e for e in self.entries if isinstance(e, Ours) and e in entries]:
                taken = self.taken(entry, group, min(self.ask.new, WARM), audit=turn == 0)
                if turn > 0 and taken is not None and taken.watch is not None:
                    watches.setdefault(entry.label, []).append(taken.watch)
        sizes = sorted({*(1 << n for n in range(group.batch.bit_length())), group.batch})
        self.writer.write([cost for size in sizes for cost in self.forwards(size)])
        self.writer.write(
            [
                cost_of(self.run, label, group, found, self.timed)
                for label, found in watches.items()
                if (label, group.task, group.temperature, group.batch) not in self.known
            ]
        )

    def forwards(self, batch: int) -> list[Cost]:
        """The target's forwards by width, once for each batch size."""
        if batch in self.timed:
            return []
        timed = measure(self.target.settled(), batch, context=self.ask.length + self.ask.new // 2)
        self.timed[batch] = Cost(self.run, batch, widths=list(timed.widths), seconds=list(timed.forward))
        return [self.timed[batch]]

    def taken(self, entry: Entry, group: Group, new: int, audit: bool = False) -> Taken | None:
        """What the method made of the group; None, and it is left out from now on, if it cannot."""
        try:
            return entry.take(group, new, audit)
        except UserError as error:
            if entry.label == PLAIN:
                raise
            self.skip(entry.label, str(error), group.batch, group.temperature)
            entry.close()
            self.entries.remove(entry)
            return None

    def round(self, group: Group, repeat: int, entries: Sequence[Entry]) -> None:
        """One group by every one of these methods, in a new order."""
        shuffled = self.order.sample(list(entries), len(entries))
        plain, name = self.reference(group), uuid4().hex[:8]
        for entry in shuffled:
            if (taken := self.taken(entry, group, self.ask.new)) is not None:
                always = {"run": self.run, "round": name, "repeat": repeat}
                self.writer.write(rows_of(entry, group, taken, plain, self.target, self.ask.seed, **always))

    def reference(self, group: Group) -> list[list[int]]:
        """What plain decoding says to the group; the same in every repeat."""
        key = (group.task, group.temperature, group.batch, group.number)
        if key not in self.plain:
            entry = next(e for e in self.entries if e.label == PLAIN)
            self.plain[key] = entry.take(group, self.ask.new).tokens
        return self.plain[key]


def place_of(model: str) -> str:
    """A folder's whole path, so that the results can be read from anywhere; a hub name as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def cost_of(run: str, label: str, group: Group, watches: Sequence[Watch], forwards: dict[int, Cost]) -> Cost:
    """Seconds of a proposal and of a step's own work, and how much longer its forwards take than those on no text.

    Per step the median of the repeats, then the mean over steps.
    """
    draft, judge = typical([w.drafts for w in watches]), typical([w.judges for w in watches])
    own = median(w.own / max(1, len(w.drafts)) for w in watches)
    rows = [n for w in watches for n in running([row.forwards for row in w.rows], len(w.widths))]
    widths = [width for w in watches for width in w.widths]
    usual = sum(forward(forwards, n, width) for n, width in zip(rows, widths, strict=True))
    ratio = judge * len(widths) / usual if usual else 1.0
    return Cost(run, group.batch, label, group.task, group.temperature, draft=draft, own=own, judging=ratio)


def typical(repeats: Sequence[list[float]]) -> float:
    """The mean over steps of each one's median."""
    steps = [median(step) for step in zip(*repeats, strict=False)]
    return mean(steps) if steps else 0.0


def earlier(ask: Ask) -> Results | None:
    """What the folder holds; `UserError` if that cannot be gone on with."""
    if not (ask.out / FILE).is_file():
        return None
    if not ask.resume:
        raise UserError(f"{str(ask.out)!r} holds results; add --resume to go on with them, or give another --out.")
    results = read(ask.out)
    for run in results.runs:
        if run.model != place_of(ask.model) or run.settings != ask.same():
            raise UserError(
                f"{str(ask.out)!r} holds results of {run.model!r} with {run.settings}; repeat those options, or give "
                "another --out."
            )
    return results


def run(ask: Ask) -> Results:
    """Compare as asked, and return everything that the folder then holds."""
    methods(ask.drafters)  # what can be refused at once is
    peer_methods(ask.peers)
    done = earlier(ask)
    target = load(ask.model, dtype=ask.dtype, device=ask.device, attention=ask.attention)
    found = prompts(
        target, ask.tasks, limit=ask.limit + max(ask.batches), length=ask.length, new=ask.new, seed=ask.seed
    )
    too_few(ask, found)  # or is there nothing to measure?
    with progress() as update:
        if ask.compile:
            target = quickened(target, progress=lambda stage: update(f"compiling: {stage}", 0, 1))
            target.settled()
        writer = Writer(ask.out)
        comparison = Comparison(ask, target, writer, done)
        try:
            update("measuring the memory's speed", 0, 1)
            comparison.start(read_bandwidth(target.device), max(len(p.ids) for p in found) + ask.new)
            comparison.everything(found, update)
        finally:
            comparison.close()
            writer.close()
    return read(ask.out)


def show(results: Results, out: Path) -> None:
    """Print the comparison, and how to see more of it."""
    from foretoken.bench.report.contents import brief
    from foretoken.bench.report.summary import summarize
    from foretoken.report.tables import terminal

    console = Console(highlight=False)
    summary = summarize(results, predicted, repr(str(out)))
    console.print(terminal(brief(summary)))
    for reason in dict.fromkeys(skip.reason for skip in summary.skips):
        who = dict.fromkeys(skip.where for skip in summary.skips if skip.reason == reason)
        console.print(f"Not measured: {'; '.join(who)}. {reason}", style="dim", markup=False)
    console.print(f"{len(results.rows)} rows in {out}; `foretoken report {out}` writes a page.", markup=False)
