"""The losses against all logits at once: values, gradients, numerics, and that no [N, V] tensor ever exists."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foretoken.errors import UserError
from foretoken.objective import IGNORED
from foretoken.training import losses
from foretoken.training.evaluate import judged
from foretoken.training.losses import cross_entropy, divergence
from foretoken.unembed import Unembedding

HERE = ["chunked"] + ["torch"] * hasattr(torch.nn, "LinearCrossEntropyOptions")
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "bias_scale": {"bias": True, "scale": 1.7},
    "softcap": {"softcap": 2.0},
    "everything": {"bias": True, "scale": 2.5, "softcap": 3.0},
}
V, H = 123, 17


def head(V=V, H=H, bias=False, seed=1, dtype=torch.float64, **how) -> Unembedding:
    made = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, H, generator=made, dtype=torch.float64).to(dtype).requires_grad_()
    given = torch.randn(V, generator=made, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return Unembedding(weight, given, **how)


def states(N, H=H, seed=2, dtype=torch.float64):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(N, H, generator=made, dtype=torch.float64).to(dtype).requires_grad_()


def labels_of(N, V=V, ignored=0.0, seed=3):
    made = torch.Generator().manual_seed(seed)
    labels = torch.randint(V, (N,), generator=made)
    return torch.where(torch.rand(N, generator=made) < ignored, IGNORED, labels)


def all_logits(hidden, unembed):
    """The obvious formula, in the inputs' own precision, with the softmax in float32 or more."""
    logits = hidden @ unembed.weight.T if unembed.bias is None else F.linear(hidden, unembed.weight, unembed.bias)
    logits = logits.to(losses.wide(logits.dtype)) * unembed.scale
    return logits if unembed.softcap is None else unembed.softcap * torch.tanh(logits / unembed.softcap)


def slow_cross_entropy(hidden, unembed, labels, implementation=""):
    return F.cross_entropy(all_logits(hidden, unembed), labels, reduction="sum", ignore_index=IGNORED)


def slow_divergence(hidden, unembed, teacher_hidden, teacher, keep, kind):
    log_q = all_logits(hidden, unembed).log_softmax(-1)
    log_p = all_logits(teacher_hidden, teacher).detach().log_softmax(-1)
    each = log_p.exp() * (log_p - log_q) if kind == "kl" else (log_p.exp() - log_q.exp()).abs() / 2
    return each.sum(-1)[keep].sum()


def gradients(value, hidden, unembed):
    """The value and the gradients of hidden, weight and bias, which are left without one."""
    value.backward()
    inputs = [x for x in (hidden, unembed.weight, unembed.bias) if x is not None]
    found = [x.grad for x in inputs]
    for x in inputs:
        x.grad = None
    return [value.detach(), *found]


def same(ours, truth, tolerance=1e-12):
    for a, b in zip(ours, truth, strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).abs().max() if a.numel() else 0.0) <= tolerance * max(1.0, float(b.abs().max()))


@pytest.fixture
def small(monkeypatch):
    """Chunks of ten rows, so that 252 rows are 26 chunks and 7 rows are less than one."""
    monkeypatch.setattr(losses, "BUDGET", 4 * V * 10)


@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("N", [1, 7, 252])
@pytest.mark.parametrize("how", HEADS)
@pytest.mark.parametrize("implementation", [*HERE, "auto"])
def test_cross_entropy_and_its_gradients_equal_those_of_all_logits(small, implementation, how, N, ignored):
    if implementation == "torch" and "softcap" in HEADS[how]:
        with pytest.raises(UserError, match="bounds no logits"):
            cross_entropy(states(N), head(**HEADS[how]), torch.zeros(N, dtype=torch.int64), "torch")
        return
    hidden, unembed, labels = states(N), head(**HEADS[how]), labels_of(N, ignored=ignored)
    ours = gradients(cross_entropy(hidden, unembed, labels, implementation), hidden, unembed)
    same(ours, gradients(slow_cross_entropy(hidden, unembed, labels), hidden, unembed))
    if ignored == 1.0:
        assert all(float(x.abs().sum()) == 0 for x in ours)


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("N", [1, 7, 252])
@pytest.mark.parametrize("how", HEADS)
@pytest.mark.parametrize("kind", ["kl", "tv"])
def test_divergence_and_its_gradients_equal_those_of_all_logits(small, kind, how, N, kept):
    hidden, unembed = states(N), head(**HEADS[how])
    seen, teacher = states(N, H=29, seed=4), head(H=29, seed=5, bias=True, softcap=4.0)
    keep = torch.rand(N, generator=torch.Generator().manual_seed(6)) < kept
    ours = gradients(divergence(hidden, unembed, seen, teacher, keep, kind), hidden, unembed)
    same(ours, gradients(slow_divergence(hidden, unembed, seen, teacher, keep, kind), hidden, unembed))
    assert seen.grad is None and teacher.weight.grad is None and teacher.bias.grad is None
    if not keep.any():
        assert all(float(x.abs().sum()) == 0 for x in ours)


