"""The comparison: what is asked, measured, written, gone on with and predicted."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from foretoken.bench import compare, engine, entries, step
from foretoken.bench.cells import Ask, Group, groups, other
from foretoken.bench.compare import Comparison, earlier, run
from foretoken.bench.engine import decode, extra_parameters, held, read_per_forward
from foretoken.bench.entries import Ours, Taken
from foretoken.bench.methods import label_of, methods, split
from foretoken.bench.predict import cost_of, forward, predicted, seconds_of
from foretoken.bench.report.contents import skipped
from foretoken.bench.report.summary import summarize
from foretoken.bench.rows import FILE, Cost, Results, Row, Run, Skip, Writer, read
from foretoken.bench.taken import rows_of
from foretoken.bench.tasks import Prompt, prompts
from foretoken.cache import SlotCache
from foretoken.cli import app
from foretoken.compiled import CompiledTarget
from foretoken.decode import Request
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.generation import decode_all
from foretoken.rules import Match
from foretoken.sampling import Sampling
from foretoken.target import Target
from tests.models import ASSETS, BITSTORIES, STORIES, asset
from tests.signals import listening

MEDUSA = f"medusa:{ASSETS / 'stdlib5M-medusa'}"
CODE = str(ASSETS / "stdlib5M")


def ask_for(out: Path, **more: Any) -> Ask:
    """A comparison of moments."""
    given: dict[str, Any] = {"limit": 2, "length": 12, "new": 10, "repeats": 2, "dtype": "float32"}
    given["drafters"] = ["suffix", "jacobi,length=3"]
    return Ask(model=STORIES, tasks="random", out=out, **(given | more))


# ---------------------------------------------------------------------------------------------------------------- asked


def test_methods_are_data():
    found = methods(["suffix,nodes=3,prompt_lookup", "draft_model:a/b,depth=2,rule=rejection", "none"])
    assert [m.label for m in found] == ["none", "suffix nodes=3", "prompt_lookup", "draft_model:b depth=2 rejection"]
    assert label_of("medusa:runs/stdlib-medusa", {}, "match") == "medusa"
    assert (found[1].settings, found[3].rule, found[3].drafter) == ({"nodes": "3"}, "rejection", "draft_model:a/b")
    assert split(["hybrid:eagle:p,part=tree=dynamic"]) == [["hybrid:eagle:p", "part=tree=dynamic"]]
    assert label_of("hybrid:eagle:x/y/z", {"path": "a/b"}, "match") == "hybrid:eagle:z path=b"
    assert [m.requires for m in found[:2]] == ["nothing", "nothing"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("sufix", "did you mean 'suffix'"),
        ("suffix,nods=3", "did you mean 'nodes'"),
        ("suffix,rule=mach", "did you mean 'match'"),
        ("nodes=3", "came before any drafter"),
        ("suffix,suffix", "asked for twice"),
        (",", "No drafter was named"),
        ("@nowhere.json", "cannot be read"),
    ],
)
def test_what_cannot_be_compared_is_refused(asked: str, said: str):
    with pytest.raises(UserError, match=said):
        methods([asked])


def test_groups_fill_their_batch():
    found = [Prompt("a", str(i), [i], "") for i in range(5)] + [Prompt("b", "9", [9], "")]
    ask = ask_for(Path(), limit=4, batches=[1, 2], temperatures=[0.0, 1.0])
    made = list(groups(ask, found))
    assert len(made) == 2 * (5 + 2)
    pairs = [g for g in made if g.batch == 2 and g.temperature == 1]
    assert [[p.id for p in g.prompts] for g in pairs] == [["0", "1"], ["2", "3"]]
    assert [list(g.numbers) for g in pairs] == [[0, 1], [2, 3]]
    assert [p.id for p in other(ask, pairs[0], found).prompts] == ["4", "4"]
    assert [p.id for p in other(ask, made[4], found).prompts] == ["9"]  # there is no other


def test_a_batch_that_no_task_fills_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"A batch of 3 needs 3 prompts of a task, and no task has more than 2 \(--lim"):
        run(ask_for(tmp_path, batches=[1, 3]))
    assert not (tmp_path / FILE).exists()


# ------------------------------------------------------------------------------------------------------------- measured


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["none", "suffix", "lookahead"])
def test_a_clock_changes_nothing(name: str, compiled: bool):
    target = asset(BITSTORIES, torch.float32)
    if compiled:
        target = CompiledTarget(target, inductor=False)
    drafter = make_drafter(name, target)
    sampling = Sampling(temperature=0.8, seed=2)
    requests = [Request([5 + i, 6, 7], sampling, i, 8 + 5 * i) for i in range(3)]
    watch = decode(target, drafter, Match(), requests, 1000, audit=True)
    rows = decode_all(target, drafter, requests, Match())
    assert [r.output for r in watch.rows] == [r.output for r in rows]
    assert [r.forwards for r in watch.rows] == [r.forwards for r in rows]
    steps = max(r.forwards for r in rows)
    assert len(watch.drafts) == len(watch.judges) == len(watch.widths) == sum(watch.histogram.values()) == steps
    assert 0 < watch.first < watch.seconds
    assert watch.own > 0
    parts = watch.first + sum(watch.drafts) + sum(watch.judges) + watch.own
    assert parts == pytest.approx(watch.seconds)
    assert watch.read > 1000 * steps  # the weights in every step, and the cache behind the prompts
    cache = 2 * sum(x.shape[-1] * 4 * 4 for x in [torch.empty(1, 32)] * 8)  # keys and values, 4 heads, 8 layers
    assert watch.read - 1000 * steps == pytest.approx(cache * tokens_read(rows), rel=0.05)


class Settling(Target):
    """A target that hands sessions another one, as a compiled target that is not ready does."""

    def __init__(self, given: Target) -> None:
        self.__dict__.update(given.__dict__)
        self.given, self.asked = given, list[tuple[int, ...]]()

    def settled(self, features: Sequence[int] = ()) -> Target:
        self.asked.append(tuple(features))
        return self.given


def test_the_clock_runs_on_the_target_that_the_session_uses():
    target = Settling(asset(CODE, torch.float32))
    heads = make_drafter(MEDUSA, target)
    watch = decode(target, heads, Match(), [Request([5, 6, 7], max_new_tokens=8)], 1000)
    assert target.asked == [tuple(heads.needs.features)]
    assert len(watch.judges) == watch.rows[0].forwards > 0
    assert watch.read > 1000 * len(watch.judges)


def tokens_read(rows: Any) -> int:
    """Tokens behind which the forwards of these rows stood, those that left not counted."""
    return sum(
        len(r.request.tokens) + 1 + (r.emitted - 1) * (i + 1) // r.forwards for r in rows for i in range(r.forwards)
    )


def test_the_cache_is_weighed_once(monkeypatch: pytest.MonkeyPatch):
    weighed: list[int] = []
    inner = SlotCache.nbytes.fget
    assert inner is not None
    monkeypatch.setattr(SlotCache, "nbytes", property(lambda cache: weighed.append(inner(cache)) or weighed[-1]))
    target = asset(BITSTORIES, torch.float32)
    requests = [Request([5, 6, 7], Sampling(), i, 8 + 5 * i) for i in range(2)]
    watch = decode(target, make_drafter("none", target), Match(), requests)
    assert len(watch.judges) > 1
    assert len(weighed) == 1


def test_what_a_drafter_adds():
    target = asset(CODE, torch.float32)
    heads = make_drafter(MEDUSA, target)
    number, size = extra_parameters(heads, target)
    own = sum(p.numel() for p in heads.heads.parameters())
    assert (number, size) == (own, 4 * own)
    small = make_drafter("draft_model", target, {"path": str(ASSETS / "stdlib1M")})
    assert extra_parameters(small, target)[0] == sum(p.numel() for p in small.model.model.parameters())
    for name in ("suffix", "none", "early_exit", "lookahead"):  # an early exit runs the target's own layers
        assert extra_parameters(make_drafter(name, target), target) == (0, 0)
    assert read_per_forward(target) == sum(p.nbytes for p in target.model.parameters())  # its embedding is its head
    hybrid = make_drafter("hybrid", target, {"path": heads})
    assert extra_parameters(hybrid, target) == (number, size)


def test_what_drafting_keeps():
    target = asset(CODE, torch.float32)
    requests = [Request([5, 6, 7], Sampling(), i, 12) for i in range(2)]
    small = make_drafter("draft_model", target, {"path": str(ASSETS / "stdlib1M")})
    watch = decode(target, small, Match(), requests, audit=True)
    state = small.start(2, 15 + small.needs.width)
    small.model.read(torch.tensor([[5, 6, 7]] * 2), [3, 3], state.cache)
    assert watch.kept == pytest.approx(state.cache.nbytes, rel=0.02)
    early = make_drafter("early_exit", target)
    assert decode(target, early, Match(), requests, audit=True).kept < 1000  # it lives in the target's cache
    assert held([torch.zeros(10)[:5], {"a": torch.zeros(3, dtype=torch.float64)}], None) == 40 + 24  # pyright: ignore


def test_the_peak_starts_anew():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not count this")
    big = torch.ones(40_000_000)
    before = engine.peak(torch.device("cpu"))
    assert before is not None
    del big
    engine.restart_peak(torch.device("cpu"))
    after = engine.peak(torch.device("cpu"))
    assert after is not None
    assert after < before - 100_000_000


# ----------------------------------------------------------------------------------------------------- written, resumed


def test_a_comparison_from_end_to_end(tmp_path: Path):
    ask = ask_for(tmp_path, drafters=["suffix", "draft_model:/nowhere/at/all", "lookahead,window=3,ngram=3,guesses=2"])
    ask = replace(ask, batches=[1, 2], temperatures=[0.0, 0.9])
    found = run(ask)
    assert [s.method for s in found.skips] == ["draft_model:all"]
    labels = {"none", "suffix", "lookahead window=3 ngram=3 guesses=2"}
    cells = {(r.method, r.temperature, r.batch, r.group, r.repeat, r.prompt) for r in found.rows}
    assert len(cells) == len(found.rows) == 3 * 2 * (2 + 2) * 2
    assert {r.method for r in found.rows} == labels
    target = asset(STORIES, torch.float32)
    asked = prompts(target, "random", limit=2, length=12, new=10)
    for row in found.rows:
        assert row.same_as_plain is True
        assert row.tokens == 10
        assert row.tokens_per_forward == pytest.approx(9 / (row.forwards or 1))
        assert row.seconds > (row.first or 0) > 0
        assert row.steps == sum(row.widths.values()) > 0
        assert (row.ids is None) == (row.repeat > 0) == (row.drafted is None)
    rounds = {(r.round, r.temperature, r.batch, r.group, r.repeat) for r in found.rows}
    assert len(rounds) == len({name for name, *_ in rounds}) == 2 * 3 * 2
    said = {r.prompt: r.ids for r in found.rows if r.repeat == 0 and r.temperature == 0 and r.method == "suffix"}
    for prompt in asked:
        plain = decode_all(target, make_drafter("none", target), [Request(prompt.ids, max_new_tokens=10)], Match())
        assert said[prompt.id] == plain[0].output
    timed = {(c.method, c.batch) for c in found.costs}
    assert {("", 1), ("", 2), *((m, b) for m in labels for b in (1, 2))} == timed
    for label in labels:
        assert (predicted(found, label, 0.9, 2, "random") or 0) > 0.05
    assert predicted(found, "none", 0.0, 1, "random") == pytest.approx(1)


def test_going_on_measures_what_is_missing(tmp_path: Path):
    """A new method is paired with plain decoding anew; nothing that is there is measured again."""
    first = run(ask_for(tmp_path))
    with pytest.raises(UserError, match="add --resume"):
        run(ask_for(tmp_path))
    same = run(ask_for(tmp_path, resume=True))
    assert same.rows == first.rows
    more = run(ask_for(tmp_path, drafters=["suffix", "prompt_lookup"], resume=True))
    new = more.rows[len(first.rows) :]
    assert more.rows[: len(first.rows)] == first.rows
    assert {r.method for r in new} == {"none", "prompt_lookup"}
    assert len(new) == 2 * 2 * 2
    assert not {r.round for r in new} & {r.round for r in first.rows}
    with pytest.raises(UserError, match="repeat those options"):
        earlier(ask_for(tmp_path, resume=True, new=11))


class Compiled(Target):
    """Stands for a compiled target: `settled` is itself, and it says what it was settled for."""

    def __init__(self, target: Target, **_: object) -> None:
        self.__dict__.update(target.__dict__)
        self.features = set[tuple[int, ...]]()
        made.append(self)

    def settled(self, features: Sequence[int] = ()) -> Target:
        self.features.add(tuple(features))
        return self


made: list[Compiled] = []


def test_compiled_rows_say_so_and_are_not_mixed_with_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compare, "quickened", Compiled)
    monkeypatch.setattr(entries, "CompiledTarget", Compiled)
    eager = run(ask_for(tmp_path / "eager", limit=1, repeats=1))
    ask = ask_for(tmp_path / "compiled", limit=1, repeats=1, compile=True)
    compiled = run(ask)
    assert [{r.compiled for r in found.rows} for found in (eager, compiled)] == [{False}, {True}]
    assert [found.runs[0].settings.get("compile") for found in (eager, compiled)] == [None, True]
    assert made[-1].features == {()}
    assert run(replace(ask, resume=True)).rows == compiled.rows
    for folder, compiles in (("eager", True), ("compiled", False)):
        with pytest.raises(UserError, match="repeat those options"):
            run(ask_for(tmp_path / folder, limit=1, repeats=1, resume=True, compile=compiles))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own, by inductor
def test_a_compiled_comparison_says_what_plain_decoding_says(tmp_path: Path):
    found = run(ask_for(tmp_path, limit=1, repeats=1, compile=True))
    assert {(r.compiled, r.same_as_plain) for r in found.rows} == {(True, True)}
    assert all(r.verify and r.steps for r in found.rows)


def test_a_torn_line_is_left_out_and_mended(tmp_path: Path):
    first = run(ask_for(tmp_path))
    file = tmp_path / FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    assert read(tmp_path).rows == first.rows[:-1]
    again = run(ask_for(tmp_path, resume=True))
    assert {r.method for r in again.rows[len(first.rows) - 1 :]} <= {"none", first.rows[-1].method}
    key = lambda r: (r.method, r.group, r.repeat)  # noqa: E731
    assert {key(r) for r in again.rows} == {key(r) for r in first.rows}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"kind": "row", "surprise": 1}', "another version"),
        ('{"kind": "column"}', "another version"),
        ('{"kind": "run", "format": 99}', "format 99"),
        ('{"kind": "skip", "run": "a"}', "lacks fields"),
        ("nonsense", "is no JSON object"),
        ("[1]", "is no JSON object"),
        ("3", "is no JSON object"),
    ],
)
def test_results_of_others_are_refused(tmp_path: Path, line: str, said: str):
    (tmp_path / FILE).write_text(f'{{"kind": "skip", "run": "a", "method": "b", "reason": "c"}}\n{line}\n')
    with pytest.raises(UserError, match=said):
        read(tmp_path)
    with pytest.raises(UserError, match="holds no rows"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (FILE, b"\xb2\xff"),
        (f"{FILE}.gz", b"not packed"),
        (f"{FILE}.gz", gzip.compress(b"x" * 99, mtime=0)[:-9]),
        (f"{FILE}.gz", b"\x1f\x8b\x08" + b"\xff" * 30),
    ],
)
def test_results_that_cannot_be_read_are_refused(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}' cannot be read .*; restore the file or use a new folder"):
        read(tmp_path)


def test_every_line_comes_back(tmp_path: Path):
    row = Row("r", "a", "m", "m", {"x": 1}, "match", True, False, "", "t", "p", 3, 0.5, 1, 2, 0, 1, 4, 0.5, 8.0)
    row = replace(row, widths={1: 3, 16: 2}, differs={"position": 1, "tokens": [1, 2], "gap": 0.1}, ids=[1, 2])
    lines = [
        Run("r", "c", "d", "m", 1, 2, "float32", "cpu", 3.0, {"threads": 2}),
        row,
        Cost("r", 1, widths=[1, 2], seconds=[0.1, 0.2]),
        Skip("r", "m", "why", 1, 0.0),
    ]
    writer = Writer(tmp_path)
    writer.write(lines)
    writer.close()
    found = read(tmp_path)
    assert [*found.runs, *found.rows, *found.costs, *found.skips] == lines
    (tmp_path / f"{FILE}.gz").write_bytes(gzip.compress((tmp_path / FILE).read_bytes()))
    (tmp_path / FILE).unlink()
    assert read(tmp_path) == found


class Failing:
    """A method that gives up after a while."""

    label, resamples = "failing", False

    def __init__(self) -> None:
        self.calls = self.closed = 0

    def refuses(self, group: Group) -> str | None:
        return None

    def take(self, group: Group, new: int, audit: bool = False) -> Taken:
        self.calls += 1
        if self.calls > 3:
            raise UserError("It gave up.")
        return Taken([[1] * new for _ in group.prompts], 1.0, None)

    def describe(self) -> dict[str, Any]:
        told = {"drafter": "x", "settings": {}, "rule": "its own", "exact": True, "peer": True, "requires": "y"}
        return told | {"extra_parameters": 0}

    def close(self) -> None:
        self.closed += 1


def test_a_method_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path):
    ask, target = ask_for(tmp_path), asset(STORIES, torch.float32)
    writer, failing = Writer(tmp_path), Failing()
    made = Comparison(ask, target, writer, None)
    made.start(1.0, 22)
    made.entries.append(failing)
    made.everything(prompts(target, "random", limit=3, length=12, new=10), lambda *_: None)
    writer.close()
    found = read(tmp_path)
    assert [(s.method, s.reason, s.batch) for s in found.skips] == [("failing", "It gave up.", 1)]
    assert failing.closed == 1
    mine = [r for r in found.rows if r.method == "failing"]
    assert len(mine) == 2
    assert len([r for r in found.rows if r.method == "suffix"]) == 4
    for row in mine:
        assert row.same_as_plain is False
        assert row.differs is not None
        assert row.differs["position"] == 0
        assert row.differs["gap"] > 0


def test_what_does_not_run_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A method that decodes one prompt at a time, and a task with too few prompts for a batch; the rest runs."""
    (tmp_path / "mine.txt").write_text("Once upon a time\n")
    ask = replace(ask_for(tmp_path, batches=[1, 2], temperatures=[0.0, 0.5], repeats=1), tasks="random")
    target, writer, single = asset(STORIES, torch.float32), Writer(tmp_path), Failing()
    monkeypatch.setattr(single, "refuses", lambda group: None if group.batch == 1 else "It decodes one at a time.")
    monkeypatch.setattr(single, "take", lambda group, new, audit=False: Taken([[1] * new], 1.0, None))
    made = Comparison(ask, target, writer, None)
    made.start(1.0, 22)
    made.entries.append(single)
    tasks = f"random,{tmp_path / 'mine.txt'}"
    made.everything(prompts(target, tasks, limit=4, length=12, new=10), lambda *_: None)
    writer.close()
    found = read(tmp_path)
    said = {(s.method, s.batch, s.temperature, s.reason) for s in found.skips}
    few = "The task 'mine' has fewer prompts (1) than are decoded together."
    assert said == {("every method", 2, None, few), ("failing", 2, None, "It decodes one at a time.")}
    assert len(found.skips) == 2
    cells = {(r.method, r.task, r.batch) for r in found.rows}
    ours = {(m, *cell) for m in ("none", "suffix", "jacobi length=3") for cell in [("random", 2), ("mine", 1)]}
    assert cells == ours | {(m, "random", 1) for m in ("none", "suffix", "jacobi length=3", "failing")} | {
        ("failing", "mine", 1)
    }
    (section,) = skipped(summarize(found, predicted))
    assert ("failing", "2", "all", "It decodes one at a time.") in section.tables[0].rows


