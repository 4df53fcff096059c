"""The tuner: what it computes follows from what was measured, and what it chooses from what it computes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import foretoken
from foretoken.bench import tune as tuning
from foretoken.bench.engine import Watch
from foretoken.bench.offers import Walk
from foretoken.bench.shapes import Candidate
from foretoken.bench.tasks import Prompt
from foretoken.bench.tune import Scored, Tuner, Tuning, chosen, rest_of, tune
from foretoken.cli import app
from foretoken.costs import Costs
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.tuned import Tuned, read_tuned
from tests.models import BITSTORIES, STORIES, asset


def made(walks: list[Walk], kind: str = "x kind", corner: bool = True, tokens: int = 12) -> Candidate:
    return Candidate("x", kind, {}, lambda: None, walks, tokens, corner)  # pyright: ignore


def busy(rest: float, nodes: int) -> Watch:
    """Three steps that take `rest` besides their forwards, all of it for proposals."""
    return Watch(drafts=[rest] * 3, widths=[nodes + 1] * 3, seconds=3 * rest)


class Timeless(Tuner):
    """A tuner whose times are given: forwards of 1, 2, 4 rows; a step's other work by corner."""

    def __init__(self, rests: dict[int, float], batch: int = 1) -> None:
        widths = (1, 2, 4, 8)
        self.forwards = {b: Costs(widths, [b * (0.9 + 0.1 * w) for w in widths]) for b in (1, 2)}
        self.batch, self.rest, self.rests = batch, 0.5, rests
        self.known: Any = SimpleNamespace(
            requests=[[SimpleNamespace(tokens=[1])] * batch], texts=[[[1] * 14] * batch], tokens=12 * batch
        )

    def watch(self, drafter: Any, new: int | None = None, most: int = 2) -> list[Watch]:
        return [busy(self.rests[drafter], drafter)]


def test_seconds_are_those_of_the_rows_that_run():
    tuner = Timeless({})
    assert tuner.forward(1, 4) == pytest.approx(1.3)
    assert tuner.forward(2, 3) == pytest.approx(2 * 1.2)
    found = tuner.seconds([3, 1], [4, 4, 2], [0.1, 0.2, 0.3])
    assert found == pytest.approx(2 * 1.3 + 1.3 + 1.1 + 0.6)


def test_a_plane_through_the_corners():
    """Times that are linear in levels and nodes come back at every shape of the kind."""
    corners = [(1, 2), (1, 8), (4, 8), (4, 20)]
    rests = {n * 10 + i: 0.3 + 0.1 * levels + 0.02 * n for i, (levels, n) in enumerate(corners)}
    tuner = Timeless(rests)
    found: list[Candidate] = []
    for key, (levels, nodes) in zip(rests, corners, strict=True):
        walk = Walk([3], [1 + nodes] * 3, [levels] * 3)
        candidate = made([walk])
        found.append(Candidate("x", "x k", {}, lambda key=key: key, candidate.walks, 12, True))  # pyright: ignore
    widths = dict(zip(rests, (n for _, n in corners), strict=True))
    tuner.watch = lambda drafter, new=None, most=2: [  # pyright: ignore
        busy(tuner.rests[drafter], widths[drafter])
    ]
    rest = tuner.fit(found)
    assert rest([2, 3], [5, 16]) == pytest.approx([0.3 + 0.2 + 0.1, 0.3 + 0.3 + 0.32])


def test_a_score_by_hand():
    """12 tokens in 4 forwards of 4 nodes with 0.25 s besides, against 12 of one node with 0.5 s."""
    tuner = Timeless({3: 0.25})
    walk = Walk([4], [4] * 4, [3] * 4)
    candidate = Candidate("x", "x k", {}, lambda: 3, [walk], 12, True)  # pyright: ignore
    (scored,) = tuner.score([candidate])
    assert scored.predicted == pytest.approx(12 * 1.5 / (4 * (1.3 + 0.25)))
    assert candidate.tokens_per_forward == 3


def test_pauses_of_the_machine_are_not_the_drafters():
    calm = Watch(drafts=[0.1] * 9 + [7.0], widths=[4] * 10, seconds=1.9 + 7.0, first=0.0)
    found, nodes = rest_of([calm])
    assert found == pytest.approx(0.09 + 0.05 + 0.1)  # the pause counts five times the median; a second of own work
    assert nodes == 3
    assert rest_of([Watch()]) == (0.0, 0.0)


def asked(target: Any, count: int = 2) -> list[Prompt]:
    words = ["Once upon a time", "Tom and his dog went", "Lily saw a big", "One day, a boy"]
    return [Prompt("stories", w, list(target.tokenizer(w)["input_ids"]), w) for w in words[:count]]


