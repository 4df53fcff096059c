"""Head by head and all at once give the same gradients, for every method."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from foretoken.drafters import configured, module_of
from foretoken.objective import IGNORED, Batch, Stage, predictions
from foretoken.target import UNNORMED, Target
from foretoken.training import backward
from foretoken.training.backward import backpropagate, leaf
from foretoken.training.learner import NEXT, Learner
from foretoken.training.recipe import Lora, Loss
from foretoken.training.trunk import Trunk
from tests.families import make

METHODS: list[tuple[str, dict[str, Any]]] = [
    *(
        ("mtp", {"heads": 3, "kind": kind, "unembedding": own})
        for kind in ("parallel", "causal", "anticausal", "linear")
        for own in ("shared", "own")
    ),
    ("medusa", {"heads": 2, "unembedding": "own"}),
    ("medusa", {"heads": 2, "layers": 2, "unembedding": "shared"}),
    ("blockwise", {"heads": 3}),
    ("weighted_heads", {"heads": 3, "states": "final"}),
    ("weighted_heads", {"heads": 3, "states": "weighted"}),
    ("deepseek_mtp", {"modules": 2, "guesses": 3}),
    ("deepseek_mtp", {"guesses": 3, "attention": "shared", "onward": "normed", "vocabulary": 50}),
    ("deepseek_mtp", {"guesses": 2, "vocabulary": 30, "enters": "raw"}),
    ("eagle", {"version": 1, "steps": 2}),
    ("eagle", {"steps": 3, "vocabulary": 30, "norm_output": True, "norm_features": True}),
]
EACH = pytest.mark.parametrize(
    ("method", "settings"), METHODS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)


def made(method: str, settings: dict[str, Any], family: str = "llama") -> tuple[Target, Any, Any]:
    """A tiny target in float64, the method's weights moved off their beginning, and the drafter."""
    target, module = make(family), module_of(method)
    heads = module.fresh(target, configured(module.Architecture, method, settings))
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))
    return target, heads, module.build(target, module.Config(path=heads))


def ragged(seed: int = 3) -> Batch:
    """Rows of several documents, with padding and tokens that are not to be learnt."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(80, (2, 12), generator=draw)
    document = torch.tensor([[0] * 7 + [1] * 5, [0] * 9 + [-1] * 3])
    return Batch(tokens, document, torch.rand(2, 12, generator=draw) < 0.7)


def labels(batch: Batch, offset: int) -> Tensor:
    """[B, T], one at a time."""
    B, T = batch.tokens.shape
    found = torch.full((B, T), IGNORED)
    for b in range(B):
        for i in range(T - offset):
            same = batch.document[b, i] == batch.document[b, i + offset] != -1
            if same and batch.learn[b, i + offset]:
                found[b, i] = batch.tokens[b, i + offset]
    return found


def scored(batch: Batch, stage: Stage) -> Tensor:
    """[B, T]: the row of the stage's output head that each label has, one at a time."""
    found = labels(batch, stage.offset)
    if stage.unembed is not None and stage.unembed.tokens is not None:
        known = stage.unembed.tokens.tolist()
        rows = [[known.index(t) if t in known else IGNORED for t in row] for row in found.tolist()]
        return torch.tensor(rows)
    return found


def joint_loss(target: Target, drafter: Any, batch: Batch, total: dict[str, int], next_token: float = 1.0) -> Tensor:
    """Every prediction's logits at the same time, summed into one loss."""
    layers = drafter.needs.features
    with target.watched(layers) as unnormed:
        out = target.decoder(input_ids=batch.tokens, output_hidden_states=True, use_cache=False)
    features = torch.cat([*unnormed, *(out.hidden_states[i] for i in layers if i != UNNORMED)], -1)

    def of(forest: Sequence[Stage], given: Tensor) -> Iterator[Tensor]:
        for stage in forest:
            output = stage.run(given)
            if stage.unembed is not None:
                logits = stage.unembed(stage.ready(output) if stage.ready else output)
                yield loss(logits, scored(batch, stage)) * stage.weight / total[stage.name]
            yield from of(stage.then, output)

    def loss(logits: Tensor, said: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), said.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    own = loss(target.unembed(out.last_hidden_state), labels(batch, 1)) * next_token / total[NEXT]
    return torch.stack([own, *of(drafter.stages(batch), features)]).sum()


def gradients(target: Target, heads: Any) -> dict[str, Tensor | None]:
    named = [*target.model.named_parameters(), *((f"heads.{n}", p) for n, p in heads.named_parameters())]
    found = {name: p.grad for name, p in named}
    for _, p in named:
        p.grad = None
    return found