def test_differences_are_placed(tmp_path: Path):
    """Where a method leaves plain decoding, and how sure the target was there."""
    target = asset(STORIES, torch.float32)
    group = Group("t", 0.0, 1, 0, [Prompt("t", "a", [5, 6, 7], "")], [0])
    plain = decode_all(target, make_drafter("none", target), [Request([5, 6, 7], max_new_tokens=6)], Match())[0].output
    said = [*plain[:4], plain[4] + 1, plain[5]]
    entry: Any = Ours(methods(["suffix"])[1], target, ask_for(tmp_path))
    always = {"run": "r", "round": "a", "repeat": 0}
    (row,) = rows_of(entry, group, Taken([said], 2.0, 0.5), [plain], target, 0, **always)
    assert row.differs is not None
    assert (row.same_as_plain, row.differs["position"], row.differs["tokens"]) == (False, 4, [plain[4], said[4]])
    logits = target.model(torch.tensor([[5, 6, 7, *plain[:4]]])).logits[0, -1]
    best = logits.detach().topk(2).values
    assert row.differs["gap"] == pytest.approx(float(best[0] - best[1]), abs=1e-3)
    assert row.tokens_per_second == 3.0
    (row,) = rows_of(entry, group, Taken([plain[:3]], 2.0, 0.5), [plain], target, 0, **always)
    assert row.differs is not None
    assert row.differs["tokens"] == [plain[3], None]
    entry.resamples = True
    hot = replace(group, temperature=1.0)
    assert rows_of(entry, hot, Taken([said], 2.0, 0.5), [plain], target, 0, **always)[0].same_as_plain is None
    assert rows_of(entry, group, Taken([said], 2.0, 0.5), [plain], target, 0, **always)[0].same_as_plain is False


