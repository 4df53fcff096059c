"""Where two outputs part and why: ties of rounding are told from planted bugs, in float32 and in bfloat16."""

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import typer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

import foretoken
from foretoken import evidence
from foretoken.cache import SlotCache
from foretoken.cli import Commands
from foretoken.commands.drafters import drafters
from foretoken.commands.explain import explain as command
from foretoken.decode import Request, Session
from foretoken.drafters import make_drafter
from foretoken.evidence import PLAIN, STEP, TRUTH, Judge, distance
from foretoken.explain import Explanation, explain, first_difference, gap_at
from foretoken.rules import Block, LossyTopK, Match, Rejection, Rule, at_parent, keep
from foretoken.sampling import Sampler, Sampling, Scores
from foretoken.target import Target
from foretoken.tree import Accepted, Draft
from tests.models import STORIES, asset

PROMPT = "Once upon a time, there was a little girl named Lily. She loved to"
DTYPES = [torch.float32, torch.bfloat16]


def ids(target: Target, text: str = PROMPT) -> list[int]:
    assert target.tokenizer is not None
    return list(target.tokenizer(text)["input_ids"])


def explained(
    target: Target, *, prompt: str = PROMPT, new: int = 40, rule: Rule | None = None, **sampling: Any
) -> Explanation:
    """Plain decoding against a tree of three guesses per node, by the target's first four layers of five."""
    none, drafter = (
        make_drafter("none", target),
        make_drafter("early_exit", target, {"layers": 4, "width": 3, "depth": 3}),
    )
    return explain(
        target, ids(target, prompt), none, drafter, sampling=Sampling(**sampling), rule=rule, max_new_tokens=new
    )


def output(target: Target, drafter: str = "none", new: int = 40, **sampling: Any) -> list[int]:
    session = Session(target, make_drafter(drafter, target), [Request(ids(target), Sampling(**sampling), 0, new)])
    while session.running:
        session.step()
    return session.rows[0].output


@pytest.mark.parametrize(
    ("a", "b", "place"),
    [([], [], None), ([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 3], 1), ([1, 3], [1], 1), ([], [4], 0)],
)
def test_the_first_difference(a: list[int], b: list[int], place: int | None):
    assert first_difference(a, b) == place


def test_the_gap_is_that_of_plain_decoding():
    """What decoding emits is the best token, and the gap that of a forward without a cache, also under noise."""
    target = asset(STORIES)
    for sampling in (Sampling(), Sampling(temperature=0.7, seed=3, top_k=40, presence_penalty=0.5)):
        session = Session(target, make_drafter("none", target), [Request(ids(target), sampling, 9, 12)])
        while session.running:
            session.step()
        text, n = session.rows[0].text, len(ids(target))
        for place in range(12):
            gap = gap_at(target, text[: n + place], sampling, 9, prompt=n)
            assert gap.best == text[n + place]
            with torch.inference_mode():
                logits = evidence.plain(target, text[: n + place])[-1]
            contest = Judge(target, text[:n], text[n : n + place], sampling, 9).contest(logits)
            assert gap.gap == pytest.approx(float(contest[gap.best] - contest[gap.second]), abs=1e-9)
            assert gap.gap >= 0
            assert contest[gap.second] == contest.sort().values[-2]
            if sampling.temperature == 0:
                assert gap.gap == pytest.approx(float(logits.sort().values[-1] - logits.sort().values[-2]), abs=1e-9)


def test_equal_outputs_are_the_same():
    for temperature in (0.0, 1.0):
        found = explained(asset(STORIES, torch.float32), temperature=temperature)
        assert (found.verdict, found.place, found.readings, found.tokens) == ("same", None, {}, 40)


@lru_cache
def twins() -> Target:
    """The model in bfloat16 with every even token's output row copied to the token after it, one weight a bit off."""
    target = foretoken.load(STORIES, dtype="bfloat16", device="cpu")
    head: Any = target.model.get_output_embeddings()
    weight = head.weight.detach().clone()
    even, column = torch.arange(0, len(weight), 2), torch.arange(0, len(weight), 2) % weight.shape[1]
    weight[even + 1] = weight[even]
    weight[even + 1, column] *= 1 + 2.0**-7
    head.weight = nn.Parameter(weight, requires_grad=False)  # apart from the embedding, which stays
    return target