def difference(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> float:
    """The largest of any gradient, over the largest gradient; infinite where only one side has any."""
    size = max(float(g.abs().max()) for g in theirs.values() if g is not None)
    worst = 0.0
    for name in theirs:
        a, b = ours[name], theirs[name]
        if (a is None) != (b is None):
            return float("inf")
        worst = max(worst, 0.0 if a is None or b is None else float((a - b).abs().max()) / size)
    return worst


@EACH
def test_head_by_head_gradients_are_the_joint_losss(method: str, settings: dict[str, Any]):
    target, heads, drafter = made(method, settings)
    learner, batch = Learner(Trunk(target, "joint", Lora()), drafter, Loss(next_token=0.7)), ragged()
    total = learner.counts([batch])
    assert total == {NEXT: int((labels(batch, 1) != IGNORED).sum())} | {
        s.name: int((scored(batch, s) != IGNORED).sum()) for s in predictions(drafter.stages(batch))
    }
    sums = learner.gradient(batch, total, True, nullcontext)
    ours = gradients(target, heads)
    value = joint_loss(target, drafter, batch, total, 0.7)
    value.backward()
    theirs = gradients(target, heads)
    assert sum(theirs[n] is not None for n in theirs) == len(theirs)  # everything learns
    assert difference(ours, theirs) < 1e-12
    weights = learner.weights(learner.forest(batch))
    assert float(sum(weights[n] * v / total[n] for n, v in sums.items())) == pytest.approx(value.item(), rel=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "granite", "phi"])
def test_so_they_are_with_tied_scaled_bounded_and_biased_output_heads(family: str):
    """gpt2 is tied, gemma2 tied and bounded, granite scaled, phi biased."""
    method, settings = ("medusa", {"heads": 2}) if family == "gpt2" else ("mtp", {"heads": 3, "kind": "causal"})
    target, heads, drafter = made(method, settings, family)
    for module in target.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    learner, batch = Learner(Trunk(target, "joint", Lora()), drafter, Loss()), ragged()
    total = learner.counts([batch])
    learner.gradient(batch, total, True, nullcontext)
    ours = gradients(target, heads)
    joint_loss(target, drafter, batch, total).backward()
    assert difference(ours, gradients(target, heads)) < 1e-12


@EACH
def test_in_frozen_mode_the_heads_have_the_same_gradients_and_the_target_none(method: str, settings: dict[str, Any]):
    target, heads, drafter = made(method, settings)
    batch = ragged()
    learner = Learner(Trunk(target, "frozen", Lora()), drafter, Loss())
    total = learner.counts([batch])
    learner.gradient(batch, total, True, nullcontext)
    ours = gradients(target, heads)
    target.model.requires_grad_()
    joint_loss(target, drafter, batch, total).backward()
    theirs = gradients(target, heads)
    mine = {name: g for name, g in theirs.items() if name.startswith("heads.")}
    assert all(ours[name] is None for name in theirs if name not in mine)
    if mine:
        assert difference({name: ours[name] for name in mine}, mine) < 1e-12


def broken_descend(fault: str) -> Callable[..., None]:
    """`backward.descend` with a mistake."""

    def descend(stage: Stage, given: Tensor, loss: backward.Loss) -> None:
        output = stage.run(given)
        held = leaf(output)
        if stage.unembed is not None:
            loss(stage, held if stage.ready is None or fault == "no norm" else stage.ready(held)).backward()
        early = held.grad.clone() if fault == "followers late" and held.grad is not None else None
        backpropagate(stage.then, held, loss)
        if fault != "no gradient to the trunk":
            output.backward(held.grad if early is None else early)

    return descend


@pytest.mark.parametrize("fault", ["no norm", "followers late", "no gradient to the trunk"])
def test_a_wrong_backward_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch):
    """Negative control: the comparison above tells each mistake from rounding."""
    monkeypatch.setattr(backward, "descend", broken_descend(fault))
    target, heads, drafter = made("mtp", {"heads": 3, "kind": "causal"})
    learner, batch = Learner(Trunk(target, "joint", Lora()), drafter, Loss()), ragged()
    total = learner.counts([batch])
    learner.gradient(batch, total, True, nullcontext)
    ours = gradients(target, heads)
    joint_loss(target, drafter, batch, total).backward()
    assert difference(ours, gradients(target, heads)) > 1e-3


def test_one_head_at_a_time_is_in_memory():
    """When a head runs, what the one before it computed is gone."""
    alive: list[weakref.ref[Tensor]] = []
    found: list[int] = []
    weight = torch.nn.Linear(4, 4)

    def run(states: Tensor) -> Tensor:
        found.append(sum(ref() is not None for ref in alive))
        output = weight(states).relu()
        alive.append(weakref.ref(output))
        return output

    target = make("llama")
    stages = [Stage(f"head {i}", i, 1.0, run, target.unembed) for i in range(2, 6)]
    features = leaf(torch.randn(2, 5, 4))
    backpropagate(stages, features, lambda stage, hidden: hidden.square().sum())
    assert found == [0, 0, 0, 0]
    assert features.grad is not None and bool(features.grad.any())


def test_a_head_whose_input_stands_still_costs_no_backward():
    """Frozen features that a head only slices collect no gradient; its own output head does."""
    target, heads, drafter = made("mtp", {"heads": 3, "kind": "anticausal", "unembedding": "own"})
    trunk = Trunk(target, "frozen", Lora())
    learner, batch = Learner(trunk, drafter, Loss()), ragged()
    leaves: list[Tensor] = []

    def spy(stage: Stage, hidden: Tensor) -> Tensor:
        leaves.append(hidden)
        return learner.value(stage, hidden, batch, shown)

    shown = trunk(batch.tokens, learner.layers, False)
    backpropagate(learner.forest(batch), leaf(shown.features, False), spy)
    assert not any(hidden.requires_grad for hidden in leaves)
    assert all(p.grad is not None for p in heads.parameters())
