"""The figures of a comparison: what its rows say together. Nothing here draws.

Speeds are compared within a round only: a group of prompts is paired with plain decoding of the same prompts in the
same round. Rates (tokens per second) are divided and not seconds: outputs may differ in length.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import median

from foretoken.bench.report.figures import (
    Acceptance,
    Cell,
    Forwards,
    Group,
    Method,
    Overall,
    Parts,
    Place,
    Spread,
    geometric,
)
from foretoken.bench.rows import PLAIN, Cost, Results, Row, Run, Skip
from foretoken.errors import UserError

Predict = Callable[[Results, str, float, int, str], float | None]
"""Results, method, temperature, batch and task to the expected speed-up."""


@dataclass(frozen=True, slots=True)
class Summary:
    """All of it. `methods` are sorted by speed-up, greatest first.

    unmatched  rows that have no plain row in their round
    differing  rows of the first repeat whose tokens are not plain decoding's, though they should be
    floor      seconds that reading the target's weights takes on this machine
    """

    results: Results
    methods: list[Method]
    tasks: list[str]
    temperatures: list[float]
    batches: list[int]
    cells: dict[Place, Cell]
    overall: dict[tuple[str, float, int], Overall]
    own: dict[tuple[str, float, int], Overall]
    forwards: list[Forwards]
    floor: float | None
    unmatched: int
    differing: list[Row]

    @property
    def base(self) -> int:
        """The batch size that methods are first compared at."""
        return self.batches[0]

    @property
    def runs(self) -> list[Run]:
        return self.results.runs

    @property
    def skips(self) -> list[Skip]:
        """Each once, though a resumed comparison says it again."""
        once = {(s.method, s.batch, s.temperature, s.reason): s for s in self.results.skips}
        return list(once.values())


def summarize(results: Results, predict: Predict, name: str = "The folder") -> Summary:
    """The figures of `results`; `UserError` if they hold no row."""
    if not results.rows:
        raise UserError(f"{name} holds no rows yet: nothing was measured; let `foretoken bench` finish a round first.")
    rows = results.rows
    temperatures, batches = sorted({r.temperature for r in rows}), sorted({r.batch for r in rows})
    tasks = list(dict.fromkeys(r.task for r in rows))
    rates = {group_of(r): r.tokens_per_second for r in rows}
    cells = {place: cell(place, members, results, rates, predict) for place, members in by_place(rows).items()}
    overall = over_tasks((c.place, c.speedup) for c in cells.values())
    methods = [
        method(name, [r for r in rows if r.method == name], batches[0], parameters(results))
        for name in dict.fromkeys(r.method for r in rows)
    ]

    def order(m: Method) -> tuple[bool, float, str]:
        found = overall.get((m.name, temperatures[0], batches[0]))
        return m.peer, -found.mean if found else 0.0, m.name

    return Summary(
        results,
        sorted(methods, key=order),
        tasks,
        temperatures,
        batches,
        cells,
        overall,
        over_tasks((c.place, c.own) for c in cells.values()),
        forwards_of(results.costs),
        floor_of(results.runs),
        sum(not compared(rates, group_of(r), PLAIN) for r in rows),
        [r for r in rows if r.repeat == 0 and r.same_as_plain is False],
    )


def group_of(row: Row) -> Group:
    return Group(row.run, row.round, place_of(row), row.group, row.repeat)


def place_of(row: Row) -> Place:
    return Place(row.method, row.task, row.temperature, row.batch)


def by_place(rows: Iterable[Row]) -> dict[Place, list[Row]]:
    found: defaultdict[Place, list[Row]] = defaultdict(list)
    for row in rows:
        found[place_of(row)].append(row)
    return dict(found)


def cell(place: Place, rows: Sequence[Row], results: Results, rates: dict[Group, float], predict: Predict) -> Cell:
    """The figures of the rows of one place."""
    groups = list(dict.fromkeys(group_of(r) for r in rows))  # rows of a group share its time: it counts once
    rate = Spread.of([rates[g] for g in groups])
    assert rate is not None
    peer = rows[0].peer
    base = place.method.partition(":")[0]  # "vllm" is what "vllm:ngram" is without its drafts
    judged = judgements(rows)
    return Cell(
        place,
        rate,
        Spread.of(ratios(groups, rates, PLAIN)),
        Spread.of(ratios(groups, rates, base)) if peer and base != place.method else None,
        tau(rows),
        sum(judged),
        len(judged),
        None if peer or place.method == PLAIN else predict(results, place.method, *place[2:], place.task),
    )


def ratios(groups: Sequence[Group], rates: dict[Group, float], plain: str) -> list[float]:
    """Of each group that `plain` decoded in its round too, the rate over that one's."""
    return [rates[g] / other for g in groups if (other := compared(rates, g, plain))]


def compared(rates: dict[Group, float], group: Group, plain: str) -> float | None:
    """The rate at which `plain` decoded the same prompts in the same round."""
    return rates.get(group._replace(place=group.place._replace(method=plain)))