def test_what_is_expected_lies_nearer_to_what_is_surer():
    """Of drafts that differ little, the one that happened to run in a quick moment is not the faster one."""
    candidate: Any = None
    for error, trust in ((0.0, 0.0), (tuning.TRUSTED, 0.5), (1e6, 1.0)):
        found = tuning.Scored(candidate, 2.0, 1.5, error)
        assert found.expected == pytest.approx(1.5 ** (1 - trust) * 2.0**trust)
    assert tuning.Scored(candidate, 1.8, 1.75, 0.04).expected > tuning.Scored(candidate, 1.7, 1.8, 0.04).expected
    assert tuning.error_of([1.9, 2.0, 2.1]) == pytest.approx(1.25 * 0.1 / 3**0.5 / 2)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_choice_is_measured_and_exact(batch: int, tmp_path: Path):
    """A draft model that is as good as the target on its own text, free to propose: the tuner takes it."""
    target = asset(BITSTORIES, torch.float32)
    drafters = ["suffix", f"draft_model:{STORIES}", "draft_model:/nowhere/at/all"]
    found = tune(target, drafters, asked(target), batch=batch, new=20)
    assert list(found.refused) == ["draft_model:all"]
    assert [s.predicted for s in found.scored] == sorted((s.predicted for s in found.scored), reverse=True)
    raced = [s for s in found.scored if s.measured is not None]
    assert 0 < len(raced) <= tuning.FINALISTS
    assert len({s.candidate.kind for s in raced}) == len(raced)
    best = max(s.expected for s in raced)
    assert (found.best is None) == (best < tuning.PAYS)
    assert found.best is None or found.best.expected == best
    choice = chosen(found, BITSTORIES, batch, 0.0)
    file = tmp_path / "tuned.json"
    choice.write(file)
    assert read_tuned(f"@{file}") == choice
    plain = foretoken.generate(target, "Once upon a time", drafter="none", max_new_tokens=30)
    tuned = foretoken.generate(target, "Once upon a time", drafter=f"@{file}", max_new_tokens=30)
    assert tuned.token_ids == plain.token_ids