def test_a_tie_in_bfloat16_is_a_numerical_tie():
    """Two tokens whose logits differ by less than rounding: whichever wins depends on the forward's width."""
    names = ("Lily", "Tom", "Max", "Sue", "Ben", "Tim")
    found = (explained(twins(), prompt=f"Once upon a time, {n} saw a", new=60) for n in names)
    e = next(e for e in found if e.place is not None)
    assert e.verdict == "numerical tie", e.reason
    assert e.a is not None and e.b is not None and e.difference is not None and e.rounding is not None
    assert e.a.token != e.b.token
    step, wide = e.readings[STEP], e.readings["b"]
    assert abs(step.lead) <= abs(step.lead - wide.lead)  # the widths move the gap by as much as there is
    assert step.lead >= 0 >= wide.lead
    assert e.readings["a"] == step
    assert set(e.readings) == {"a", "b", STEP, TRUTH, *PLAIN}
    assert "which rounding explains; float64 sides with" in e.reason


def sees_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node sees every node of its own depth."""
    seen = SlotCache.seen

    def wrong(self: SlotCache, depth: Tensor, ancestors: Tensor | None, *rest: Any) -> Tensor:
        if ancestors is not None and ancestors.shape[1] == ancestors.shape[2]:
            ancestors = ancestors | (depth[:, :, None] == depth[:, None])
        return seen(self, depth, ancestors, *rest)

    monkeypatch.setattr(SlotCache, "seen", wrong)


def commits_the_wrong_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first nodes of the draft are kept, whatever was accepted."""
    commit = SlotCache.commit
    monkeypatch.setattr(SlotCache, "commit", lambda self, path, count: commit(self, None, count))