# ------------------------------------------------------------------------------------------------------------ predicted


def test_a_prediction_by_hand():
    """Two rows of 3 and 1 forwards, drafts of 4 nodes; forwards of 1, 2 rows over 1, 4 nodes."""
    base = Row("r", "a", "m", "m", {}, "match", True, False, "", "t", "p", 3, 0.0, 0, 2, 0, 0, 7, 9.0, 1.0)
    base = replace(base, steps=3, widths={4: 3}, first=1.0)
    rows = [replace(base, forwards=3), replace(base, prompt="q", forwards=1, tokens=3)]
    plain = [replace(r, method="none", steps=6, widths={1: 6}, forwards=r.tokens - 1) for r in rows]
    forwards = [Cost("r", 1, widths=[1, 4], seconds=[1.0, 1.5]), Cost("r", 2, widths=[1, 4], seconds=[2.0, 2.5])]
    own = [Cost("r", 2, "m", "t", draft=0.25, own=0.5), Cost("r", 2, "none", "t", own=0.5)]
    results = Results([], rows + plain, forwards + own, [])
    by_batch = {c.batch: c for c in forwards}
    assert forward(by_batch, 2, 2) == pytest.approx(2 + 0.5 / 3)
    assert seconds_of(rows, own[0], by_batch) == pytest.approx(3 * 0.75 + 2.5 + 1.5 + 1.5)
    assert seconds_of(plain, own[1], by_batch) == pytest.approx(6 * 0.5 + 2 * 2.0 + 4 * 1.0)
    assert predicted(results, "m", 0.0, 2, "t") == pytest.approx((1 + 11.0) / (1 + 7.75))
    slower = replace(own[0], judging=2.0)
    assert seconds_of(rows, slower, by_batch) == pytest.approx(3 * 0.75 + 2 * (2.5 + 1.5 + 1.5))
    assert predicted(results, "m", 1.0, 2, "t") is None
    assert predicted(results, "m", 0.0, 4, "t") is None


