"""Calibration counts what a slow look at the finished texts counts, and stores the trees that follow."""

from pathlib import Path
from typing import Any

import pytest
import torch

from foretoken import saved as store
from foretoken.costs import Costs
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.loading import load
from foretoken.noise import Noise
from foretoken.paths import best_paths, expected
from foretoken.sampling import Sampling
from foretoken.training import calibrate as module
from foretoken.training.calibrate import RANKS, accuracies, calibrate, paying_paths, run, timings
from tests import test_feedback, tiny
from tests.families import make
from tests.reference import reference
from tests.test_heads import batch_of, drafter_of, hiddens
from tests.test_saved import written

PROMPTS = [[5, 9, 12, 5, 9, 12, 5], [7, 3], list(range(30, 41))]
TOKENS = 14


def counted(target: Any, drafter: Any, temperature: float, seed: int) -> torch.Tensor:
    """The shares by definition: each finished text, each place, each head's choices there."""
    depths = drafter.heads.architecture.heads
    right, places = torch.zeros(depths, RANKS, dtype=torch.float64), 0
    for number, prompt in enumerate(PROMPTS):
        sampling = Sampling(temperature=temperature, seed=seed)
        text = prompt + reference(target.model, prompt, sampling, number=number, max_new_tokens=TOKENS)
        noise = Noise.of([seed], [number], torch.device("cpu"))
        tokens = torch.tensor([text])
        with torch.no_grad():
            states = target.decoder(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
            logits = hiddens(drafter.stages(batch_of(tokens)), states[-1])
        for root in range(len(prompt), len(text) - depths):
            places += 1
            for depth in range(1, depths + 1):
                at = root + depth
                values = logits[depth + 1][0, root - 1]
                gumbel = noise.gumbel(torch.tensor([[at]]), torch.arange(target.vocab))[0, 0]
                order = (values + temperature * gumbel).argsort(descending=True)[:RANKS]
                right[depth - 1] += order == text[at]
    return right / places


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_shares_are_what_a_slow_count_finds(temperature: float):
    target = make("llama")
    drafter = drafter_of("medusa", target)
    found = accuracies(target, drafter, PROMPTS, temperature=temperature, max_new_tokens=TOKENS, seed=3)
    torch.testing.assert_close(found, counted(target, drafter, temperature, 3))
    assert found.sum() > 0


HITS = {
    ("medusa", 0.0): [[1, 0, 1, 1, 0, 1], [3, 2, 0, 2, 1, 1], [3, 1, 2, 1, 1, 2]],
    ("medusa", 1.0): [[5, 7, 1, 3, 1, 0], [2, 3, 1, 4, 1, 1], [2, 2, 2, 1, 1, 1]],
    ("mtp causal", 0.0): [[3, 1, 0, 3, 0, 0], [0, 1, 1, 0, 0, 1], [3, 1, 1, 0, 1, 1]],
    ("mtp causal", 1.0): [[6, 1, 1, 0, 3, 1], [1, 3, 3, 3, 1, 1], [2, 3, 2, 1, 0, 2]],
}
"""How often the first six choices of each depth were right at 33 places, as counted when all depths had one state."""


@pytest.mark.parametrize(("key", "temperature"), HITS)
def test_heads_are_measured_as_ever(key: str, temperature: float):
    target = make("llama")
    drafter = drafter_of(key, target)
    found = accuracies(target, drafter, PROMPTS, temperature=temperature, max_new_tokens=TOKENS, seed=3)
    assert (33 * found[:, :6]).round(decimals=6).tolist() == HITS[key, temperature]


def conditional(target: Any, scored: Any, depths: int, temperature: float) -> torch.Tensor:
    """[D, R] by definition, for guesses that depend on those before: `scored(text, path)` are the logits [V] behind
    `path`, guessed behind `text`."""
    right, places = torch.zeros(depths, RANKS, dtype=torch.float64), 0
    for number, prompt in enumerate(PROMPTS):
        sampling = Sampling(temperature=temperature, seed=3)
        text = prompt + reference(target.model, prompt, sampling, number=number, max_new_tokens=TOKENS)
        noise = Noise.of([3], [number], torch.device("cpu"))
        for root in range(len(prompt), len(text) - depths):
            places += 1
            for depth in range(1, depths + 1):
                at = root + depth
                gumbel = noise.gumbel(torch.tensor([[at]]), torch.arange(target.vocab))[0, 0]
                values = scored(text[: root + 1], text[root + 1 : at])
                order = (values + temperature * gumbel).argsort(descending=True)[:RANKS]
                right[depth - 1] += order == text[at]
    return right / places


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["draft_model", "early_exit", "eagle 3.1", "three modules", "one module, shared rows"])
def test_later_guesses_are_measured_behind_right_ones(name: str, temperature: float):
    """The drafter reads the target's own tokens, not its guesses."""
    target = make("llama")
    if name in ("draft_model", "early_exit"):
        settings = {"path": make("llama", seed=1)} if name == "draft_model" else {"layers": 1}
        drafter: Any = make_drafter(name, target, {"depth": 3, **settings})
        model = (drafter.model if name == "draft_model" else drafter.part).model

        def scored(text: list[int], path: list[int]) -> torch.Tensor:
            with torch.no_grad():
                return model(input_ids=torch.tensor([text + path]), use_cache=False).logits[0, -1]
    else:
        drafter = test_feedback.drafter_of(name, target, tree="chain", width=0, depth=3)

        def scored(text: list[int], path: list[int]) -> torch.Tensor:
            return test_feedback.trained(drafter, text, path)

    found = accuracies(target, drafter, PROMPTS, temperature=temperature, max_new_tokens=TOKENS, seed=3)
    torch.testing.assert_close(found, conditional(target, scored, 3, temperature))
    assert found.sum() > 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_drafter_that_knows_is_always_right(temperature: float):
    target = make("llama")
    drafter = make_drafter("draft_model", target, {"path": target, "depth": 3})
    found = accuracies(target, drafter, PROMPTS, temperature=temperature, max_new_tokens=TOKENS, seed=3)
    assert torch.equal(found, torch.eye(RANKS, dtype=torch.float64)[:1].expand(3, RANKS))


