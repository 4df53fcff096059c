"""The operators of `cpu/kernels.cpp` against obvious references in torch."""

import shutil
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from foretoken import kernels
from foretoken.errors import UserError
from foretoken.noise import Noise
from foretoken.sampling import Scores
from foretoken.tree import chain, tree

ops: Any = torch.ops.foretoken
DTYPES = {torch.float32: 2e-5, torch.float64: 1e-13, torch.bfloat16: 2e-2}
"""What rounding may do to sums of numbers around 1."""
CHUNK = 1024


@pytest.fixture(autouse=True, scope="module")
def built() -> None:
    kernels.load_kernels()


def numbers(*size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# pack and linear


def packed_of(*weights: Tensor) -> Tensor:
    """Weights packed, one below the other."""
    packed = weights[0].new_full(kernels.packed_shape(weights), nan)
    ops.pack(packed, weights)
    return packed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (5, 7), (31, 33), (64, 32), (130, 65), (257, 100)])
def test_a_linear_layer_is_a_product(inputs: int, outputs: int, dtype: torch.dtype):
    """In every count of rows, with and without bias, to the last bit whatever the other rows."""
    weight, bias = numbers(outputs, inputs, dtype=dtype), numbers(outputs, dtype=dtype, seed=1)
    packed = packed_of(weight)
    x = numbers(70, inputs, dtype=dtype, seed=2)
    whole, plain = ops.linear(x, packed, bias, outputs), ops.linear(x, packed, None, outputs)
    want = functional.linear(x.double(), weight.double(), bias.double())
    assert (whole.double() - want).abs().max() <= DTYPES[dtype] * want.abs().max().clamp(min=1)
    assert (plain.double() - want + bias.double()).abs().max() <= DTYPES[dtype] * want.abs().max().clamp(min=1)
    for rows in range(1, 71):
        assert torch.equal(ops.linear(x[:rows], packed, bias, outputs), whole[:rows])
    assert torch.equal(ops.linear(x.view(7, 2, 5, -1), packed, bias, outputs), whole.view(7, 2, 5, -1))
    strided = torch.stack([x, -x], -1)[..., 0]
    assert torch.equal(ops.linear(strided, packed, bias, outputs), whole)


def test_a_weight_packed_for_other_inputs_is_refused():
    packed = packed_of(numbers(40, 16, dtype=torch.float32))
    x = numbers(2, 16, dtype=torch.float32)
    for wrong, outputs in ((numbers(2, 17, dtype=torch.float32), 40), (x, 65), (x.double(), 40)):
        with pytest.raises(RuntimeError, match="a weight packed for other inputs"):
            ops.linear(wrong, packed, None, outputs)
    with pytest.raises(RuntimeError, match="take float32, float64 and bfloat16, not Half"):
        packed_of(numbers(4, 4, dtype=torch.float16))