def test_a_slow_moment_of_the_machine_is_no_property_of_a_method():
    """Everything takes twice as long while one cell is timed; in another a single timing went wrong."""
    costs = [
        Cost("r", 1, method, task, draft=0.1, own=slow * own, judging=slow * judging)
        for task, slow in (("t", 1.0), ("u", 2.0), ("v", 1.0))
        for method, own, judging in (("none", 0.1, 1.0), ("m", 0.5, 1.2), ("n", 0.2, 1.1))
    ]
    for task, slow in (("t", 1.0), ("u", 2.0), ("v", 1.0)):
        found = cost_of(costs, "m", 0.0, 1, task)
        assert found is not None
        assert (found.draft, found.own, found.judging) == pytest.approx((0.1, 0.5 * slow, 1.2 * slow))
    odd = [replace(c, own=5.0, judging=9.0) if (c.method, c.task) == ("m", "v") else c for c in costs]
    found = cost_of(odd, "m", 0.0, 1, "v")
    assert found is not None
    assert found.judging == pytest.approx(1.2, rel=0.1)
    assert found.own == pytest.approx(0.5, rel=0.1)
    assert cost_of(costs, "m", 1.0, 1, "t") is None


# ------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--batch", "0", "give whole numbers of 1 or more"),
        ("--batch", "inf", "give numbers of 0 or more"),
        ("--batch", "nan", "give numbers of 0 or more"),
        ("--temperature", "-1", "give numbers of 0 or more"),
        ("--temperature", "nan", "give numbers of 0 or more"),
        ("--peers", "transformers:lookup", "is no method of the peer 'transformers'; .* did you mean 'prompt_lookup'"),
    ],
)
def test_bad_options_end_in_a_sentence(tmp_path: Path, option: str, value: str, said: str):
    done = CliRunner().invoke(app, ["bench", STORIES, "--out", str(tmp_path / "out"), option, value])
    assert done.exit_code == 2
    assert re.search(said, done.output)
    assert not (tmp_path / "out").exists()


