"""Recorded steps: the function that a GPU replays says what the engine's own composition says.

On a processor the function runs unrecorded; where CUDA is, these same tests replay it. Triton's kernels run there, or
under TRITON_INTERPRET=1 where Triton is installed.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foretoken import operators
from foretoken.arena import move
from foretoken.cache import SlotCache
from foretoken.decode import Request, Row, Session
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.generation import decode_all
from foretoken.graphs import GraphedTarget
from foretoken.rules import Match, Rejection
from foretoken.sampling import Sampling
from foretoken.target import Target
from foretoken.tree import chain, closure, tree
from tests.families import VOCAB, make

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAMILIES = ("llama", "gemma2", "mistral", "gpt_oss", "deepseek_v3", "qwen3_moe")
"""Grouped heads, soft caps and rings, windows alone, sinks, values narrower than keys, experts."""


@pytest.fixture(scope="module")
def triton() -> Any:
    """The module of Triton kernels."""
    pytest.importorskip("triton")
    if DEVICE.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set")
    return import_module("foretoken.kernels_triton")


def on_device(name: str) -> Target:
    target = make(name)
    target.model.to(DEVICE)
    return target


def by_hand(
    query: Tensor, keys: Tensor, values: Tensor, plan: Tensor, scale: float, cap: float, sinks: Tensor | None
) -> Tensor:
    """What `attend` is to compute, position by position."""
    B, H, N, _ = query.shape
    group, S = H // keys.shape[1], keys.shape[2]
    out = query.new_zeros(B, N, H, values.shape[3])
    for b in range(B):
        for n in range(N):
            length, window, *sees = plan[b, 0, n].tolist()
            path = [length + j for j in range(N) if sees[j]]
            positions = [*range(length), *path]
            if window:
                positions = positions[-window:]
            slots = [p % S for p in positions]
            for h in range(H):
                scores = keys[b, h // group, slots] @ query[b, h, n] * scale
                if cap:
                    scores = cap * torch.tanh(scores / cap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h : h + 1]])
                weight = scores.softmax(0)[: len(slots)]
                out[b, n, h] = weight @ values[b, h // group, slots]
    return out


def planned(lengths: Sequence[int], nodes: int, window: int, seed: int = 0) -> Tensor:
    """[B, 1, N, 2 + N]: a random tree behind so many tokens of each row; a node may see itself alone."""
    draw = torch.Generator().manual_seed(seed)
    parents = [[-1, *(int(torch.randint(-1, n, (), generator=draw)) for n in range(1, nodes))] for _ in lengths]
    sees = closure(torch.tensor(parents)).long()
    length = torch.tensor(lengths)[:, None, None].expand(-1, nodes, 1)
    return torch.cat([length, torch.full_like(length, window), sees], -1)[:, None].contiguous()


CASES: dict[str, tuple[Any, ...]] = {
    # lengths, heads, group, nodes, key, value, slots, window, cap, sinks
    "empty": ([0, 30], 2, 2, 5, 24, 24, 40, 0, 0.0, False),
    "one node": ([33], 1, 4, 1, 16, 16, 64, 0, 0.0, False),
    "narrow values, cap, sinks": ([7, 3], 2, 2, 5, 24, 20, 40, 0, 5.0, True),
    "long": ([590, 123], 2, 2, 7, 40, 40, 600, 0, 0.0, True),
    "window and ring": ([90, 5], 2, 1, 7, 16, 16, 23, 16, 0.0, True),
    "window narrower than the tree": ([90, 5], 2, 2, 7, 16, 16, 23, 3, 0.0, False),
    "several tiles": ([70], 1, 8, 20, 80, 80, 100, 0, 0.0, False),
}


def given(case: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of `attend`, the query strided as models have it."""
    lengths, heads, group, nodes, key, value, slots, window, cap, sinks = CASES[case]
    torch.manual_seed(0)
    B, H = len(lengths), heads * group
    query = torch.randn(B, nodes, H, key).transpose(1, 2)
    keys, values = torch.randn(B, heads, slots, key), torch.randn(B, heads, slots, value)
    extra = torch.randn(H).to(DEVICE, dtype) if sinks else None
    moved = (x.to(DEVICE, dtype) for x in (query, keys, values))
    return *moved, planned(lengths, nodes, window).to(DEVICE), key**-0.5, cap, extra