def test_weights_one_below_the_other_are_packed_as_one():
    """Wherever their rows begin, and turned ones where they lie."""
    for dtype in DTYPES:
        first, turned, last = (numbers(*size, dtype=dtype) for size in ((7, 33), (33, 40), (5, 33)))
        parts = first, turned.t(), last
        assert torch.equal(packed_of(*parts), packed_of(torch.cat(parts)))
    for wrong in (numbers(4, 6), numbers(4, 5).float()):
        with pytest.raises(RuntimeError, match="weights of several types or widths"):
            packed_of(numbers(4, 5), wrong)
    with pytest.raises(RuntimeError, match="a place of other sizes than the weights packed"):
        ops.pack(torch.empty(1, 5, 16, 1, dtype=torch.float64), [numbers(17, 5)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_room_is_memory_in_large_pages(dtype: torch.dtype):
    for values in (1, 1000, 3 << 20):
        room = ops.room(torch.empty(0, dtype=dtype), values)
        assert room.shape == (values,) and room.dtype == dtype
        assert room.data_ptr() % (2 << 20) == 0
        assert room.fill_(3).sum() > 0


# write


def test_write_puts_nodes_into_their_slots():
    """Whatever the strides of either side, and nothing else changes."""
    keys, values = numbers(2, 5, 3, 8).transpose(1, 2), numbers(2, 3, 5, 6)
    before = keys.clone(), values.clone()
    new_keys, new_values = numbers(2, 4, 3, 8, seed=1).transpose(1, 2)[:, :, :2], numbers(2, 3, 2, 6, seed=2)
    slot = torch.tensor([[4, 0], [1, 2]])
    ops.write(keys, values, new_keys, new_values, slot)
    for store, old, new in ((keys, before[0], new_keys), (values, before[1], new_values)):
        want = old.clone()
        for b in range(2):
            for n in range(2):
                want[b, :, slot[b, n]] = new[b, :, n]
        assert torch.equal(store, want)


@pytest.mark.parametrize("slot", [-1, 5])
def test_a_slot_out_of_range_is_refused(slot: int):
    keys, values, new = numbers(1, 2, 5, 4), numbers(1, 2, 5, 4), numbers(1, 2, 1, 4, seed=1)
    with pytest.raises(RuntimeError, match=f"slot {slot} of 5"):
        ops.write(keys, values, new, new, torch.tensor([[slot]]))
    with pytest.raises(RuntimeError, match="keys and values unlike those of the cache"):
        ops.write(keys, values, new.float(), new, torch.tensor([[0]]))


# attend


def shape_of(rows: int) -> tuple[Tensor, Tensor]:
    """(depth, ancestors) of a branching tree of seven nodes and of chains, in turn."""
    parents = torch.tensor([[-1, 0, 0, 1, 3, 3, 2], [-1, 0, 1, 2, 3, 4, 5]])[torch.arange(rows) % 2]
    draft = tree(torch.zeros_like(parents), parents)
    return draft.depth, draft.ancestors


def plan_of(lengths: list[int], ancestors: Tensor, window: int) -> Tensor:
    length = torch.tensor(lengths)[:, None, None].expand(-1, ancestors.shape[1], 1)
    return torch.cat([length, torch.full_like(length, window), ancestors.long()], -1)[:, None]


def dense(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: list[int],
    seen: tuple[Tensor, Tensor],
    window: int = 0,
    cap: float = 0.0,
    sinks: Tensor | None = None,
    scale: float = 0.3,
) -> Tensor:
    """[B, N, H, E] by softmax over the positions that each node sees, one node and one head at a time."""
    B, H, N, _ = query.shape
    S, groups = keys.shape[2], H // keys.shape[1]
    depth, ancestors = seen
    out = torch.zeros(B, N, H, values.shape[3], dtype=torch.float64)
    for b in range(B):
        for n in range(N):
            place = lengths[b] + int(depth[b, n])
            first = max(0, place - window + 1) if window else 0
            slots = [p % S for p in range(first, lengths[b])]
            path = [j for j in range(N) if ancestors[b, n, j]]
            path = [j for j in path if lengths[b] + int(depth[b, j]) >= first]
            slots += [(lengths[b] + j) % S for j in path]
            for h in range(H):
                k, v = keys[b, h // groups, slots].double(), values[b, h // groups, slots].double()
                scores = k @ query[b, h, n].double() * scale
                if cap:
                    scores = cap * (scores / cap).tanh()
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h : h + 1].double()])
                    v = torch.cat([v, torch.zeros_like(v[:1])])
                out[b, n, h] = scores.softmax(-1) @ v
    return out