def judgements(rows: Iterable[Row]) -> list[bool]:
    """Of each prompt of the first repeat whether its tokens are plain decoding's, where that is expected."""
    return [r.same_as_plain for r in rows if r.repeat == 0 and r.same_as_plain is not None]


def tau(rows: Iterable[Row]) -> float | None:
    """Tokens per forward: the first token is the prompt's forward's."""
    counted = [(r.tokens - 1, r.forwards) for r in rows if r.forwards is not None]
    forwards = sum(f for _, f in counted)
    return sum(t for t, _ in counted) / forwards if forwards else None


def over_tasks(found: Iterable[tuple[Place, Spread | None]]) -> dict[tuple[str, float, int], Overall]:
    """By method, temperature and batch size."""
    spreads: defaultdict[tuple[str, float, int], list[Spread]] = defaultdict(list)
    for place, spread in found:
        if spread is not None:
            spreads[place.method, place.temperature, place.batch].append(spread)
    return {key: overall for key, some in spreads.items() if (overall := Overall.of(some))}


def method(name: str, rows: Sequence[Row], batch: int, target: int) -> Method:
    """What the rows of one method say together; `target`: its parameters."""
    first = rows[0]
    base = [r for r in rows if r.batch == batch]
    temperatures = sorted({r.temperature for r in base})
    judged = judgements(rows)
    taus = {t: tau(r for r in base if r.temperature == t) for t in temperatures}
    found = {t: acceptance(r for r in base if r.temperature == t) for t in temperatures}
    where = {t: parts([r for r in base if r.temperature == t]) for t in temperatures}
    extra = max(r.extra_parameters for r in rows)
    return Method(
        name,
        first.drafter,
        first.settings,
        next((r.rule for r in rows if not r.exact), first.rule),
        all(r.exact for r in rows),
        first.peer,
        first.requires,
        extra,
        extra / target if target else 0.0,
        max(r.extra_memory for r in base or rows),
        sum(judged),
        len(judged),
        {t: value for t, value in taus.items() if value is not None},
        {t: value for t, value in found.items() if any(value.accepted)},
        {t: value for t, value in where.items() if value is not None},
    )


def acceptance(rows: Iterable[Row]) -> Acceptance:
    """Forwards and acceptances of the rows together."""
    counted = [r for r in rows if r.forwards]
    sums = [sum(column) for column in zip_longest(*(r.accepted for r in counted), fillvalue=0)]
    return Acceptance(sum(r.forwards or 0 for r in counted), sums)


def parts(rows: Sequence[Row]) -> Parts | None:
    """Where the seconds of the rows' groups went; None if that was not timed, as in another program."""
    groups = list({group_of(r): r for r in rows if None not in (r.first, r.draft, r.verify, r.own)}.values())
    seconds = sum(r.seconds for r in groups)
    if not seconds:
        return None
    first, draft, verify, own = (
        sum(getattr(r, name) for r in groups) / seconds for name in ("first", "draft", "verify", "own")
    )
    reads = [r.read_gb_s for r in groups if r.read_gb_s is not None]
    memory = [r.peak_memory for r in groups if r.peak_memory is not None]
    return Parts(first, draft, verify, own, median(reads) if reads else None, max(memory, default=None))


def within(pairs: Iterable[tuple[float, float]], share: float = 0.1) -> tuple[int, int]:
    """Of (predicted, measured) speed-ups those within `share` of the measured one, and all of them."""
    close = [abs(p - m) <= share * m for p, m in pairs]
    return sum(close), len(close)


def foretold(summary: Summary) -> dict[Place, tuple[float, float]]:
    """(predicted, measured) speed-up of every cell that has both."""
    return {
        c.place: (c.predicted, c.speedup.median)
        for c in summary.cells.values()
        if c.speedup and c.predicted is not None
    }


def foretold_by_method(summary: Summary) -> dict[tuple[str, int], tuple[float, float]]:
    """The same of each method and batch: geometric means over tasks and temperatures."""
    found: defaultdict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for place, pair in foretold(summary).items():
        found[place.method, place.batch].append(pair)
    return {key: (geometric([p for p, _ in pairs]), geometric([m for _, m in pairs])) for key, pairs in found.items()}


def forwards_of(costs: Iterable[Cost]) -> list[Forwards]:
    """Seconds by batch size and width: the median of those that several runs measured."""
    found: defaultdict[int, defaultdict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cost in costs:
        if not cost.method:
            for width, seconds in zip(cost.widths, cost.seconds, strict=True):
                found[cost.batch][width].append(seconds)
    return [
        Forwards(batch, sorted(widths), [median(widths[w]) for w in sorted(widths)])
        for batch, widths in sorted(found.items())
    ]


def floor_of(runs: Iterable[Run]) -> float | None:
    """Seconds in which the weights can be read once; the median over runs."""
    found = [r.weights / (r.bandwidth_gb_s * 1e9) for r in runs if r.bandwidth_gb_s > 0 and r.weights]
    return median(found) if found else None


def parameters(results: Results) -> int:
    """Of the target."""
    return max((r.parameters for r in results.runs), default=0)