@pytest.mark.parametrize("kind", ["kl", "tv"])
def test_divergence_from_a_teacher_that_shares_the_head_teaches_the_head_once(small, kind):
    hidden, seen, unembed, keep = states(25), states(25, seed=9), head(), torch.ones(25, dtype=torch.bool)
    ours = gradients(divergence(hidden, unembed, seen, unembed, keep, kind), hidden, unembed)
    same(ours, gradients(slow_divergence(hidden, unembed, seen, unembed, keep, kind), hidden, unembed))
    equal = gradients(divergence(hidden, unembed, hidden, unembed, keep, kind), hidden, unembed)
    assert all(float(x.abs().max()) < 1e-12 for x in equal)


@pytest.mark.parametrize("implementation", HERE)
def test_rows_that_are_ignored_may_hold_anything(small, implementation):
    hidden, unembed, labels = states(40), head(), labels_of(40, ignored=0.5)
    broken = torch.where((labels == IGNORED)[:, None], torch.nan, hidden.detach()).requires_grad_()
    ours = gradients(cross_entropy(broken, unembed, labels, implementation), broken, unembed)
    same(ours, gradients(slow_cross_entropy(hidden, unembed, labels), hidden, unembed))


@pytest.mark.parametrize("implementation", HERE)
def test_gradients_of_several_calls_add_up_and_reach_what_made_the_states(small, implementation):
    """Heads of one trunk under one output head, weighted: as training calls it."""
    trunk, unembed = states(50), head(bias=True)
    mixes = [states(H, seed=20 + i) for i in range(3)]
    labels = [labels_of(50, ignored=0.3, seed=30 + i) for i in range(3)]
    found = []
    for loss in (cross_entropy, slow_cross_entropy):
        for mix, label, weight in zip(mixes, labels, (1.0, 0.25, -2.0), strict=True):
            (weight * loss(trunk.tanh() @ mix, unembed, label, implementation)).backward()
        leaves = [trunk, unembed.weight, unembed.bias, *mixes]
        found.append([x.grad for x in leaves])
        for x in leaves:
            x.grad = None
    same(*found)


@pytest.mark.parametrize("frozen", ["weight", "bias", "hidden", "weight bias", "weight bias hidden"])
@pytest.mark.parametrize("implementation", HERE)
def test_what_is_frozen_gets_no_gradient_and_costs_no_product(small, implementation, frozen):
    hidden, unembed, labels = states(25), head(bias=True), labels_of(25)
    truth = gradients(slow_cross_entropy(hidden, unembed, labels), hidden, unembed)
    named = {"hidden": hidden, "weight": unembed.weight, "bias": unembed.bias}
    for name in frozen.split():
        named[name].requires_grad_(False)
    with Seen() as seen:
        value = cross_entropy(hidden, unembed, labels, implementation)
        assert value.requires_grad == (len(frozen.split()) < 3)
        if value.requires_grad:
            value.backward()
    for (name, x), gradient in zip(named.items(), truth[1:], strict=True):
        same([x.grad], [gradient]) if name not in frozen else None
        assert name not in frozen or x.grad is None
    if implementation == "chunked":
        assert seen.products == 3 * (3 - ("hidden" in frozen) - ("weight" in frozen))  # in each of 3 chunks


def test_without_gradients_only_the_loss_is_computed(small):
    hidden, unembed, labels = states(25), head(), labels_of(25)
    with torch.no_grad(), Seen() as seen:
        value = cross_entropy(hidden, unembed, labels)
    assert seen.products == 3 and not value.requires_grad
    same([value], [slow_cross_entropy(hidden, unembed, labels).detach()])