@dataclass(frozen=True, slots=True)
class Credulous:
    """A rule that calls itself `match` and believes the first guess."""

    name: ClassVar[str] = "match"
    exact: ClassVar[bool] = True
    samples: ClassVar[bool] = False

    def __call__(self, draft: Draft, scores: Scores) -> Accepted:
        fits = draft.tokens == at_parent(draft, scores.emitted)
        fits[:, 1:2] = True
        return keep(draft, fits & (draft.depth < 2), scores.emitted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plant", [sees_siblings, commits_the_wrong_slots])
def test_a_wrong_cache_is_a_bug(plant: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch)
    found = explained(asset(STORIES, dtype))
    assert found.verdict == "bug"
    assert found.reason.startswith("The logits of run b are")
    assert found.allowed is not None
    off = found.readings["b"]
    assert off.largest is not None and off.largest > found.allowed[0]
    for name in ("a", STEP, *PLAIN):
        reading = found.readings[name]
        assert reading.largest is not None and reading.largest <= found.allowed[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_rule_that_keeps_a_wrong_token_is_a_bug(dtype: torch.dtype, temperature: float):
    found = explained(asset(STORIES, dtype), rule=Credulous(), temperature=temperature)
    assert found.verdict == "bug"
    assert found.a is not None and found.b is not None
    assert found.reason == f"Run b emitted token {found.b.token} where its own logits give {found.a.token}."
    assert found.b.guessed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_of_another_position_is_a_bug(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Scores, "positions", property(lambda self: self.position[:, None].expand(-1, self.draft.width)))
    found = explained(asset(STORIES, dtype), temperature=1.0)
    assert found.verdict == "bug"
    assert "where its own logits give" in found.reason


def test_penalties_for_the_whole_draft_are_a_bug(monkeypatch: pytest.MonkeyPatch):
    penalise = Sampler._penalise

    def harsh(self: Sampler, values: Tensor, draft: Draft) -> Tensor:
        return penalise(self, values, replace(draft, ancestors=draft.ancestors | True))

    monkeypatch.setattr(Sampler, "_penalise", harsh)
    found = explained(asset(STORIES, torch.float32), frequency_penalty=1.5)
    assert found.verdict == "bug"
    assert "where its own logits give" in found.reason


def test_plain_decoding_that_is_wrong_is_a_bug_too(monkeypatch: pytest.MonkeyPatch):
    """Width 1 is no measure: here every cached step stands one position too far ahead."""
    judge = Target.judge

    def ahead(self: Target, draft: Draft, cache: SlotCache, features: Any = ()) -> Any:
        if draft.width > 1:
            return judge(self, draft, cache, features)
        return self.extend(draft.tokens, draft.depth + 5, draft.ancestors, cache, features=features)

    monkeypatch.setattr(Target, "judge", ahead)
    found = explained(asset(STORIES, torch.float32))
    assert found.verdict == "bug"
    assert found.reason.startswith("The logits of run a are")


@pytest.mark.parametrize(("rule", "verdict"), [(Rejection(), "another sample"), (LossyTopK(8), "lossy")])
def test_rules_with_another_output_get_no_judgement(rule: Rule, verdict: str):
    found = explained(asset(STORIES, torch.float32), rule=rule, temperature=1.0)
    assert found.verdict == verdict
    assert found.place is not None and found.b is not None and found.readings


def test_rejection_without_temperature_is_judged():
    assert explained(asset(STORIES, torch.float32), rule=Rejection()).verdict == "same"


def test_block_draws_another_sample():
    target = asset(STORIES, torch.float32)
    none, chain = (
        make_drafter("none", target),
        make_drafter("early_exit", target, {"layers": 4, "width": 1, "depth": 3}),
    )
    found = explain(target, ids(target), none, chain, sampling=Sampling(temperature=1), rule=Block(), max_new_tokens=30)
    assert found.verdict == "another sample"


def test_the_place_is_where_the_token_was_decided():
    """Of a planted difference: forward, width and path are those of decoding, and every run's token is named."""
    target = asset(STORIES, torch.float32)
    found = explained(target, rule=Credulous())
    plain = output(target)
    assert found.place is not None and found.a is not None and found.b is not None
    assert (found.a.forward, found.a.width, found.a.depth, found.a.node) == (found.place, 1, 0, 0)
    assert found.a.token == plain[found.place]
    assert found.a.path == [plain[found.place - 1]]
    assert found.b.path == plain[found.place - 1 - found.b.depth : found.place]
    assert found.b.width > 4
    assert found.b.forward <= found.place
    assert {found.a.token, found.b.token} <= set(found.texts)
    assert found.texts[found.a.token] == foretoken.text.decode(target.tokenizer, [found.a.token])  # pyright: ignore


def test_a_difference_in_the_prompts_own_token(monkeypatch: pytest.MonkeyPatch):
    """The first token comes from the prompt's forward, which guesses nothing."""

    class Last(Credulous):
        def __call__(self, draft: Draft, scores: Scores) -> Accepted:
            kept = Match()(draft, scores)
            return Accepted(kept.path, kept.count, scores.values[:, -1].argmin(-1))

    found = explained(asset(STORIES, torch.float32), rule=Last())
    assert found.place == 0 and found.b is not None
    assert (found.b.forward, found.b.width, found.b.guessed) == (0, len(ids(asset(STORIES))), False)
    assert found.verdict == "bug"


def test_without_float64_the_plain_forwards_stand_in(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evidence.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1 << 20})())
    monkeypatch.setattr("foretoken.cache.require_memory", lambda *_: None)
    (note,) = explained(asset(STORIES, torch.float32), rule=Credulous()).notes
    assert note.startswith("Left out float64: it takes")
    sees_siblings(monkeypatch)
    found = explained(asset(STORIES, torch.float32))
    assert found.verdict == "bug" and TRUTH not in found.readings
    assert found.reason.startswith("The logits of run b are")