def apart(attend: Callable[..., Tensor], case: str, dtype: torch.dtype) -> float:
    """The largest difference to attention by hand, of the same inputs in float64."""
    args = given(case, dtype)
    exact = by_hand(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args))
    return float((attend(*args).double() - exact).abs().max())


@pytest.mark.parametrize("case", CASES)
def test_attention_by_a_plan(case: str):
    assert apart(operators.attend, case, torch.float64) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_the_operator_of_this_device(case: str):
    operators.provide()
    assert apart(torch.ops.foretoken.attend, case, torch.float32) < 2e-5


def test_operators_without_a_compiler():
    """Where CUDA is, nothing is built: the operators are there in plain torch for what Triton does not serve."""
    code = """
import torch
torch.cuda.is_available = lambda: True
from foretoken import kernels, operators
operators.load_kernels = None
operators.provide()
keys, values = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 3)
torch.ops.foretoken.write(keys, values, torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 3), torch.tensor([[2]]))
plan = torch.tensor([[[[2, 0, 1]]]])
found = torch.ops.foretoken.attend(torch.ones(1, 1, 1, 2), keys, values, plan, 1.0, 0.0, None)
weight = torch.tensor([0.0, 0.0, 2.0]).softmax(0)[2]
assert torch.allclose(found, weight.expand(1, 1, 1, 3)), found
meta = torch.ops.foretoken.attend(*(x.to("meta") for x in (keys, keys, values, plan)), 1.0, 0.0, None)
assert meta.shape == (1, 4, 1, 3), meta.shape
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_attention_in_pieces(triton: Any, case: str, dtype: torch.dtype):
    """Prefixes cut into pieces and merged again, under every kind of plan."""
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 as whole numbers")
    bound = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert apart(triton.attend, case, dtype) < bound


def stores_for(ring: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(stores [4, B, K, S, D], length, path, count): the second row's path goes round the ring."""
    torch.manual_seed(0)
    path = torch.tensor([[0, 2, 5, 0, 0, 0], [0, 1, 3, 4, 5, 0], [0, 0, 0, 0, 0, 0]])
    found = (torch.randn(4, 3, 2, ring, 6), torch.tensor([2, 11, 4]), path, torch.tensor([3, 5, 0]))
    return tuple(x.to(DEVICE) for x in found)  # pyright: ignore[reportReturnType]


def moved_by_hand(stores: Tensor, length: Tensor, path: Tensor, count: Tensor) -> Tensor:
    want = stores.clone()
    for b, kept in enumerate(count.tolist()):
        for i in range(kept):
            want[:, b, :, (length[b] + i) % stores.shape[3]] = stores[
                :, b, :, (length[b] + path[b, i]) % stores.shape[3]
            ]
    return want