class Seen(TorchDispatchMode):
    """Counts the products of matrices, and the numbers of the largest tensor, of all operators within."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


WHOLE = {"N": 2048, "V": 1000}


def largest(loss) -> int:
    hidden, unembed = states(WHOLE["N"], dtype=torch.float32), head(V=WHOLE["V"], dtype=torch.float32, bias=True)
    with Seen() as seen:
        loss(hidden, unembed).backward()
    assert hidden.grad is not None and unembed.weight.grad is not None
    return seen.largest


def distil(hidden, unembed, kind, loss=divergence):
    seen, teacher = states(WHOLE["N"], dtype=torch.float32, seed=4), head(V=WHOLE["V"], dtype=torch.float32, seed=5)
    return loss(hidden, unembed, seen, teacher, torch.ones(WHOLE["N"], dtype=torch.bool), kind)


LABELS = labels_of(WHOLE["N"], WHOLE["V"])
LOSSES = {
    "chunked": lambda h, u: cross_entropy(h, u, LABELS, "chunked"),
    "kl": lambda h, u: distil(h, u, "kl"),
    "tv": lambda h, u: distil(h, u, "tv"),
}
SLOW = {
    "all logits": lambda h, u: slow_cross_entropy(h, u, LABELS),
    "all logits, kl": lambda h, u: distil(h, u, "kl", slow_divergence),
    "checkpointed": lambda h, u: torch.utils.checkpoint.checkpoint(
        slow_cross_entropy, h, u, LABELS, use_reentrant=False
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_no_tensor_holds_the_logits_of_all_rows(monkeypatch, name):
    monkeypatch.setattr(losses, "BUDGET", 4 * WHOLE["V"] * 50)
    assert largest(LOSSES[name]) <= max(50 * WHOLE["V"], WHOLE["N"] * H)


@pytest.mark.skipif("torch" not in HERE, reason="this PyTorch has no chunked cross entropy")
def test_pytorch_is_told_to_keep_to_the_budget(monkeypatch):
    """Its operator is opaque: the search above cannot see the tensors within."""
    monkeypatch.setattr(losses, "BUDGET", 4 * WHOLE["V"] * 50)
    told, original = [], F.linear_cross_entropy

    def listening(*args, options, **how):
        told.append(options.batch_chunk_size)
        return original(*args, options=options, **how)

    monkeypatch.setattr(F, "linear_cross_entropy", listening)
    assert largest(lambda h, u: cross_entropy(h, u, LABELS, "torch")) <= WHOLE["N"] * H
    assert told == [50]


@pytest.mark.parametrize("name", SLOW)
def test_the_search_for_large_tensors_finds_them(name):
    assert largest(SLOW[name]) == WHOLE["N"] * WHOLE["V"]


@pytest.mark.parametrize("kind", ["cross_entropy", "kl", "tv"])
def test_nothing_is_kept_after_the_backward(small, kind):
    hidden, unembed = states(252), head()
    loss = (
        cross_entropy(hidden, unembed, labels_of(252))
        if kind == "cross_entropy"
        else divergence(hidden, unembed, states(252, seed=4), head(seed=5), torch.ones(252, dtype=torch.bool), kind)
    )
    kept = [weakref.ref(x) for x in loss.grad_fn.grads if x is not None]
    assert len(kept) == 2
    loss.backward(retain_graph=True)
    hidden.grad = unembed.weight.grad = None
    gc.collect()
    assert loss.grad_fn.grads is None and all(x() is None for x in kept)
    with pytest.raises(RuntimeError, match="compute it again"):
        loss.backward()


def far(found, truth):
    return float((found.double() - truth.double()).norm())


@pytest.mark.parametrize("how", HEADS)
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights"])
@pytest.mark.parametrize("kind", [*HERE, "kl", "tv"])
def test_in_bfloat16_we_are_no_farther_from_the_truth_than_all_logits(small, kind, autocast, how):
    if kind == "torch" and "softcap" in HEADS[how]:
        pytest.skip("PyTorch's bounds no logits")
    dtype = torch.float32 if autocast else torch.bfloat16
    hidden, unembed = states(252, dtype=dtype), head(dtype=dtype, **HEADS[how])
    labels, keep = labels_of(252, ignored=0.3), torch.ones(252, dtype=torch.bool)
    seen, teacher = states(252, dtype=dtype, seed=4), head(dtype=dtype, seed=5)

    def run(loss, hidden, unembed, on):
        more = (labels, kind) if kind in HERE else (as_is(seen, hidden), converted(teacher, hidden), keep, kind)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            value = loss(hidden, unembed, *more)
        return gradients(value, hidden, unembed)

    fast, slow = (cross_entropy, slow_cross_entropy) if kind in HERE else (divergence, slow_divergence)
    exact = as_is(hidden, torch.empty(0, dtype=torch.float64))
    truth = run(slow, exact, converted(unembed, exact), False)
    ours, naive = run(fast, hidden, unembed, autocast), run(slow, hidden, unembed, autocast)
    for x, y, true in zip(ours, naive, truth, strict=True):
        assert x.dtype == (torch.float32 if x.dim() == 0 else dtype)
        if x.dim() == 0:  # of one number chance decides which is nearer
            assert far(x, true) <= far(y, true) + 5e-4 * float(true)
        elif kind != "tv":  # whose gradient jumps where p = q: chance again
            # a chunk's part of the weight's gradient is rounded, and with bfloat16 weights their float32 sum is again:
            # up to sqrt(2) times the error of one rounding
            assert far(x, true) <= 1.5 * far(y, true)


def as_is(x, like):
    return x.detach().to(like.dtype).requires_grad_()


def converted(unembed, like):
    bias = None if unembed.bias is None else as_is(unembed.bias, like)
    return replace(unembed, weight=as_is(unembed.weight, like), bias=bias)


def test_float64_stays_float64_under_autocast():
    hidden, unembed, labels = states(7), head(), labels_of(7)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(cross_entropy(hidden, unembed, labels), hidden, unembed)
    same(ours, gradients(slow_cross_entropy(hidden, unembed, labels), hidden, unembed))


def test_logits_of_any_size_give_finite_losses(small):
    """exp of them overflows, and the label's probability rounds to zero."""
    hidden, unembed, labels = states(25, dtype=torch.float32), head(dtype=torch.float32), labels_of(25)
    loud = replace(unembed, scale=1e4)
    ours = gradients(cross_entropy(hidden, loud, labels), hidden, loud)
    same(ours, gradients(slow_cross_entropy(hidden, loud, labels), hidden, loud), 1e-5)
    assert float(ours[0]) > 1e5
    other, keep = states(25, seed=4, dtype=torch.float32), torch.ones(25, dtype=torch.bool)
    ours = gradients(divergence(hidden, loud, other, loud, keep, "kl"), hidden, loud)
    same(ours, gradients(slow_divergence(hidden, loud, other, loud, keep, "kl"), hidden, loud), 1e-5)