def test_what_is_asked_for_twice_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[Ask] = []
    monkeypatch.setattr(compare, "run", asked.append)
    monkeypatch.setattr(compare, "show", lambda *_: None)
    options = ["--batch", "2,1,2", "--temperature", "0,1,0"]
    assert CliRunner().invoke(app, ["bench", STORIES, "--out", str(tmp_path), *options]).exit_code == 0
    assert (asked[0].batches, asked[0].temperatures) == ([2, 1], [0.0, 1.0])
    assert CliRunner().invoke(app, ["bench", STORIES, "--out", str(tmp_path), "--compile"]).exit_code == 0
    assert [ask.compile for ask in asked] == [False, True]


def test_one_reason_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    reason = "It is not installed."
    row = Row("r", "a", "none", "none", {}, "match", True, False, "", "t", "p", 3, 0.0, 1, 1, 0, 0, 4, 0.5, 8.0)
    skips = [Skip("r", "x:a", reason), Skip("r", "x:b", reason, 2, 0.5), Skip("s", "x:a", reason)]
    compare.show(Results([], [row], [], skips), tmp_path)
    assert "Not measured: x:a; x:b, batch 2, temperature 0.5. It is not installed." in capsys.readouterr().out.replace(
        "\n", " "
    )


def test_each_one_reads_as_often_in_turn(monkeypatch: pytest.MonkeyPatch):
    """Eager, compiled and transformers: as many forwards and tokens of each as repeats, ratios of the same repeat."""
    monkeypatch.setattr(step, "SPAN", 2)
    target = asset(STORIES, torch.float32)
    targets = {step.EAGER: target, step.COMPILED: Settling(target)}
    times = step.step_times(targets, [1, 3], 8, 2)
    assert {(who, w): len(t) for (who, w), t in times.forward.items()} == {
        (who, w): 2 for who in (step.EAGER, step.COMPILED, step.THEIRS) for w in (1, 3)
    }
    assert {who: len(t) for who, t in times.token.items()} == dict.fromkeys((step.EAGER, step.COMPILED, step.THEIRS), 2)
    forward = {(who, w): [i * w, 2 * i * w] for i, who in enumerate(targets, 1) for w in (1, 3)}
    forward |= {(step.THEIRS, w): [4.0, 4.0] for w in (1, 3)}
    token = {step.EAGER: [2.0, 2.0], step.COMPILED: [1.0, 1.0], step.THEIRS: [6.0, 6.0]}
    record = step.found(step.Times(forward, token))
    assert record["widths"][3] == {"ms": 4500, "transformers_ms": 4000, "v": 3, "compiled_ms": 9000, "compiled_v": 3}
    assert (record["generate_over_step"], record["generate_over_compiled_step"]) == (3, 6)
    eager = step.found(
        step.Times(
            {k: t for k, t in forward.items() if k[0] != step.COMPILED},
            {k: token[k] for k in (step.EAGER, step.THEIRS)},
        )
    )
    assert "compiled_ms" not in eager["widths"][1]


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished(tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "foretoken.cli",
        "bench",
        BITSTORIES,
        "--out",
        str(tmp_path),
        "--drafters",
        "suffix",
    ]
    options = ["--prompts", "random", "--limit", "8", "--max-new-tokens", "60", "--repeats", "9"]
    process = subprocess.Popen(
        [*command, *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=listening,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not (tmp_path / FILE).exists() or len(read(tmp_path).rows) < 4):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume goes on" in said
    assert "Traceback" not in said
    kept = read(tmp_path).rows
    assert len(kept) >= 4
    assert compare.earlier(Ask(BITSTORIES, ["suffix"], "random", tmp_path, new=60, resume=True)) is not None


def test_records_are_plain_json(tmp_path: Path):
    run(ask_for(tmp_path, limit=1, repeats=1))
    for line in (tmp_path / FILE).read_text().splitlines():
        record = json.loads(line)
        assert record.pop("kind") in ("run", "row", "cost", "skip")
    row = read(tmp_path).rows[0]
    assert json.loads(json.dumps(asdict(row)))["task"] == "random"