def test_moving_a_path_to_the_front():
    stores, *rest = stores_for(13)
    want = moved_by_hand(stores, *rest)
    pointers = torch.tensor([s.data_ptr() for s in stores], device=DEVICE)
    move(pointers, list(stores), *rest)
    assert torch.equal(stores, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moving_all_layers_at_once(triton: Any, dtype: torch.dtype):
    stores, *rest = stores_for(13)
    stores = stores.to(dtype)
    want = moved_by_hand(stores, *rest)
    triton.move(torch.tensor([s.data_ptr() for s in stores], device=DEVICE), stores[0], *rest)
    assert torch.equal(stores, want)


def test_writing_slots(triton: Any):
    torch.manual_seed(0)
    keys, values = torch.zeros(2, 3, 13, 5, device=DEVICE), torch.zeros(2, 3, 13, 7, device=DEVICE)
    new = torch.randn(2, 4, 3, 5, device=DEVICE).transpose(1, 2), torch.randn(2, 3, 4, 7, device=DEVICE)
    slot = torch.tensor([[11, 12, 0, 1], [3, 4, 5, 6]], device=DEVICE)
    theirs = keys.clone(), values.clone()
    operators.write(*theirs, *new, slot)
    triton.write(keys, values, *new, slot)
    assert torch.equal(keys, theirs[0]) and torch.equal(values, theirs[1])
    assert torch.equal(keys[0, :, 11], new[0][0, :, 0])


def asked(temperature: float = 0.0, ends: Sequence[int] = (), logprobs: bool = False, **more: Any) -> list[Request]:
    """Five requests of different length, each with a passage that comes again; with `logprobs` for steps in parts."""
    prompts = [[(7 * i + j * j) % 6 + 3 for j in range(12 + 5 * i)] * 2 for i in range(5)]
    sampling = Sampling(temperature=temperature, **more)
    return [Request(p, sampling, i, 17 + 4 * i, eos=ends, logprobs=logprobs) for i, p in enumerate(prompts)]


def seen(rows: list[Row]) -> list[tuple[Any, ...]]:
    return [(row.output, row.forwards, row.accepted, row.finish) for row in rows]


DRAFTERS: dict[str, dict[str, Any]] = {"none": {}, "suffix": {"nodes": 9}, "lookahead": {}, "medusa": {"tree": "beam"}}
"""One node, trees from the text, probes, and a tree from the target's features."""


def drafter_for(name: str, target: Target) -> Any:
    settings = dict(DRAFTERS[name])
    if name == "medusa":
        from foretoken.drafters.medusa import Architecture, fresh

        torch.manual_seed(0)
        settings |= {"path": fresh(target, Architecture(heads=3)), "width": 2}
    return make_drafter(name, target, settings)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", DRAFTERS)
def test_whole_steps_say_what_steps_in_parts_say(name: str, temperature: float):
    """Tokens, forwards and accepted guesses, while rows of other lengths end, leave and join."""
    target = on_device("llama")
    requests = asked(temperature, ends=(5, 11))
    plain = decode_all(target, drafter_for(name, target), requests, Match(), batch_size=3)
    used = GraphedTarget(target)
    in_parts = decode_all(
        used, drafter_for(name, target), asked(temperature, (5, 11), logprobs=True), Match(), batch_size=3
    )
    whole = decode_all(used, drafter_for(name, target), requests, Match(), batch_size=3)
    assert seen(plain) == seen(in_parts) == seen(whole)
    assert {key[4] for key in used.works} == {None, temperature > 0}  # forwards alone, and whole steps
    assert len({row.finish for row in plain}) > 1 or temperature > 0  # some end by a token, some by length


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_attention(family: str):
    """Long enough to go round the rings of windows."""
    target = on_device(family)
    plain = decode_all(target, drafter_for("suffix", target), asked(0.7), Match(), batch_size=5)
    whole = decode_all(GraphedTarget(target), drafter_for("suffix", target), asked(0.7), Match(), batch_size=5)
    assert seen(plain) == seen(whole)


def test_one_recording_serves_every_length():
    target = on_device("llama")
    used = GraphedTarget(target)
    session = Session(used, drafter_for("none", target), asked()[:1])
    while session.running:
        session.step()
    assert len(used.works) == 1 and len(used.arenas) == 1


def test_slots_are_lent_to_one_cache_at_a_time():
    """Two sessions take turns, each in slots of its own; what they leave behind serves the next."""
    target = on_device("llama")
    used, drafter = GraphedTarget(target), drafter_for("suffix", target)
    requests = asked()
    alone = [seen(decode_all(target, drafter, [r], Match())) for r in requests[:2]]
    sessions = [Session(used, drafter, [r]) for r in requests[:2]]
    while any(s.running for s in sessions):
        for session in sessions:
            session.step()
    assert [seen(s.rows) for s in sessions] == alone
    assert len(used.arenas) == 2
    del sessions, session
    gc.collect()
    later = Session(used, drafter, requests[:1])
    assert len(used.arenas) == 2 and later.cache.slots[0].keys is used.arenas[0].first
    while later.running:
        later.step()
    assert seen(later.rows) == alone[0]


def test_idle_slots_are_given_back():
    target = on_device("llama")
    used = GraphedTarget(target)
    session = Session(used, drafter_for("none", target), asked()[:1])
    session.step()
    used.release()
    assert len(used.arenas) == 1 and used.works  # in use
    del session
    gc.collect()
    used.release()
    assert not used.arenas and not used.works


@pytest.mark.parametrize("more", [{"repetition_penalty": 1.3}, {"top_k": 3}, {"logit_bias": {5: 2.0}}], ids=str)
def test_what_is_sampled_otherwise_is_left_to_the_session(more: dict[str, Any]):
    target = on_device("llama")
    used = GraphedTarget(target)
    session = Session(used, drafter_for("none", target), asked(1.0, **more))
    draft = chain(session.last.root[:, None])
    eos, limits = torch.zeros(5, 0, dtype=torch.int64, device=DEVICE), [3] * 5
    with torch.inference_mode():
        assert used.advance(draft, session.cache, session.sampler, Match(), limits, eos) is None
    plain = Session(target, drafter_for("none", target), asked(1.0, **more))
    for each in (session, plain):
        while each.running:
            each.step()
    assert seen(session.rows) == seen(plain.rows)


def test_other_rules_are_left_to_the_session():
    target = on_device("llama")
    used = GraphedTarget(target)
    session = Session(used, drafter_for("none", target), asked(1.0), rule=Rejection())
    draft = chain(session.last.root[:, None])
    eos = torch.zeros(5, 0, dtype=torch.int64, device=DEVICE)
    with torch.inference_mode():
        assert used.advance(draft, session.cache, session.sampler, Rejection(), [3] * 5, eos) is None


def filled(target: Target, cache: SlotCache) -> SlotCache:
    """A cache with two prompts of different length."""
    tokens = torch.tensor([[3, 7, 9, 4, 8], [5, 6, 2, 1, 1]], device=DEVICE)
    target.read(tokens, [5, 3], cache)
    return cache


@pytest.mark.parametrize("features", [(), (-1,), (1, -1)], ids=str)
@torch.inference_mode()
def test_a_forward_of_a_padded_tree(features: tuple[int, ...]):
    """Three rows and five nodes of four and eight."""
    target = on_device("llama")
    used = GraphedTarget(target)
    draft = tree(
        torch.randint(VOCAB, (2, 5), device=DEVICE),
        torch.tensor([[-1, 0, 0, 1, -1], [-1, 0, 1, 2, 3]], device=DEVICE),
    )
    read = used.judge(draft, filled(used, used.cache(2, 20, 5)), features)
    want = target.judge(draft, filled(target, target.cache(2, 20, 5)), features)
    torch.testing.assert_close(read.logits, want.logits, rtol=0, atol=1e-10)
    if features:
        torch.testing.assert_close(read.features, want.features, rtol=0, atol=1e-10)


@torch.inference_mode()
def test_a_cache_without_room_for_padding():
    """One that somebody else made, filled to the last slot, is read by the model itself."""
    target = on_device("llama")
    used = GraphedTarget(target)
    draft = chain(torch.randint(VOCAB, (2, 3), device=DEVICE))
    read = used.judge(draft, filled(target, target.cache(2, 8, 3)))
    want = target.judge(draft, filled(target, target.cache(2, 8, 3)))
    assert torch.equal(read.logits, want.logits) and not used.works


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, of its own code
def test_fused_kernels_say_the_same():
    """torch.compile of the traced step; a compiler is needed."""
    target = on_device("llama")
    target.model.float()
    used = GraphedTarget(target, inductor="default")
    parent = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 2]], device=DEVICE)
    draft = tree(torch.randint(VOCAB, parent.shape, device=DEVICE), parent)
    with torch.inference_mode():
        read = used.judge(draft, filled(used, used.cache(2, 20, 4)), (-1,))
        want = target.judge(draft, filled(target, target.cache(2, 20, 4)), (-1,))
    torch.testing.assert_close(read.logits, want.logits, rtol=0, atol=1e-3)
    torch.testing.assert_close(read.features, want.features, rtol=0, atol=1e-3)


def test_refusals():
    with pytest.raises(UserError, match=r"'fast'.*'default'"):
        GraphedTarget(make("llama"), inductor="fast")
    with pytest.raises(UserError, match="how long the text is"):
        GraphedTarget(make("phi3_longrope"))


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path):
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    command = [sys.executable, str(script), "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--only", "attention,shapes:8B"], capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert list(found) == ["attention", "shapes:8B"] and not any("failed" in part for part in found.values())
    assert all(row["error"] < 1e-5 for row in found["attention"]["rows"])
    assert {row["method"] for row in found["shapes:8B"]["rows"]} == {"none", "suffix", "medusa", "eagle"}
    assert "prefix 100" in done.stdout
