"""A compiled step says what the eager one says: in every family, with every drafter, in every batch.

Here steps are traced and run operator by operator; `test_programs.py` has the bits of what inductor made.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch

import foretoken
from foretoken.compiled import CompiledTarget
from foretoken.decode import RUN, Request, Session
from foretoken.drafter import Feed, Needs, Stateless
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.sampling import Sampling
from foretoken.target import UNNORMED, Target
from foretoken.tree import Draft, chain, tree
from tests.families import SELF_ATTENTION, SUPPORTED, VOCAB, make
from tests.models import ASSETS
from tests.test_equality import (
    ALIKE,
    DRAFTERS,
    DTYPES,
    TEMPERATURES,
    assert_context,
    assert_ends,
    assert_mixed_requests,
    assert_neighbours,
    assert_prefix_settings,
    family,
)

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attribute .*inv_freq:UserWarning")
"""Rotary tables that change with the length of the text are set again, to what they are, within the context."""

COMPILABLE = [name for name in SUPPORTED if name not in SELF_ATTENTION]
LENGTHS = [100, 41, 3]
PARENTS = [[-1, 0, 0, 2, 1, 1], [-1, 0, 1, 2, 3, 4], [-1, 0, 0, 0, 3, 3]]


@cache
def compiled(name: str, dtype: str) -> tuple[Target, Target]:
    """The targets of `family`, the first one traced."""
    target, draft = family(name, dtype)
    return CompiledTarget(target, inductor=False), draft


def filled(seed: int) -> tuple[torch.Tensor, Draft]:
    """Three prompts [3, 100] and a tree of six nodes behind each."""
    draw = torch.Generator().manual_seed(seed)
    prompts = torch.randint(VOCAB, (len(LENGTHS), max(LENGTHS)), generator=draw)
    return prompts, tree(torch.randint(VOCAB, (3, 6), generator=draw), torch.tensor(PARENTS))


@pytest.mark.parametrize("name", COMPILABLE)
def test_every_family_says_what_the_eager_model_says(name: str):
    """Logits, features and cache of a ragged batch of trees, past a window and round its ring, then of a second one."""
    target = make(name)
    step, features = CompiledTarget(target, inductor=False).settled((0, 1, -1)), (0, 1, -1)
    assert isinstance(step, CompiledTarget)
    tolerance = 1e-5 if name == "gemma2" else 1e-9  # its eager attention takes softmax in float32
    prompts, draft = filled(3)
    with torch.inference_mode():
        mine, theirs = target.cache(3, 256, 6), target.cache(3, 256, 6)
        for cache_ in (mine, theirs):
            target.read(prompts, LENGTHS, cache_)
        before = [x.clone() for x in mine.stores]
        for _ in range(2):
            got, want = step.judge(draft, mine, features), target.judge(draft, theirs, features)
            assert got.features is not None and want.features is not None
            assert (got.logits - want.logits).abs().max() <= tolerance * want.logits.std()
            assert (got.features - want.features).abs().max() <= tolerance * want.features.std()
            for a, b in zip(mine.stores, theirs.stores, strict=True):
                assert (a - b).abs().max() <= tolerance * b.std()
            path = torch.tensor([[0, 2, 3], [0, 1, 2], [0, 3, 4]])
            mine.commit(path, [3, 2, 1])
            theirs.commit(path, [3, 2, 1])
        assert any((a != b).any() for a, b in zip(before, mine.stores, strict=True))  # nodes were written


@pytest.mark.parametrize("name", COMPILABLE)
def test_prompts_that_the_program_reads(name: str, monkeypatch: pytest.MonkeyPatch):
    """A ragged batch in pieces, and more behind it, is what the model reads: logits, features, and what drafts see."""
    monkeypatch.setattr(CompiledTarget, "reads", True)
    target, features = make(name), (0, 1, -1)
    step = CompiledTarget(target, inductor=False).settled(features)
    tolerance = 1e-5 if name == "gemma2" else 1e-9
    prompts, draft = filled(3)
    with torch.inference_mode():
        mine, theirs = step.cache(3, 150, 6), target.cache(3, 150, 6)  # the last piece finds no room for its padding
        for lengths in (LENGTHS, LENGTHS[::-1]):
            got, want = (t.read(prompts, lengths, c, features) for t, c in ((step, mine), (target, theirs)))
            assert got.features is not None and want.features is not None
            assert (got.logits - want.logits).abs().max() <= tolerance * want.logits.std()
            for a, b, n in zip(got.features, want.features, lengths, strict=True):
                assert (a[:n] - b[:n]).abs().max() <= tolerance * b[:n].std()
            assert mine.lengths == theirs.lengths
            seen, should = (target.judge(draft, c).logits for c in (mine, theirs))
            assert (seen - should).abs().max() <= tolerance * should.std()


@pytest.mark.parametrize("name", SELF_ATTENTION)
def test_models_that_attend_by_themselves_are_refused(name: str):
    with pytest.raises(UserError, match=r"^\w+ForCausalLM computes attention by itself, which cannot be compiled; "):
        CompiledTarget(make(name))


def test_other_dtypes_and_devices_are_refused(monkeypatch: pytest.MonkeyPatch):
    target = make("llama")
    with pytest.raises(UserError, match=r"is in torch.float16, and steps are compiled in float32, float64, bfloat16;"):
        CompiledTarget(make("llama", torch.float16))
    monkeypatch.setattr(Target, "device", torch.device("cuda"))
    with pytest.raises(UserError, match="is on cuda, and steps are compiled for processors"):
        CompiledTarget(target)


def test_the_state_before_the_final_norm():
    target = make("llama")
    step, (prompts, draft) = CompiledTarget(target, inductor=False).settled((UNNORMED,)), filled(4)
    with torch.inference_mode():
        mine, theirs = target.cache(3, 256, 6), target.cache(3, 256, 6)
        for cache_ in (mine, theirs):
            target.read(prompts, LENGTHS, cache_)
        got, want = step.judge(draft, mine, (UNNORMED,)), target.judge(draft, theirs, (UNNORMED,))
        plain = target.judge(draft, theirs, (-1,))
    assert got.features is not None and want.features is not None and plain.features is not None
    assert (got.features - want.features).abs().max() <= 1e-9 * want.features.std()
    assert (got.features - plain.features).abs().max() > 1e-2


def test_forwards_that_are_only_timed_are_the_program_that_is_there(monkeypatch: pytest.MonkeyPatch):
    target = make("llama")
    step = CompiledTarget(target, inductor=False).settled((0,))
    prompts, draft = filled(3)
    with torch.inference_mode():
        cache_ = target.cache(3, 256, 6)
        target.read(prompts, LENGTHS, cache_)
        want = target.judge(draft, cache_)
        monkeypatch.setattr(Target, "judge", None)
        read = step.judge(draft, cache_)
    assert read.features is None
    assert (read.logits - want.logits).abs().max() <= 1e-9 * want.logits.std()


def test_no_more_nodes_than_slots():
    step = CompiledTarget(make("llama"), inductor=False).settled()
    with torch.inference_mode():
        full = step.cache(1, 8, 6)
        step.read(torch.ones(1, 5, dtype=torch.int64), [5], full)
        with pytest.raises(UserError, match="The cache holds 8 tokens and 9 are needed"):
            step.judge(tree(torch.ones(1, 4, dtype=torch.int64), torch.tensor([[-1, 0, 0, 1]])), full)


# The project's equality tests, compiled

FEW = {"llama": "float32", "gemma3": "float64", "deepseek_v3": "float32"}
"""Families tried with most drafters, in one dtype each: grouped heads, windows of some layers, keys and values of other
sizes with experts."""

TRACED = tuple(key for key, (name, _) in DRAFTERS.items() if name == "draft_model" or key == "hybrid_chain")
"""Drafters that are traced themselves, which takes seconds: not slow once, and slow in every other place."""
QUICK = [pytest.param(key, marks=pytest.mark.slow if key in TRACED else ()) for key in DRAFTERS]
SOME = ("none", "lookahead", "mtp_tree", "adaptive_eagle")


@pytest.mark.parametrize("name", FEW)
def test_families(name: str):
    keys = [key for key in DRAFTERS if key not in ALIKE + TRACED or (name, key) == ("llama", "draft_tree")]
    assert_mixed_requests(name, FEW[name], *compiled(name, FEW[name]), keys)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", COMPILABLE)
def test_all_families(name: str, dtype: str):
    assert_mixed_requests(name, dtype, *compiled(name, dtype), [*DRAFTERS])


@pytest.mark.parametrize("key", QUICK)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_penalties_warpers_and_processors(key: str, dtype: str):
    assert_prefix_settings(key, *compiled("llama", dtype))


@pytest.mark.slow
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("key", DRAFTERS)
def test_end_tokens_and_lengths(key: str, temperature: float):
    assert_ends(key, temperature, *compiled("llama", "float64"))


@pytest.mark.parametrize("key", QUICK)
def test_rows_join_and_leave(key: str):
    assert_neighbours(key, *compiled("mistral", "float64"))


@pytest.mark.parametrize("key", [pytest.param(key, marks=() if key in SOME else pytest.mark.slow) for key in DRAFTERS])
def test_the_context_ends_the_output(key: str):
    assert_context(key, *compiled("opt", "float64"))


def test_the_compiled_step_is_what_decodes(monkeypatch: pytest.MonkeyPatch):
    """Equality of outputs says nothing if sessions fell back to the eager step."""
    target = compiled("llama", "float64")[0]
    assert isinstance(target, CompiledTarget)
    eager = target.eager

    def judged(*args: object) -> None:
        raise AssertionError("judged eagerly")

    monkeypatch.setattr(Target, "judge", judged)
    with pytest.raises(AssertionError, match="judged eagerly"):
        foretoken.generate(eager, [5, 17, 3], drafter="lookahead", max_new_tokens=8)
    assert len(foretoken.generate(target, [5, 17, 3], drafter="lookahead", max_new_tokens=8).token_ids) == 8


# Several plain steps at once


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_plain_steps_in_a_row_are_plain_steps(temperature: float):
    """Rows of different length and end, one of which joins late: tokens, forwards and cache as one by one."""
    target = compiled("mistral", "float64")[0].settled()
    drafter, sampling = make_drafter("none", target), Sampling(temperature=temperature, seed=3)
    prompts = [[5, 17, 3], [9] * 30, [7, 8]]
    whole = Session(target, drafter, [Request(p, sampling, i, 40) for i, p in enumerate(prompts)])
    whole.run()
    end = whole.rows[1].output[11]
    at = whole.rows[1].output.index(end) + 1
    limits, ends = (40, 40, 6), ((), (end, 1), ())
    requests = [Request(p, sampling, i, limits[i], eos=ends[i]) for i, p in enumerate(prompts)]
    many, one = (Session(target, drafter, requests[:2], capacity=80) for _ in range(2))
    for row in one.rows:
        row.request = replace(row.request, until=lambda text: False)
    first = min(RUN, at - 1)
    for session, rounds in ((many, 1), (one, first)):
        for _ in range(rounds):
            session.step()
        assert [row.emitted for row in session.rows] == [1 + first, 1 + first]
        session.join(Session(target, drafter, [requests[2]], capacity=80))
    for session in (many, one):
        session.run()
        for row, (n, finish) in zip(session.rows, ((40, "length"), (at, "eos"), (6, "length")), strict=True):
            assert row.output == whole.rows[row.request.number].output[:n]
            assert (row.forwards, row.finish, len(row.drafted)) == (n - 1, finish, n)
        assert session.cache.lengths == [len(row.text) - 1 for row in session.rows]
        assert session.cache.length.tolist() == session.cache.lengths
    assert all(torch.equal(a, b) for a, b in zip(many.cache.stores, one.cache.stores, strict=True))


def test_plain_steps_in_a_row_stay_within_their_slots():
    """A caller's own capacity ends them as it ends single ones: nothing is written over."""
    target = compiled("llama", "float64")[0].settled()
    session = Session(target, make_drafter("none", target), [Request([5, 17, 3], max_new_tokens=30)], capacity=8)
    assert len(session.step()[0]) == 5
    with pytest.raises(UserError, match="The cache holds 8 tokens and 9 are needed"):
        session.step()