def case(D: int, E: int, lengths: list[int], S: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query of four heads, keys and values of two, laid out as layers lay them."""
    B, N = len(lengths), 7
    query = numbers(B, N, 4, D, dtype=dtype).transpose(1, 2)
    return query, numbers(B, 2, S, D, dtype=dtype, seed=1), numbers(B, 2, S, E, dtype=dtype, seed=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "E"), [(8, 8), (12, 12), (20, 12), (64, 64), (80, 80), (128, 128), (20, 64)])
def test_attention_is_a_softmax_over_what_is_seen(D: int, E: int, dtype: torch.dtype):
    """Trees and chains behind up to 1,212 committed tokens: within a chunk, at its edge and over two."""
    lengths = [0, 9, CHUNK - 3, CHUNK, CHUNK + 188]
    query, keys, values = case(D, E, lengths, CHUNK + 208, dtype)
    seen = shape_of(len(lengths))
    got = ops.attend(query, keys, values, plan_of(lengths, seen[1], 0), 0.3, 0.0, None)
    assert (got.double() - dense(query, keys, values, lengths, seen)).abs().max() <= DTYPES[dtype]


@pytest.mark.parametrize("window", [1, 3, 16, 40, 600])
@pytest.mark.parametrize("extra", [{}, {"cap": 1.5}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]).double()}])
def test_windows_rings_softcaps_and_sinks(window: int, extra: dict[str, Any]):
    """A ring of window - 1 and seven slots, which long rows have gone round."""
    lengths = [0, 2, window, window + 5, 3 * window + 11, 1300]
    query, keys, values = case(12, 12, lengths, window + 6, torch.float64)
    seen = shape_of(len(lengths))
    plan = plan_of(lengths, seen[1], window)
    got = ops.attend(query, keys, values, plan, 0.3, extra.get("cap", 0.0), extra.get("sinks"))
    want = dense(query, keys, values, lengths, seen, window, **extra)
    assert (got - want).abs().max() <= 1e-12
    other = dense(query, keys, values, lengths, seen, window + 1, **extra)
    assert (got - other).abs().max() > 1e-3  # one position more would be noticed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("D", [12, 64])
def test_a_node_attends_alike_in_every_batch_and_tree(D: int, window: int, dtype: torch.dtype):
    """Its bits are those of its path decoded one token at a time, alone."""
    lengths = [30, CHUNK - 2, 2 * CHUNK - 4]
    query, keys, values = case(D, D, lengths, 2 * CHUNK + 60, dtype)
    depth, ancestors = shape_of(3)
    whole = ops.attend(query, keys, values, plan_of(lengths, ancestors, window), 0.3, 0.0, None)
    one = torch.ones(1, 1, 1, dtype=torch.bool)
    for b in range(3):
        for n in range(7):
            path = [j for j in range(7) if ancestors[b, n, j]]
            k, v = keys[b : b + 1].clone(), values[b : b + 1].clone()
            for i, j in enumerate(path):  # commit all but the node itself
                k[:, :, lengths[b] + i], v[:, :, lengths[b] + i] = (
                    keys[b, :, lengths[b] + j],
                    values[b, :, lengths[b] + j],
                )
            plan = plan_of([lengths[b] + len(path) - 1], one, window)
            alone = ops.attend(query[b : b + 1, :, n : n + 1], k, v, plan, 0.3, 0.0, None)
            assert torch.equal(alone[0, 0], whole[b, n]), (b, n)
            assert depth[b, n] == len(path) - 1


def test_values_that_do_not_lie_together_are_refused():
    query, keys, values = case(8, 8, [4], 16, torch.float64)
    with pytest.raises(RuntimeError, match="values must lie together"):
        ops.attend(query, keys.transpose(2, 3), values, plan_of([4], shape_of(1)[1], 0), 0.3, 0.0, None)


# The build


def test_without_a_compiler_the_user_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert shutil.which("g++") is None
    with pytest.raises(
        UserError, match=r"^Compiling a step needs the compiler g\+\+ and there is none; install it, or "
    ):
        kernels.build(tmp_path / "kernels.so")
    monkeypatch.setenv("CXX", shutil.which("false", path="/bin:/usr/bin") or "false")
    with pytest.raises(UserError, match=r"false cannot build the kernels \(no message\); set CXX to g\+\+ 11 or newer"):
        kernels.build(tmp_path / "kernels.so")
    assert not (tmp_path / "kernels.so").exists()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [17, 80, 4096, 9000])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 1.7])
def test_race_is_what_scores_emit(temperature: float, vocab: int, dtype: torch.dtype):
    """The rough look at every token loses no winner; a row at temperature 0 beside sampled ones is greedy."""
    B, N = 3, 24
    values = (2.5 * torch.randn(B, N, vocab, generator=torch.Generator().manual_seed(vocab))).to(dtype)
    noise = Noise.of([1, 2, 3], [4, 5, 6], torch.device("cpu"))
    draft, position = chain(torch.zeros(B, N, dtype=torch.int64)), torch.tensor([3, 77, 900])
    heat = torch.tensor([temperature, temperature, 0.0])
    wide = values.float() if dtype == torch.bfloat16 else values
    want = Scores(draft, wide, heat[:, None, None], noise, position, temperature > 0).emitted
    got = ops.race(values, heat, noise.key, position[:, None] + torch.arange(N))
    assert torch.equal(got, want)
    assert torch.equal(got[2], wide[2].argmax(-1))


def test_move_is_a_commit():
    """Paths of ragged rows in a table, round the ring, as `SlotCache.commit` moves them."""
    draw = torch.Generator().manual_seed(1)
    stores = [torch.randn(3, 2, 10, size, generator=draw) for size in (4, 6)]
    path, length = torch.tensor([[0, 2, 5], [0, 1, 3], [0, 4, 5]]), torch.tensor([7, 2, 3])
    table = torch.tensor([[0, 3], [0, 2], [0, 0]])  # the counts are a column, as in `advance.Advance`
    want = [store.clone() for store in stores]
    for store, before in zip(want, stores, strict=True):
        for b, count in enumerate([3, 2, 0]):
            for i in range(count):
                store[b, :, (int(length[b]) + i) % 10] = before[b, :, (int(length[b]) + int(path[b, i])) % 10]
    ops.move(stores, path, length, table[:, 1])
    for got, expected in zip(stores, want, strict=True):
        assert torch.equal(got, expected)