def test_a_model_that_cannot_do_float64_is_noted(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise RuntimeError("no kernel for double\nmore")

    target, notes = asset(STORIES, torch.float32), list[str]()
    monkeypatch.setattr(evidence, "plain", refuse)
    assert evidence.exactly(target, [1, 2], notes) is None
    assert notes == ["Left out float64: the model cannot compute in it (no kernel for double)."]
    assert target.dtype == torch.float32


def test_distances_know_infinities():
    a, b = torch.tensor([1.0, -torch.inf, 3.0, 2.0]), torch.tensor([1.5, -torch.inf, 3.0, 0.0])
    assert distance(a, b) == (2.0, pytest.approx((4.25 / 4) ** 0.5))


def test_the_first_of_equal_scores_is_best():
    assert evidence.gap_of(torch.tensor([0.0, 4.0, 4.0])) == evidence.Gap(1, 2, 0.0)


def test_a_random_model_in_float64_is_its_own_truth():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    target = Target(LlamaForCausalLM(config).double())
    none = make_drafter("none", target)
    drafter = make_drafter("early_exit", target, {"layers": 1, "width": 2, "depth": 2})
    assert explain(target, [3, 4, 5], none, drafter, max_new_tokens=20).verdict == "same"
    found = explain(target, [3, 4, 5], none, drafter, rule=Credulous(), max_new_tokens=20)
    assert found.verdict == "bug" and found.texts == {} and found.notes == []


app = typer.Typer(name="foretoken", cls=Commands, pretty_exceptions_enable=False)
app.command()(command)
app.command()(drafters)


def run(*args: str) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(app, ["explain", STORIES, "--device", "cpu", *args])


def test_the_command_prints_the_verdict():
    result = run("--b", "suffix", "--prompt", PROMPT, "--max-new-tokens", "20", "--set", "nodes=4")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("same: All 20 tokens are the same.\n")
    assert "a: none, match\nb: suffix nodes=4, match\n" in result.stdout


def test_the_command_ends_with_1_on_a_bug(monkeypatch: pytest.MonkeyPatch):
    sees_siblings(monkeypatch)
    options = (
        "--b",
        "early_exit",
        "--set",
        "layers=4",
        "--set",
        "width=3",
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        "40",
    )
    result = run(*options)
    assert result.exit_code == 1
    assert "bug: The logits of run b are" in result.stdout
    assert "They part at token" in result.stdout and "│ float64" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    result = run(*options, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["verdict"] == "bug" and found["b_drafter"] == "early_exit"
    assert found["a"]["token"] != found["b"]["token"]
    assert found["readings"]["b"]["rms"] > found["allowed"][1]


def test_a_token_outside_top_p_is_null_in_json():
    result = run("--b", "early_exit", "--set", "layers=4", "--rule", "rejection", "--temperature", "1", "--top-k", "1")
    assert result.exit_code == 2  # no prompt
    options = ("--b", "early_exit", "--set", "layers=4", "--rule", "lossy_top_k", "--temperature", "1", "--top-k", "4")
    result = run(*options, "--prompt", PROMPT, "--max-new-tokens", "30", "--json")
    assert result.exit_code == 0
    assert "Infinity" not in result.stdout and "NaN" not in result.stdout
    assert json.loads(result.stdout)["verdict"] in ("lossy", "same")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--b", "sufix", "--prompt", "a"), "did you mean 'suffix'?"),
        (("--a", "sufix", "--b", "suffix", "--prompt", "a"), "did you mean 'suffix'?"),
        (("--b", "suffix", "--set-a", "length=2", "--prompt", "a"), "length"),
        (("--b", "suffix", "--rule", "mach", "--prompt", "a"), "did you mean 'match'?"),
        (("--b", "suffix"), "There is no prompt"),
        (("--b", "suffix", "--prompt", ""), "is empty"),
        (("--b", "suffix", "--prompt", "a", "--max-new-tokens", "0"), "ask for at least 1"),
        (("--b", "suffix", "--prompt", "a", "--temperature", "-1"), "temperature is -1.0"),
        (("--b", "suffix", "--prompt", "a", "--dtype", "float8"), "is no dtype"),
    ],
)
def test_bad_input_gets_a_sentence(args: tuple[str, ...], said: str):
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert said in result.stderr and result.stderr.count("\n") == 1


def test_a_missing_model_is_refused(tmp_path: Path):
    result = CliRunner().invoke(app, ["explain", str(tmp_path), "--b", "suffix", "--prompt", "a"])
    assert result.exit_code == 2
    assert "holds no config.json" in result.stderr