def test_plain_decoding_may_be_fastest(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    slow = Scored(made([Walk([4], [4] * 4, [3] * 4)]), 0.8, 0.7)
    found = Tuning(None, [slow], {1: Costs((1, 2), (0.1, 0.2))}, {})
    choice = chosen(found, "m", 1, 0.0)
    assert (choice.drafter, choice.settings, choice.measured) == ("none", {}, 1.0)
    tuning.show(found, choice, tmp_path / "x.json")
    said = " ".join(capsys.readouterr().out.split())
    assert "Plain decoding is fastest here (batch 1, temperature 0)" in said
    assert "reached 0.70 times its speed" in said


def test_settings_that_are_given_stay():
    target = asset(BITSTORIES, torch.float32)
    found = tune(target, ["suffix,min_match=2"], asked(target, 1), new=12)
    assert {s.candidate.settings["min_match"] for s in found.scored} == {"2"}
    assert len({s.candidate.settings["nodes"] for s in found.scored}) > 1
    found = tune(target, ["suffix,nodes=5"], asked(target, 1), new=12)
    assert [s.candidate.settings for s in found.scored] == [{"nodes": "5"}]


@pytest.mark.parametrize("given", [{"depth": "2"}, {"tree": "beam", "width": "3"}, {"stop": "0.4"}, {"nodes": "3"}])
def test_a_tree_that_is_given_stays(given: dict[str, str]):
    """One setting of the tree is a choice that the tuner does not overrule."""
    target = asset(BITSTORIES, torch.float32)
    text = ",".join([f"draft_model:{STORIES}", "candidates=top", *(f"{k}={v}" for k, v in given.items())])
    found = tune(target, [text], asked(target, 1), new=12)
    assert [s.candidate.settings for s in found.scored] == [given | {"candidates": "top"}]


def test_settings_outside_the_tree_leave_it_to_the_tuner():
    target = asset(BITSTORIES, torch.float32)
    found = tune(target, [f"draft_model:{STORIES},candidates=top"], asked(target, 1), new=12)
    assert len(found.scored) > 20
    assert {s.candidate.settings["candidates"] for s in found.scored} == {"top"}


def test_a_file_is_one_candidate(tmp_path: Path):
    """What an earlier tuning chose is compared as it is; settings beside it come before its own."""
    target = asset(BITSTORIES, torch.float32)
    for name, drafter, settings in (("a", "lookahead", {"window": 3}), ("b", f"draft_model:{STORIES}", {})):
        Tuned(drafter, settings, BITSTORIES, 0.0, 1, 1.5, 1.4).write(tmp_path / f"{name}.json")
    Tuned("none", {}, BITSTORIES, 0.0, 1, 1.0, 1.0).write(tmp_path / "plain.json")
    texts = [f"@{tmp_path / name}.json" for name in ("a", "b", "plain")]
    found = tune(target, [texts[0] + ",guesses=2", *texts[1:]], asked(target, 1), new=12)
    candidates = {s.candidate.drafter: s.candidate for s in found.scored}
    assert len(found.scored) == 2
    assert candidates["lookahead"].settings == {"window": 3, "guesses": "2"}
    built: Any = candidates["lookahead"].make()
    assert (built.config.window, built.config.guesses) == (3, 2)
    assert candidates[f"draft_model:{STORIES}"].settings == {}
    assert found.best is None or not chosen(found, "m", 1, 0.0).drafter.startswith("@")


@pytest.mark.parametrize(
    ("drafters", "said"),
    [
        (["suffix,rule=rejection"], "'suffix rejection' came with a rule, and drafts are tuned for the rule match"),
        (["suffix,adaptive=true"], "'suffix adaptive=true' came with adaptive=, and a draft that adapts has no shape"),
        (["none"], "Only plain decoding came"),
        ([f"draft_model:{STORIES},tree=statc"], "did you mean 'static'?"),
        (["@nowhere.json"], "'nowhere.json' cannot be read"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_the_model_is_read(drafters: list[str], said: str, tmp_path: Path):
    options = ["--drafters", ",".join(drafters), "--out", str(tmp_path / "x.json")]
    run = CliRunner().invoke(app, ["tune", str(tmp_path / "no model"), *options])
    assert run.exit_code == 2
    assert said in " ".join(run.output.split())


def test_no_drafter_is_left(tmp_path: Path):
    """Where none can run, that is said, and not that plain decoding is fastest."""
    target = asset(BITSTORIES, torch.float32)
    with pytest.raises(UserError) as found:
        tune(target, ["draft_model:/no/where", f"mtp:{tmp_path}"], asked(target, 1), new=12)
    said = str(found.value)
    assert said.startswith("No drafter that was given can run here, so there is nothing to choose from. ")
    assert "draft_model:where: '/no/where' is no model" in said
    assert "holds no drafter.json" in said


def test_too_few_prompts_for_a_batch():
    target = asset(BITSTORIES, torch.float32)
    with pytest.raises(UserError, match="Batch 4 needs as many prompts and 2 came"):
        tune(target, ["suffix"], asked(target), batch=4, new=8)


def test_a_tuned_file_is_a_drafter_everywhere(tmp_path: Path):
    """Python, the command line and the comparison; settings given beside it come before its own."""
    file = tmp_path / "tuned.json"
    Tuned("suffix", {"nodes": 3}, STORIES, 0.0, 1, 1.5, 1.4).write(file)
    target = asset(STORIES, torch.float32)
    built: Any = make_drafter(f"@{file}", target)
    assert built.config.nodes == 3
    built = make_drafter(f"@{file}", target, {"nodes": 5})
    assert built.config.nodes == 5
    run = CliRunner().invoke(
        app, ["generate", STORIES, "--prompt", "Once", "--max-new-tokens", "8", "--drafter", f"@{file}", "--json"]
    )
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["exact"] is True
    for text in ("{}", "[1]", "no"):
        file.write_text(text)
        with pytest.raises(UserError, match="was not written by `foretoken tune`"):
            make_drafter(f"@{file}", target)
    run = CliRunner().invoke(app, ["generate", STORIES, "--prompt", "Once", "--drafter", "@nowhere.json"])
    assert run.exit_code == 2
    assert "`foretoken tune` writes it" in " ".join(run.output.split())


def test_the_command_writes_its_choice(tmp_path: Path):
    out = tmp_path / "choice.json"
    options = [
        "--drafters",
        "suffix",
        "--prompts",
        "random",
        "--limit",
        "1",
        "--max-new-tokens",
        "12",
        "--out",
        str(out),
    ]
    run = CliRunner().invoke(app, ["tune", STORIES, *options])
    assert run.exit_code == 0, run.output
    assert read_tuned(f"@{out}").model == STORIES
    assert "use it as --drafter" in " ".join(run.output.split())


def test_forwards_are_interpolated_between_batches():
    tuner = Timeless({})
    assert np.isclose(tuner.forward(1, 1), 1.0)
    assert np.isclose((tuner.forward(1, 4) + tuner.forward(2, 4)) / 2, 1.5 * 1.3)