@pytest.mark.parametrize("how", HEADS)
def test_ranks_and_losses_equal_those_of_sorted_logits(small, how):
    hidden, unembed, labels = states(252), head(**HEADS[how]), labels_of(252)
    labels[::3] = all_logits(hidden, unembed)[::3].argmax(-1)
    order = all_logits(hidden, unembed).argsort(-1, descending=True)
    places = [row.index(label) for row, label in zip(order.tolist(), labels.tolist(), strict=True)]
    with torch.no_grad():
        loss, rank = judged(hidden, unembed, labels)
        assert float(loss) == pytest.approx(float(slow_cross_entropy(hidden, unembed, labels)))
    assert rank.tolist() == places


def test_the_first_of_equal_logits_wins_and_nan_comes_last():
    unembed = Unembedding(torch.tensor([[1.0], [1.0], [0.0], [2.0]]))
    hidden = torch.tensor([[1.0], [1.0], [0.0], [torch.nan]])
    assert judged(hidden, unembed, torch.tensor([0, 1, 2, 3]))[1].tolist() == [1, 2, 2, 4]


@pytest.mark.parametrize(("budget", "N"), [(0, 3), (1, 1), (4 * V, 0), (4 * V * 3, 7), (1 << 40, 7)])
def test_chunks_cover_every_row_once_within_the_budget(monkeypatch, budget, N):
    monkeypatch.setattr(losses, "BUDGET", budget)
    found = losses.chunks(N, V)
    assert [row for at in found for row in range(at.start, at.stop)] == list(range(N))
    assert all(at.stop - at.start <= max(1, budget // (4 * V)) for at in found)


@pytest.mark.parametrize("name", ["liger", "cut"])
def test_optional_kernels_are_refused_where_they_cannot_run(monkeypatch, name):
    with pytest.raises(UserError, match=f"'{name}' needs a CUDA device and got cpu"):
        cross_entropy(states(7), head(), labels_of(7), name)


def test_what_cannot_be_is_refused():
    keep = torch.ones(7, dtype=torch.bool)
    with pytest.raises(UserError, match="did you mean 'chunked'"):
        cross_entropy(states(7), head(), labels_of(7), "chunk")
    with pytest.raises(UserError, match="did you mean 'kl'"):
        divergence(states(7), head(), states(7), head(), keep, "kll")
    with pytest.raises(UserError, match=r"The teacher has 124 tokens and the head 123.*vocabulary"):
        divergence(states(7), head(), states(7), head(V=124), keep, "kl")