def test_what_is_left_of_plain_steps_in_a_row():
    """Tokens and features of all of them, which a drafter is told later."""
    target = compiled("llama", "float64")[0].settled((0, -1))
    requests = [Request([5, 17, 3], number=n, max_new_tokens=20 - 15 * n) for n in (0, 1)]
    session, single = (Session(target, Watching(times), requests) for times in (RUN, 1))
    with torch.inference_mode():
        for count in ([4, 4], [RUN, 0]):  # a row that ends ends what is made at once
            before = session.rows[0].emitted
            session.step()
            assert session.last.count == count and session.last.features is not None
            assert session.last.tokens[0].tolist() == session.rows[0].output[before - 1 : -1]
            assert session.last.root.tolist() == [row.text[-1] for row in session.rows]
            for i in range(count[0]):
                single.step()
                assert single.last.features is not None
                for b, n in enumerate(count):
                    if i < n:
                        assert torch.equal(single.last.features[b, 0], session.last.features[b, i])
                        assert single.last.tokens[b, 0] == session.last.tokens[b, i]


class Watching:
    """Drafts nothing, and reads features."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.needs = Needs(1, (0, -1))

    def start(self, batch: int, capacity: int) -> Stateless:
        return Stateless()

    def propose(self, feed: Feed, state: Stateless) -> Draft:
        return replace(chain(feed.root[:, None]), times=self.times)


def test_who_waits_for_each_token_gets_it():
    """Text that is streamed, stop strings and conditions of a caller: one step after the other."""
    target = foretoken.load(ASSETS / "stdlib1M", dtype="float32", device="cpu")
    step = CompiledTarget(target, inductor=False).settled()
    drafter = make_drafter("none", step)
    for asked, most in (({}, RUN), ({"stream": True}, 1), ({"stop": ["\n\n\n"]}, 1), ({"until": len}, 1)):
        until = {"until": (lambda text: False)} if "until" in asked else {}
        session = Session(step, drafter, [Request([5, 17, 3], max_new_tokens=20, **(asked | until))])
        assert [len(t) for t in session.step()] == [most]
    pieces = [*foretoken.stream(step, [5, 17, 3], drafter="none", max_new_tokens=12)]
    assert [len(p.token_ids) for p in pieces[:-1]] == [1] * (len(pieces) - 1)
