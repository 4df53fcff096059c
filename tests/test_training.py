"""Training by the loop: offsets, denominators, modes, measurements, and what is said when something is wrong."""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import foretoken
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.objective import IGNORED, Batch, Stage, predictions
from foretoken.training import learner as learner_module
from foretoken.training import loop
from foretoken.training.evaluate import Tally
from foretoken.training.learner import KEPT, NEXT, Learner
from foretoken.training.loop import Run
from foretoken.training.processes import Processes
from foretoken.training.recipe import Lora, Loss, Recipe
from foretoken.training.trunk import Trunk
from foretoken.unembed import Unembedding
from tests import tiny
from tests.test_backward import METHODS, labels, made, ragged
from tests.test_backward import difference as apart

COUNTS: list[tuple[str, dict[str, Any]]] = [
    ("mtp", {"heads": 4, "kind": "parallel"}),
    ("mtp", {"heads": 4, "kind": "causal"}),
    ("mtp", {"heads": 3, "kind": "linear", "unembedding": "own"}),
    ("medusa", {"heads": 3}),
    ("blockwise", {"heads": 4}),
    ("weighted_heads", {"heads": 4, "states": "weighted"}),
    ("weighted_heads", {"heads": 3, "states": "final"}),
    ("deepseek_mtp", {"modules": 2, "guesses": 2}),
    ("deepseek_mtp", {"guesses": 3, "attention": "shared"}),
    ("eagle", {"version": 1, "steps": 2}),
    ("eagle", {"steps": 3, "vocabulary": tiny.NUMBERS}),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts that count (counting.txt) and that walk (walking.txt), and a random target."""
    folder = tmp_path_factory.mktemp("training")
    tiny.counting(folder / "counting.txt")
    tiny.walking(folder / "walking.txt")
    tiny.save(folder / "target")
    return folder


@pytest.fixture(scope="module")
def counter(place: Path) -> Path:
    """A target that has learnt to count, by the loop and without a drafter."""
    folder = place / "counter"
    settings = tiny.scratch(
        place, drafter="none", out=folder, data__source=place / "counting.txt", steps=120, optimizer__lr=1e-2
    )
    out, found = tiny.trained(settings)
    assert found["next token/top1"] > 0.95
    assert "tokens per forward" not in found
    assert not (out / "drafter.json").exists()
    return out


def of(place: Path, name: str, **settings: Any) -> Recipe:
    """A short run on walking numbers from the random target, in a folder of its own."""
    base: dict[str, Any] = {"target": place / "target", "out": place / name, "data__source": place / "walking.txt"}
    return tiny.recipe(place, **base | settings)


def weights(folder: Path | str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def heads(folder: Path | str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "drafter.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, bool]:
    """By name, whether two tensors are equal, bit by bit."""
    assert one.keys() == other.keys()
    return {name: torch.equal(one[name], other[name]) for name in one}


# Offsets


@pytest.mark.parametrize(("method", "settings"), METHODS)
def test_the_label_of_each_prediction_lies_its_offset_ahead(method: str, settings: dict[str, Any]):
    """On x_t = t: head i of n sees t + i, guess k of the others t + k + 1 (reference/methods.md, table 0.3)."""
    tokens = torch.arange(20)[None].repeat(2, 1)
    batch = Batch(tokens, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool))
    _, _, drafter = made(method, settings)
    stages = predictions(drafter.stages(batch))
    shift = int(method in ("medusa", "deepseek_mtp", "eagle"))
    beyond = {s.name: int(s.name.split()[1]) + shift for s in stages}
    assert sorted(beyond.values()) == list(range(2, 2 + promised(method, settings)))
    for stage in stages:
        found = batch.labels(stage.offset)
        ahead = beyond[stage.name]
        assert bool((found[:, : 20 - ahead] == tokens[:, : 20 - ahead] + ahead).all())
        assert bool((found[:, 20 - ahead :] == IGNORED).all())


def promised(method: str, settings: dict[str, Any]) -> int:
    """How many tokens a drafter of this architecture guesses in training."""
    found = settings.get("guesses") or settings.get("steps") or settings["heads"]
    return found - (method in ("mtp", "blockwise", "weighted_heads"))


def decoded(out: Path, method: str, target: Path) -> None:
    """A trained drafter guesses every token of every draft, and the output is the target's own."""
    loaded = foretoken.load(target, dtype="float64", device="cpu", attention="sdpa")
    depth = len(predictions(make_drafter(f"{method}:{out}", loaded).stages(ragged())))  # pyright: ignore[reportAttributeAccessIssue]
    drafter = make_drafter(f"{method}:{out}", loaded, {"depth": depth, "width": 1})
    prompts = [[2, 3, 4, 5], [12, 13, 14]]
    found = foretoken.generate(loaded, prompts, drafter=drafter, max_new_tokens=1 + 5 * (depth + 1))
    plain = foretoken.generate(loaded, prompts, drafter="none", max_new_tokens=1 + 5 * (depth + 1))
    for output, reference, prompt in zip(found, plain, prompts, strict=True):
        assert output.token_ids == reference.token_ids
        assert output.token_ids == [(prompt[-1] + 1 + i) % tiny.NUMBERS for i in range(len(output.token_ids))]
        assert output.tokens_per_forward == depth + 1
        assert output.accepted_per_depth == [1.0] * depth


@pytest.mark.parametrize(
    ("method", "settings"), COUNTS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
def test_a_drafter_trained_on_counting_guesses_its_offsets(
    method: str, settings: dict[str, Any], place: Path, counter: Path
):
    """What ties the labels of training to the depths of decoding."""
    name = method + "-".join(map(str, settings.values()))
    run = of(
        place,
        name,
        target=counter,
        drafter=method,
        architecture=settings,
        data__source=place / "counting.txt",
        steps=100,
        optimizer__lr=1e-2,
    )
    out, found = tiny.trained(run)
    assert found["tokens per forward"] > 0.9 * (1 + promised(method, settings))
    decoded(out, method, counter)


@pytest.mark.parametrize(
    ("method", "architecture", "layers"),
    [
        ("mtp", {"heads": 3, "kind": "parallel"}, 2),
        ("mtp", {"heads": 3, "kind": "anticausal"}, 4),  # such heads are the target's own last layers
        ("deepseek_mtp", {"modules": 2, "guesses": 2}, 2),
        ("deepseek_mtp", {"guesses": 3, "attention": "shared", "vocabulary": 12}, 3),
    ],
)
def test_target_and_heads_trained_together_from_scratch_count(
    method: str, architecture: dict[str, Any], layers: int, place: Path
):
    """As users start: bfloat16 products, saved in bfloat16, loaded by name alone."""
    settings = tiny.scratch(
        place,
        drafter=method,
        out=place / "-".join(["scratch", method, *map(str, architecture.values())]),
        architecture=architecture,
        model=tiny.LLAMA | {"num_hidden_layers": 4},
        move_layers=True,
        data__source=place / "counting.txt",
        steps=90,
        optimizer__lr=1e-2,
        precision="bf16",
        save_dtype="",
    )
    out, _ = tiny.trained(settings)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.config.num_hidden_layers == layers
    loaded = foretoken.load(out, device="cpu")
    assert loaded.tokenizer is not None
    make_drafter(f"{method}:{out}", loaded)  # the fingerprint holds in bfloat16
    if "vocabulary" not in architecture:  # with one, some tokens cannot be guessed
        decoded(out, method, out)


# Denominators


def first_step(recipe: Recipe) -> tuple[dict[str, float], dict[str, Tensor | None]]:
    """The losses and gradients of a run's first step."""
    run = Run(recipe, Processes())
    found: dict[str, Tensor | None] = {}

    def capture(step: int) -> float:
        found.update({n: None if p.grad is None else p.grad.clone() for n, p in run.learnt.items()})
        return 0.0

    run.optimizers.step = capture
    losses, _ = run.advance()
    return losses, found


def agree(one: Recipe, other: Recipe) -> None:
    (a, mine), (b, theirs) = first_step(one), first_step(other)
    assert a == pytest.approx(b, rel=1e-10)
    assert len(a) == 4
    assert apart(mine, theirs) < 1e-10


@pytest.mark.parametrize("packed", [True, False])
def test_two_forwards_of_four_rows_are_one_of_eight(packed: bool, place: Path):
    shared: dict[str, Any] = {"mode": "joint", "data__packed": packed, "loss__keep_target": 0.3}
    shared["architecture"] = {"heads": 3}
    agree(of(place, "a", rows=8, **shared), of(place, "b", rows=4, accumulate=2, **shared))


def test_padding_changes_nothing(place: Path):
    """Documents of 30 tokens and fewer, in rows of 36 and of 60."""
    shared: dict[str, Any] = {"mode": "joint", "data__packed": False, "data__source": place / "short.txt"}
    shared["architecture"] = {"heads": 4}
    (place / "short.txt").write_text("<|endoftext|>".join(" ".join(map(str, range(n % 14))) for n in range(2, 30)))
    agree(of(place, "a", data__length=36, **shared), of(place, "b", data__length=60, **shared))


def test_only_completions_are_learnt_however_rows_are_grouped(place: Path):
    lines = ({"prompt": "1 2 3", "completion": " ".join(map(str, range(n % 9 + 1)))} for n in range(40))
    (place / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shared: dict[str, Any] = {"mode": "joint", "data__packed": False, "data__source": place / "chat.jsonl"}
    shared["architecture"] = {"heads": 4}
    agree(of(place, "a", rows=8, **shared), of(place, "b", rows=4, accumulate=2, **shared))
    run = Run(of(place, "a", rows=8, **shared), Processes())
    counts = run.learner.counts(run.batches(0))
    (batch,) = run.batches(0)
    assert counts == {
        name: int((labels(batch, int(name[-1]) if name != NEXT else 1) != IGNORED).sum()) for name in counts
    }
    assert counts[NEXT] == int((batch.document >= 0).sum()) - 8 * 3  # three tokens of each row are asked, not learnt


# Losses


@pytest.mark.parametrize("kind", ["kl", "tv"])
def test_distances_to_the_targets_law_are_taken_where_that_law_stands(kind: str):
    """Head i at row t against the target's law at row t + i - 1: both are of token t + i."""
    target, _, drafter = made("mtp", {"heads": 3, "kind": "causal"})
    learner, batch = Learner(Trunk(target, "frozen", Lora()), drafter, Loss(kind=kind)), ragged()
    found = learner.gradient(batch, learner.counts([batch]), True, no_autocast)
    with torch.no_grad():
        out = target.decoder(input_ids=batch.tokens, output_hidden_states=True, use_cache=False)
        p = target.unembed(out.last_hidden_state).log_softmax(-1)
        given = torch.cat([out.hidden_states[i] for i in drafter.needs.features], -1)
        (first,) = drafter.stages(batch)
        states = {first.name: first.run(given)}
        states[first.then[0].name] = first.then[0].run(states[first.name])
    for stage in predictions([first]):
        q = target.unembed(stage.ready(states[stage.name])).log_softmax(-1).detach()  # pyright: ignore[reportOptionalCall]
        value = 0.0
        for b, t in (labels(batch, stage.offset) != IGNORED).nonzero().tolist():
            law, guess = p[b, t + stage.offset - 1], q[b, t]
            value += float(
                (law.exp() * (law - guess)).sum() if kind == "kl" else (law.exp() - guess.exp()).abs().sum() / 2
            )
        assert float(found[stage.name]) == pytest.approx(value, rel=1e-10)


def no_autocast() -> Any:
    return torch.autocast("cpu", enabled=False)


def test_keeping_the_target_is_its_kl_to_what_it_was():
    """Value and gradient, against plain autograd, after the target has moved."""
    target, _, _ = made("medusa", {"heads": 1})
    trunk = Trunk(target, "joint", Lora(), remembers=True)
    learner, batch = Learner(trunk, None, Loss(next_token=0.0, keep_target=0.6)), ragged()
    total = learner.counts([batch])
    assert float(learner.gradient(batch, total, True, no_autocast)[KEPT]) == pytest.approx(0.0, abs=1e-10)
    with torch.no_grad():
        for parameter in target.model.parameters():
            parameter.mul_(1.05)
    target.model.zero_grad()
    value = learner.gradient(batch, total, True, no_autocast)[KEPT]
    ours = {n: p.grad for n, p in target.model.named_parameters()}
    target.model.zero_grad()
    with torch.no_grad():
        p = trunk.original.model(batch.tokens).logits.log_softmax(-1)
    q = target.model(batch.tokens).logits.log_softmax(-1)
    known = labels(batch, 1) != IGNORED
    reference = (p.exp() * (p - q)).sum(-1)[known].sum()
    (0.6 * reference / total[NEXT]).backward()
    assert float(value) == pytest.approx(reference.item(), rel=1e-10)
    assert apart(ours, {n: p.grad for n, p in target.model.named_parameters()}) < 1e-10


def test_the_distance_to_the_targets_own_state_is_taken_where_that_state_stands():
    """EAGLE's feature loss: smooth L1, a mean over the state, a sum over the rows that have a label."""
    target, _, drafter = made("eagle", {"version": 1})
    batch = ragged()
    trunk = Trunk(target, "frozen", Lora())
    near, plain = (Learner(trunk, drafter, Loss(near=weight)) for weight in (3.0, 0.0))
    (stage,) = drafter.stages(batch)
    shown = trunk(batch.tokens, near.layers, False)
    with torch.no_grad():
        hidden = stage.run(shown.features)
        extra = near.value(stage, hidden, batch, shown) - plain.value(stage, hidden, batch, shown)
    expected = 0.0
    for b, t in (labels(batch, 2) != IGNORED).nonzero().tolist():
        away = (hidden[b, t] - shown.final[b, t + 1]).abs()
        expected += 3.0 * float(torch.where(away < 1, away**2 / 2, away - 0.5).mean())
    assert float(extra) == pytest.approx(expected, rel=1e-9)


def test_noise_moves_the_features_within_its_bound_and_never_in_measurements():
    target, _, drafter = made("eagle", {"version": 1})
    learner = Learner(Trunk(target, "frozen", Lora()), drafter, Loss(noise=0.1))
    features = torch.zeros(4, 500)
    moved = learner.noisy(features)
    assert 0.09 < float(moved.abs().max()) <= 0.1
    assert abs(float(moved.mean())) < 0.01
    tallies = [learner.measure([ragged()], Tally(NEXT), nullcontext).vector() for _ in range(2)]
    assert tallies[0] == tallies[1]
    assert torch.equal(Learner(learner.trunk, drafter, Loss()).noisy(features), features)


def test_a_draft_vocabulary_is_the_texts_most_frequent_tokens(place: Path):
    """Chosen from the training text, saved with the weights, kept when the run goes on, whole after rounding."""
    text = place / "some.txt"
    text.write_text("\n".join(["3 1 4 1 5 9 2 6 5 3 5 1 1 5 3"] * 40))
    settings: dict[str, Any] = {"drafter": "eagle", "architecture": {"vocabulary": 4}, "data__source": text, "steps": 2}
    out, _ = tiny.trained(of(place, "vocabulary", save_dtype="bfloat16", **settings))
    tokenizer = AutoTokenizer.from_pretrained(place / "target")
    stored = heads(out)
    chosen = tokenizer.convert_ids_to_tokens(stored["vocabulary"].tolist())
    assert {"1", "5", "3"} < set(chosen)
    assert stored["vocabulary"].dtype == torch.int64
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    again, _ = tiny.trained(
        of(place, "vocabulary again", resume_from=out, **settings | {"data__source": place / "walking.txt"})
    )
    assert torch.equal(heads(again)["vocabulary"], stored["vocabulary"])


def test_tokens_outside_a_draft_vocabulary_count_as_wrong():
    unembed = Unembedding(torch.eye(3), tokens=torch.tensor([2, 5, 6]))
    batch = Batch(
        torch.tensor([[0, 5, 6, 7]]), torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.bool)
    )
    stage = Stage("guess 1", 1, 1.0, lambda x: x, unembed)
    tally = Tally(NEXT)
    tally.see(stage, torch.tensor([[[0.0, 9, 0], [0, 0, 9], [9, 0, 0], [9, 0, 0]]]), batch)
    found = tally.result([*tally.vector()[:-1], 0.0])
    assert found["guess 1/top1"] == found["guess 1/top5"] == pytest.approx(2 / 3)


def test_a_prediction_without_weight_is_not_learnt(place: Path):
    shared: dict[str, Any] = {"architecture": {"heads": 4}, "optimizer__weight_decay": 0.0}
    out, _ = tiny.trained(of(place, "weights", loss__weights=[1, 0, 2], **shared))
    none, _ = tiny.trained(of(place, "none", loss__weights=[0, 0, 0], **shared))
    moved = {n: not equal for n, equal in same(heads(out), heads(none)).items()}
    assert {n.split(".")[1] for n, m in moved.items() if m} == {"0", "2"}
    assert all(m for n, m in moved.items() if n.split(".")[1] != "1")


# Modes


def test_a_frozen_target_is_not_touched(place: Path):
    before = weights(place / "target")
    run = Run(of(place, "frozen", optimizer__weight_decay=0.5), Processes())
    kept = {n: p.clone() for n, p in run.setup.trunk.target.model.state_dict().items()}
    start = {n: p.detach().clone() for n, p in run.learnt.items()}
    for _ in range(3):
        run.advance()
    assert all(same(kept, dict(run.setup.trunk.target.model.state_dict())).values())
    assert not any(torch.equal(start[n], p) for n, p in run.learnt.items())
    assert all(n.startswith("heads.") for n in start)
    run.finish()
    assert not (place / "frozen" / "model.safetensors").exists()
    assert all(same(before, weights(place / "target")).values())


def test_a_frozen_target_stays_in_the_precision_it_came_in(place: Path):
    """With products in bfloat16; its heads learn in float32 and are saved as the target was."""
    half = tiny.save(place / "half", torch.bfloat16)
    settings = of(place, "frozen-half", target=half, precision="bf16", save_dtype="")
    run = Run(settings, Processes())
    assert run.setup.trunk.target.dtype == torch.bfloat16
    assert {p.dtype for p in run.learnt.values()} == {torch.float32}
    out, _ = tiny.trained(settings)
    assert {t.dtype for t in heads(out).values()} == {torch.bfloat16}
    make_drafter(f"mtp:{out}", foretoken.load(half, device="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_joint_target_learns_and_is_saved_in_the_precision_it_came_in(dtype: torch.dtype, place: Path):
    source = tiny.save(place / f"source-{dtype}", dtype)
    out, _ = tiny.trained(
        of(place, f"joint-{dtype}", target=source, mode="joint", save_dtype="", precision="bf16", optimizer__lr=0.05)
    )
    assert {t.dtype for t in weights(out).values()} == {dtype}
    assert not any(same(weights(source), weights(out)).values())  # every layer, norm, embedding and the output head
    target = foretoken.load(out, device="cpu")
    make_drafter(f"mtp:{out}", target)
    with pytest.raises(UserError, match="other weights than this target's"):
        make_drafter(f"mtp:{out}", foretoken.load(source, device="cpu"))
    assert json.loads((out / "drafter.json").read_text())["target"]["name"] == out.name


def test_adapters_learn_beside_weights_that_do_not(place: Path):
    """LoRA: the target's own weights stand still until the end, and the merged model says what the adapted one said."""
    settings = of(place, "lora", mode="lora", lora__rank=4, lora__dropout=0.2, steps=8, optimizer__lr=0.02)
    run = Run(settings, Processes())
    model = run.setup.trunk.target.model
    base = {n: p.clone() for n, p in model.state_dict().items() if "lora" not in n}
    for _ in range(4):
        run.advance()
    assert all(torch.equal(base[n], p) for n, p in model.state_dict().items() if "lora" not in n)
    assert any(bool(p.any()) for n, p in model.state_dict().items() if "lora_B" in n)
    tokens = ragged().tokens % tiny.NUMBERS
    model.eval()
    adapted = model(tokens).logits.detach()
    before, _ = run.setup.trunk.before(tokens)
    plain = AutoModelForCausalLM.from_pretrained(place / "target", dtype=torch.float64)
    torch.testing.assert_close(run.setup.trunk.target.unembed(before), plain(tokens).logits, rtol=1e-9, atol=1e-9)
    assert (adapted - plain(tokens).logits).abs().max().item() > 1e-3
    run.finish()
    saved = AutoModelForCausalLM.from_pretrained(place / "lora", dtype=torch.float64)
    torch.testing.assert_close(saved(tokens).logits, adapted, rtol=1e-9, atol=1e-9)
    make_drafter(f"mtp:{place / 'lora'}", foretoken.load(place / "lora", device="cpu"))


def test_dropout_acts_where_the_target_learns_and_nowhere_else(place: Path):
    """The same at the same step of every run; off where heads only read, and in measurements."""
    found: dict[float, list[dict[str, float]]] = {}
    for dropout in (0.0, 0.5, 0.5):
        settings = of(
            place, "dropout", mode="lora", lora__dropout=dropout, optimizer__heads_first=1, optimizer__lr=0.02
        )
        run = Run(settings, Processes())
        losses = [run.advance()[0] for _ in range(4)]
        assert found.setdefault(dropout, losses) == losses
        measured = run.held_out()
        torch.manual_seed(1)
        assert run.held_out() == measured
    assert found[0.0][0] == found[0.5][0]  # only heads learn
    assert found[0.0][3] != found[0.5][3]


def test_keeping_the_target_holds_it_back(place: Path):
    """The KL to what the target was, after as many steps, with and without the weight; with adapters too."""
    for mode in ("joint", "lora"):
        found: list[float] = []
        for weight in (1e-9, 30.0):
            run = Run(of(place, "kept", mode=mode, loss__keep_target=weight, steps=30, optimizer__lr=0.01), Processes())
            losses = [run.advance()[0] for _ in range(8)]
            assert losses[0][KEPT] == pytest.approx(0.0, abs=1e-9)
            found.append(losses[-1][KEPT])
        assert 0 <= found[1] < 0.3 * found[0]


def test_heads_learn_first_then_the_target_with_a_rise_of_its_own(place: Path):
    settings = of(place, "stages", mode="joint", steps=9, optimizer__heads_first=4, optimizer__warmup=3)
    run = Run(settings, Processes())
    start = {n: p.detach().clone() for n, p in run.learnt.items()}
    for _ in range(4):
        losses, _ = run.advance()
        assert NEXT not in losses
    unmoved = {n for n, p in run.learnt.items() if torch.equal(start[n], p)}
    assert unmoved == {n for n in start if n.startswith("target.")}
    middle = {n: p.detach().clone() for n, p in run.learnt.items()}
    losses, _ = run.advance()
    assert NEXT in losses
    assert not any(torch.equal(middle[n], p) for n, p in run.learnt.items())
    rate = {g["late"]: g["lr"] for o in run.optimizers.all for g in o.param_groups}
    assert rate[True] == pytest.approx(settings.optimizer.lr / 3)  # the first of three steps of its rise
    assert rate[False] > 0.5 * settings.optimizer.lr
    moments = run.optimizers.all[0].state[dict(run.learnt)["target.model.norm.weight"]]
    assert float(moments["step"]) == 1.0  # nothing was gathered while it stood still


def test_the_trunks_rate_is_a_share_of_the_heads(place: Path):
    """The first step of AdamW moves every weight by its learning rate."""
    settings = of(
        place, "ratio", mode="joint", optimizer__trunk_ratio=0.1, optimizer__weight_decay=0.0, optimizer__warmup=0
    )
    run = Run(settings, Processes())
    start = {n: p.detach().clone() for n, p in run.learnt.items()}
    run.advance()
    for part, rate in (("heads.", 1.0), ("target.", 0.1)):
        moved = [(p - start[n]).abs().max().item() for n, p in run.learnt.items() if n.startswith(part)]
        assert moved == pytest.approx([rate * settings.optimizer.lr] * len(moved), rel=1e-3)


def test_muon_takes_the_matrices_and_adamw_the_rest(place: Path):
    run = Run(of(place, "muon", mode="joint", optimizer__name="muon"), Processes())
    adamw, muon = run.optimizers.all
    names = {id(p): n for n, p in run.learnt.items()}
    by_muon = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    by_adamw = {names[id(p)] for g in adamw.param_groups for p in g["params"]}
    assert by_muon | by_adamw == set(run.learnt)
    assert by_muon == {n for n in run.learnt if "proj" in n}
    decayed = {names[id(p)] for g in adamw.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {"target.model.embed_tokens.weight", "target.lm_head.weight"}
    before = [run.advance()[0][NEXT] for _ in range(6)]
    assert before[-1] < before[0]


# What is measured


def test_what_is_held_out_is_counted_as_one_would_by_hand(place: Path):
    """Loss, top-1, top-5 and tokens per forward, against whole logits and a loop over rows."""
    settings = of(place, "measured", mode="joint", architecture={"heads": 3}, evaluate=6, rows=4, optimizer__lr=0.03)
    run = Run(settings, Processes())
    for _ in range(6):
        run.advance()
    found = run.held_out()
    assert run.setup.held_out is not None
    batches = [b for b, _ in zip(run.setup.held_out.in_order(4, 24), range(2), strict=False)]
    wrong: dict[str, list[float]] = {}
    chains: list[int] = []
    for batch in batches:
        logits = predicted(run.learner, batch)
        for name, (offset, values) in logits.items():
            for b, t in (labels(batch, offset) != IGNORED).nonzero().tolist():
                law, label = values[b, t].log_softmax(-1), int(batch.tokens[b, t + offset])
                order = law.argsort(descending=True).tolist()
                wrong.setdefault(f"{name}/loss", []).append(-float(law[label]))
                wrong.setdefault(f"{name}/top1", []).append(float(order[0] == label))
                wrong.setdefault(f"{name}/top5", []).append(float(label in order[:5]))
        for b, t in (labels(batch, 2) != IGNORED).logical_and(labels(batch, 3) != IGNORED).nonzero().tolist():
            right = [int(logits[f"head {i}"][1][b, t].argmax()) == int(batch.tokens[b, t + i]) for i in (2, 3)]
            chains.append(1 + right[0] + (right[0] and right[1]))
    expected = {name: sum(v) / len(v) for name, v in wrong.items()} | {"tokens per forward": sum(chains) / len(chains)}
    assert found == pytest.approx(expected, rel=1e-9)
    assert 0 < found["head 2/top1"] < found["head 2/top5"] < 1


def predicted(learner: Learner, batch: Batch) -> dict[str, tuple[int, Tensor]]:
    """Each prediction's offset and logits [B, T, V]."""
    with torch.no_grad():
        out = learner.trunk.target.decoder(input_ids=batch.tokens, output_hidden_states=True, use_cache=False)
        found = {NEXT: (1, learner.trunk.target.unembed(out.last_hidden_state))}
        for stage in learner.forest(batch):
            hidden = stage.run(torch.cat([out.hidden_states[i] for i in learner.layers], -1))
            assert stage.unembed is not None
            found[stage.name] = (stage.offset, stage.unembed(stage.ready(hidden) if stage.ready else hidden))
    return found


def test_of_equal_logits_the_first_is_the_guess():
    """As argmax decides when decoding: a rank that counts no ties would promise more."""
    target, _, _ = made("medusa", {"heads": 1})
    flat = foretoken.unembed.Unembedding(torch.zeros(4, 2))
    tally = Tally(NEXT)
    tokens = torch.tensor([[0, 0, 1, 2, 3]])
    batch = Batch(tokens, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool))
    tally.see(Stage("head 2", 1, 1.0, lambda x: x, flat), torch.ones(1, 5, 2), batch)
    assert tally.result(tally.vector())["head 2/top1"] == 0.25
    assert target.vocab == 80


def test_every_step_is_reported_and_accuracy_now_and_then(place: Path):
    settings = of(
        place,
        "reported",
        mode="joint",
        architecture={"heads": 3},
        steps=6,
        log_every=4,
        evaluate_every=3,
        tensorboard=True,
    )
    out, found = tiny.trained(settings)
    rows = tiny.rows(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all({"head 2", "head 3", NEXT, "gradient", "lr"} <= row.keys() for row in rows)
    assert [i for i, row in enumerate(rows, 1) if "head 2/top1" in row and "tokens per forward" in row] == [4, 6]
    assert [i for i, row in enumerate(rows, 1) if "held out head 3/loss" in row] == [3, 6]
    assert rows[-1]["held out head 3/loss"] == found["head 3/loss"]
    assert rows[1]["lr"] == settings.optimizer.lr
    facts = json.loads((out / "drafter.json").read_text())["training"]
    assert facts["held_out"] == found
    assert facts["recipe"]["steps"] == 6
    assert [json.loads(line)["tokens/s"] > 0 for line in (out / "metrics.jsonl").read_text().splitlines()] == [True] * 6
    events = [p for p in out.rglob("events.out.tfevents.*") if p.stat().st_size > 500]
    assert events
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(events[0].parent))
    board.Reload()
    assert [e.value for e in board.Scalars("head 2")] == pytest.approx([row["head 2"] for row in rows], rel=1e-6)


def test_accuracy_in_training_is_of_the_weights_before_the_step(place: Path):
    """It comes from the same forward as the gradient, so it costs no forward of its own."""
    run = Run(of(place, "same", architecture={"heads": 3}), Processes())
    (batch,) = run.batches(0)
    expected = run.measured(run.learner.measure([batch], Tally(NEXT), run.autocast))
    forwards: list[int] = []
    run.setup.trunk.target.decoder.layers[0].register_forward_hook(  # pyright: ignore
        lambda *_: forwards.append(1)
    )
    tally = Tally(NEXT)
    losses, _ = run.advance(tally)
    assert len(forwards) == 1
    found = run.measured(tally)
    assert found == pytest.approx({k: v for k, v in expected.items() if not k.startswith(NEXT)}, rel=1e-9)
    assert losses == pytest.approx({n: expected[f"{n}/loss"] for n in losses}, rel=1e-9)


# What goes wrong


def faulty(when: int, name: str, by: float, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`Learner.value`, whose prediction `name` is multiplied by `by` from its call `when` on."""
    calls: list[str] = []

    def value(self: Learner, stage: Stage, hidden: Tensor, batch: Batch, shown: Any) -> Tensor:
        calls.append(stage.name)
        found = real(self, stage, hidden, batch, shown)
        return found * by if stage.name == name and calls.count(name) >= when else found

    return value


@pytest.mark.parametrize(("by", "says"), [(math.nan, "is nan"), (math.inf, "is inf"), (30.0, "grew from")])
def test_a_loss_that_is_lost_ends_the_run_and_keeps_what_was_good(
    by: float, says: str, place: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = of(place, f"lost-{by}", architecture={"heads": 4}, steps=12, save_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "value", faulty(5, "head 3", by, Learner.value))
        with pytest.raises(UserError, match=rf"^The loss of head 3 {says}[^\n]* at step \d+; [^\n]*\.$") as error:
            tiny.trained(settings)
    kept = sorted(p.name for p in (place / f"lost-{by}" / "checkpoints").iterdir())
    assert kept[-1] in str(error.value)
    if not math.isfinite(by):
        assert kept == ["step-00000002", "step-00000004"]
    out, _ = tiny.trained(settings)  # goes on from there, without the fault
    rows = tiny.rows(out)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(math.isfinite(v) for row in rows for v in row.values())
    other, _ = tiny.trained(of(place, f"lost-{by}-never", architecture={"heads": 4}, steps=12, save_every=2))
    assert rows == tiny.rows(other)


def test_weights_that_are_lost_are_not_saved(place: Path):
    run = Run(of(place, "infinite", architecture={"heads": 3}), Processes())
    run.save()
    with torch.no_grad():
        next(iter(run.learnt.values()))[0] = math.inf
    with pytest.raises(UserError, match=r"^The weights heads\.layers\.0\.\S+ are no longer finite at step 0; "):
        run.save()
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-00000000"]


def test_a_gradient_that_is_lost_changes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run(of(place, "gradient", architecture={"heads": 3}), Processes())
    start = {n: p.detach().clone() for n, p in run.learnt.items()}
    real = Processes.reduce

    def reduce(self: Processes, parameters: Any) -> None:
        real(self, parameters)
        parameters[3].grad[0] = math.nan

    monkeypatch.setattr(Processes, "reduce", reduce)
    with pytest.raises(UserError, match=r"^The gradient's norm is nan at step 0; there was no checkpoint yet: "):
        run.advance()
    assert all(torch.equal(start[n], p) for n, p in run.learnt.items())


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("no text", {"data__source": "EMPTY"}, "holds no text"),
    ("no such text", {"data__source": "nowhere/*.txt"}, "no file 'nowhere/\\*.txt'"),
    ("rows too long", {"data__length": 5000}, "tokens and a row 5000"),
    ("no target", {"target": "./nowhere"}, "'./nowhere' is no model"),
    ("no such drafter", {"drafter": "mpt"}, "'mpt' is no drafter.*did you mean 'mtp'"),
    ("nothing to train", {"drafter": "suffix"}, "suffix has nothing to train"),
    ("no such architecture", {"architecture": {"head": 3}}, "'head' is no setting of 'mtp'.*did you mean 'heads'"),
    (
        "too many heads",
        {"architecture": {"heads": 4, "kind": "anticausal"}},
        "4 anticausal heads are the target's last",
    ),
    ("nothing learns", {"architecture": {"heads": 2, "kind": "anticausal"}}, "nothing learns; set mode=joint"),
    ("weights", {"loss__weights": [1.0]}, "loss.weights has 1 numbers and the drafter 3 predictions"),
    ("implementation", {"loss__implementation": "fast"}, "'fast' is no implementation of cross entropy"),
    ("layers to adapt", {"mode": "lora", "lora__modules": "nothing"}, "peft finds no layers 'nothing'"),
    ("no drafter to go on from", {"resume_from": "nowhere"}, "'nowhere' holds no drafter.json"),
    ("out", {"out": "/dev/null/x"}, "'/dev/null/x' cannot be written"),
    ("no out", {"out": ""}, "names no folder to write; set out=PATH"),
]


@pytest.mark.parametrize(("settings", "says"), [(s, m) for _, s, m in REFUSED], ids=[n for n, _, _ in REFUSED])
def test_what_cannot_be_trained_is_refused_in_one_sentence(settings: dict[str, Any], says: str, place: Path):
    (place / "empty.txt").write_text("\n")
    if settings.get("data__source") == "EMPTY":
        settings = settings | {"data__source": place / "empty.txt"}
    with pytest.raises(UserError, match=says) as error:
        tiny.trained(of(place, "refused", **settings))
    assert "\n" not in str(error.value)
    assert str(error.value).endswith((".", "?"))


def test_a_tokenizer_of_another_model_is_refused(place: Path):
    small = tiny.save(place / "small", vocab_size=9)
    with pytest.raises(UserError, match="The tokenizer has the token '<end>' of id 16 and the model 9 tokens"):
        tiny.trained(of(place, "refused", target=small))


def test_heads_of_another_model_are_not_gone_on_from(place: Path):
    out, _ = tiny.trained(of(place, "first", architecture={"heads": 3}))
    wide = tiny.save(place / "wide", hidden_size=64)
    other = tiny.save(place / "other", initializer_range=0.5)
    again: dict[str, Any] = {"resume_from": out, "out": place / "second"}
    for change, says in (
        ({"target": wide}, "of hidden size 32 and this one has 64"),
        ({"target": other}, "other weights than this target's"),
        ({"drafter": "medusa"}, "holds a mtp drafter, not medusa"),
        ({"architecture": {"heads": 4}}, "has heads = 3 and the recipe says 4"),
    ):
        with pytest.raises(UserError, match=says):
            tiny.trained(of(place, "second", **again | change))
    run = Run(of(place, "second", **again), Processes())
    assert all(torch.equal(heads(out)[n.removeprefix("heads.")], p) for n, p in run.learnt.items())
    Run(of(place, "second", **again | {"target": other, "other_target": True}), Processes())


def test_scratch_says_what_it_needs(place: Path):
    for change, says in (
        ({"model": {}}, "needs model.model_type"),
        ({"model": {"model_type": "lama"}}, "transformers makes no model"),
        ({"model": tiny.LLAMA, "move_layers": True, "architecture": {"heads": 4}}, "2 layers and its heads take 3"),
        ({"tokenizer": "./nowhere"}, "'./nowhere' holds no tokenizer"),
        ({"tokenizer": "20"}, "A vocabulary of 20 cannot spell every text"),
    ):
        given: dict[str, Any] = {"mode": "scratch", "model": tiny.LLAMA, "target": "", "tokenizer": "300"} | change
        with pytest.raises(UserError, match=says):
            tiny.trained(of(place, "from-scratch", **given))


def test_a_tokenizer_is_made_once_and_saved_with_the_model(place: Path):
    given: dict[str, Any] = {"mode": "scratch", "model": tiny.LLAMA, "target": "", "tokenizer": "300"}
    out, _ = tiny.trained(of(place, "own-words", architecture={"heads": 2}, steps=2, **given))
    target = foretoken.load(out, device="cpu")
    assert target.tokenizer is not None
    assert target.vocab == len(target.tokenizer) <= 300
    assert target.tokenizer.decode(target.tokenizer("12 13 14")["input_ids"]) == "12 13 14"


def test_the_command_prints_a_table(place: Path, capsys: pytest.CaptureFixture[str]):
    from foretoken.training.recipe import written

    settings = of(place, "printed", architecture={"heads": 3}, steps=2)
    (place / "recipe.yaml").write_text(written(settings))
    loop.run(place / "recipe.yaml", ["steps=3", "optimizer.lr=1e-3"])
    shown = capsys.readouterr().out
    for name in (NEXT, "head 2", "head 3", "top-1", "top-5", "tokens per forward"):
        assert name in shown
    assert f"Written to {place / 'printed'}" in shown
    assert tiny.rows(place / "printed")[-1]["step"] == 3
    assert learner_module.NEXT == NEXT