def test_a_known_drafter():
    """The right token of position p is its choice p modulo 3, if it is told the right tokens before."""
    target = make("llama")
    drafter: Any = make_drafter("draft_model", target, {"path": target, "depth": 2})
    text = PROMPTS[0] + reference(target.model, PROMPTS[0], Sampling(), max_new_tokens=TOKENS)

    def begin(feed: Any, state: Any) -> Any:
        root = int(feed.length)

        def logits(at: int) -> torch.Tensor:
            values, token = torch.zeros(1, 1, target.vocab), text[at] if at < len(text) else 0
            for rank in range(3):
                values[0, 0, (token + rank - at % 3) % target.vocab] = 9.0 - rank
            return values

        def extend(growth: Any) -> torch.Tensor:
            assert growth.tokens[0].tolist() == text[root : root + growth.level + 1]
            return logits(root + growth.level + 1)

        return logits(root + 1), extend

    drafter.begin = begin
    found = accuracies(target, drafter, PROMPTS[:1], temperature=0, max_new_tokens=TOKENS, seed=0)
    roots = range(len(PROMPTS[0]), len(text) - 2)
    for depth in (1, 2):
        shares = [sum((root + depth) % 3 == rank for root in roots) / len(roots) for rank in range(3)]
        assert found[depth - 1].tolist() == pytest.approx(shares + [0.0] * (RANKS - 3))


def test_trees_are_stored_and_used(tmp_path: Path):
    target = make("llama")
    written(tmp_path, target)
    trees = calibrate(target, f"medusa:{tmp_path}", PROMPTS, nodes=5, max_new_tokens=TOKENS)
    assert sorted(trees) == ["0", "1"]
    for temperature, tree in trees.items():
        assert tree.paths == best_paths(tree.accuracy, 5)
        assert tree.tokens_per_forward == pytest.approx(expected(tree.accuracy, tree.paths))
        assert store.read(tmp_path).trees[temperature] == tree.paths
    drafter: Any = make_drafter(f"medusa:{tmp_path}", target)
    assert drafter.plan.paths(0.9) == trees["1"].paths


@pytest.fixture
def models(tmp_path: Path) -> tuple[Any, str]:
    """A target, and the name of a draft model, an ordinary checkpoint that says nearly the same."""
    tiny.save(tmp_path / "target")
    draft = load(tiny.save(tmp_path / "draft")).model
    torch.manual_seed(1)
    for parameter in draft.parameters():
        parameter.data += 0.015 * torch.randn_like(parameter)
    draft.save_pretrained(tmp_path / "draft")
    return load(tmp_path / "target"), f"draft_model:{tmp_path / 'draft'}"


WORDS = [[1, 2, 3], [7, 8], [15, 0, 1, 2]]


def test_a_draft_models_trees_lie_in_its_folder(models: tuple[Any, str], tmp_path: Path):
    target, name = models
    trees = calibrate(target, name, WORDS, nodes=6, depth=2, temperatures=[0.0], max_new_tokens=TOKENS)
    written_, paths = store.read(tmp_path / "draft", "draft_model"), trees["0"].paths
    assert (written_.architecture, written_.target, written_.trees) == ({}, store.identity(target), {"0": paths})
    assert not (tmp_path / "draft" / store.WEIGHTS).exists()
    assert trees["0"].accuracy.shape[0] == max(len(p) for p in paths) == 2
    drafter: Any = make_drafter(name, target)
    assert drafter.plan.paths(0.0) == paths
    calibrate(target, name, WORDS, nodes=3, temperatures=[1.0], max_new_tokens=TOKENS)
    assert set(store.read(tmp_path / "draft").trees) == {"0", "1"}
    assert store.read(tmp_path / "draft").trees["0"] == paths


def test_a_draft_models_trees_are_for_one_target(models: tuple[Any, str], tmp_path: Path):
    """For another they are not used, not asked for in vain and not kept."""
    target, name = models
    calibrate(target, name, WORDS, nodes=6, temperatures=[0.0], max_new_tokens=TOKENS)
    tiny.save(tmp_path / "other", num_hidden_layers=3)
    other = load(tmp_path / "other")
    drafter: Any = make_drafter(name, other)
    assert (drafter.plan.paths(0.0), drafter.plan.shape.width) == ((), 1)
    with pytest.raises(UserError, match=r"calibrated for another target, .*target; run `foretoken calibrate`"):
        make_drafter(name, other, {"tree": "static"})
    calibrate(other, name, WORDS, nodes=2, temperatures=[1.0], max_new_tokens=TOKENS)
    assert set(store.read(tmp_path / "draft").trees) == {"1"}
    assert store.read(tmp_path / "draft").target == store.identity(other)
    with pytest.raises(UserError, match="none is calibrated"):
        make_drafter("draft_model", target, {"path": load(tmp_path / "draft"), "tree": "static"})


def test_another_methods_description_is_not_overwritten(models: tuple[Any, str], tmp_path: Path):
    target, name = models
    described = store.Saved("mtp", {"heads": 2}, store.identity(target), {"0": [[0]]})
    store.describe(tmp_path / "draft", described)
    before = (tmp_path / "draft" / store.DESCRIPTION).read_bytes()
    with pytest.raises(UserError, match="describes a mtp drafter, which the trees of draft_model would replace"):
        calibrate(target, name, WORDS, max_new_tokens=TOKENS)
    assert (tmp_path / "draft" / store.DESCRIPTION).read_bytes() == before
    drafter: Any = make_drafter(name, target)
    assert drafter.plan.paths(0.0) == ()
    with pytest.raises(UserError, match="is no folder; copy the drafter"):
        module.folder_of("draft_model:someone/model")


def test_the_size_that_pays():
    """Of all prefixes of the list of best paths, the one of most tokens per second, levels counted."""
    accuracy = torch.tensor([[0.6, 0.2, 0.1], [0.5, 0.2, 0.1], [0.4, 0.2, 0.1]], dtype=torch.float64)
    sizes: list[int] = []
    for steep, level, once in ((0.0, 0.0, 0.0), (0.2, 0.0, 0.0), (2.0, 0.0, 0.0), (9.0, 0.3, 0.1), (99.0, 1.0, 0.5)):
        cost = Costs((1, 40), (1.0, 1.0 + steep), level, once)
        paths, speed = paying_paths(accuracy, cost)
        rates: list[float] = []
        for n in range(1, 40):
            tried = best_paths(accuracy, n)
            height = max(len(p) for p in tried)
            seconds = once + float(cost.judging([1 + n])[0]) + (height - 1) * level
            rates.append(expected(accuracy, tried) / seconds)
        assert speed == pytest.approx(max(rates))
        assert paths == best_paths(accuracy, 1 + rates.index(max(rates)))
        sizes.append(len(paths))
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (39, 1)


def test_the_drafter_is_timed(models: tuple[Any, str]):
    target, name = models
    drafter: Any = make_drafter(name, target)
    found = timings(target, drafter, WORDS[:1], temperature=0.0, max_new_tokens=TOKENS, seed=0)
    assert found.level > 0
    assert found.once > 0


def test_the_command_says_what_it_chose(
    models: tuple[Any, str], monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
):
    _, name = models
    cost = Costs((1, 64), (1.0, 1.0))
    monkeypatch.setattr(module, "timings", lambda *args, **options: cost)
    (tmp_path / "asked.txt").write_text("1 2 3\n7 8\n")
    sizes: list[int] = []
    for nodes in (0, 4):
        run(
            str(tmp_path / "target"),
            name,
            prompts=tmp_path / "asked.txt",
            source="",
            limit=9,
            prompt_tokens=9,
            nodes=nodes,
            depth=2,
            temperatures=[0.0],
            max_new_tokens=TOKENS,
            seed=0,
            dtype=None,
            device=None,
        )
        said = " ".join(capsys.readouterr().out.split())
        sizes.append(len(store.read(tmp_path / "draft").trees["0"]))
        assert f"{sizes[-1]} nodes" in said
        assert ("times plain decoding's speed on this machine" in said) == (nodes == 0)
    assert sizes[0] > sizes[1] == 4


def test_what_cannot_be_measured_says_so():
    target = make("llama")
    with pytest.raises(UserError, match="give the probability of every guess"):
        accuracies(target, make_drafter("suffix", target), PROMPTS, temperature=0, max_new_tokens=9, seed=0)
    with pytest.raises(UserError, match="No output is 4 tokens long"):
        accuracies(target, drafter_of("medusa", target), PROMPTS, temperature=0, max_new_tokens=3, seed=0)
