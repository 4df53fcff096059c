"""As many guesses as pay: the choice against all others, with made-up times; times that are learnt as decoding goes."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretoken import costs
from foretoken.costs import ENOUGH, HEAT, LEAST, MOST, WIDTHS, Clock, Costs, Worth, measure
from foretoken.decode import Request
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.generation import decode_all
from foretoken.grow import Shape
from foretoken.plan import Plan, Settings, planned
from foretoken.rules import Match
from foretoken.sampling import Sampling
from tests.families import make
from tests.reference import reference
from tests.test_grow import Toy, feed_of

FREE, DEAR = Costs((1, 64), (1.0, 1.0)), Costs((1, 64), (1.0, 100.0))
shares = st.lists(st.integers(0, 100), min_size=6, max_size=6)
times = st.builds(
    lambda steps, level, once: Costs((1, 2, 4, 9), torch.tensor(steps).cumsum(0).tolist(), level, once),
    st.tuples(st.floats(0.1, 3), *[st.floats(0, 1)] * 3),
    st.floats(0, 1),
    st.floats(0, 1),
)


def best_by_trying(found: torch.Tensor, cost: Costs, level: int) -> tuple[float, int]:
    """(tokens per second, guesses) of the best number of guesses of found [B, C]."""
    tried = []
    for n in range(min(found.shape[1], cost.most) + 1):
        tokens = 1 + sum(sum(sorted(row, reverse=True)[:n]) for row in found.tolist()) / len(found)
        seconds = cost.once + float(cost.judging([n + 1])[0]) + (level - 1) * cost.level
        tried.append((tokens / seconds, n))
    return max(tried, key=lambda t: (t[0], -t[1]))


def test_times_between_the_timed_widths():
    assert Costs((1, 4, 8), (2.0, 5.0, 9.0)).judging(range(1, 9)).tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert Costs((1, 3, 5), (2.0, 1.5, 4.0)).judging([1, 2, 3, 4, 5]).tolist() == [2, 2, 2, 3, 4]


@settings(max_examples=100, deadline=None)
@given(st.lists(shares, min_size=1, max_size=3), times, st.integers(1, 4))
def test_the_number_of_guesses_is_the_best_one(rows: list[list[int]], cost: Costs, level: int):
    found = torch.tensor(rows, dtype=torch.float64) / 100
    worth = Worth(cost)
    kept = worth(found.log(), None, level)
    assert kept is not None
    rate, _ = best_by_trying(found, cost, level)
    tokens = 1 + sum(worth.predicted) / len(rows)
    assert tokens / float(cost.once + cost.judging([kept + 1])[0] + (level - 1) * cost.level) == pytest.approx(rate)
    for row, sum_ in zip(found, worth.predicted, strict=True):
        assert sum_ == pytest.approx(float(row.sort(descending=True).values[:kept].sum()))


@settings(max_examples=150, deadline=None)
@given(st.data(), times, st.integers(1, 3))
def test_growing_ends_only_where_a_level_cannot_pay(data: st.DataObject, cost: Costs, level: int):
    """Whatever its guesses are: each is behind one that can go on, and siblings share that one's probability."""
    found = torch.tensor([data.draw(shares)], dtype=torch.float64) / 100
    ends = found[:, :2]
    kept = Worth(cost)(found.log(), ends.log(), level)
    hoped, _ = best_by_trying(torch.cat([found, ends], 1), cost, level + 1)
    here, _ = best_by_trying(found, cost, level)
    if abs(hoped - here) > 1e-9:
        assert (kept is None) == (hoped > here)
    if kept is not None:
        split = torch.tensor([[data.draw(st.floats(0, 1)) for _ in range(2)]], dtype=torch.float64)
        children = torch.cat([ends * split, ends * (1 - split)], 1)
        assert best_by_trying(torch.cat([found, children], 1), cost, level + 1)[0] <= here + 1e-9


def plan(cost: Costs, depth: int = 4, width: int = 3, **more: Any) -> Plan:
    return Plan(Shape(depth, width, MOST), worth=lambda feed: Worth(cost), **more)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trees_are_as_wide_and_deep_as_pays(temperature: float):
    feed = feed_of(temperature)

    def size(cost: Costs) -> tuple[int, int]:
        draft = plan(cost).draft(feed, *Toy().begin())
        return draft.width, draft.height

    assert size(FREE) == (1 + 3 + 3 * 9, 4)
    assert size(replace(FREE, level=100.0)) == (4, 1)
    assert size(DEAR) == (1, 1)
    widths = [size(Costs((1, 64), (1.0, 1.0 + slope)))[0] for slope in (0.5, 2.0, 6.0, 20.0)]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) > 2
    depths = [size(replace(FREE, level=level))[1] for level in (0.0, 0.05, 0.3, 1.0)]
    assert depths == sorted(depths, reverse=True)
    assert len(set(depths)) > 1


def test_a_tree_that_pays_is_the_top_of_a_dynamic_one():
    feed = feed_of()
    draft = plan(Costs((1, 64), (1.0, 4.0)), 3).draft(feed, *Toy().begin())
    dynamic = Plan(Shape(draft.height, 3, draft.width - 1)).draft(feed, *Toy().begin())
    assert 2 < draft.width < 20
    assert torch.equal(draft.tokens, dynamic.tokens)
    assert torch.equal(draft.parent, dynamic.parent)


def test_heat_divides_the_logits():
    feed, toy = feed_of(), Toy(2)
    worth = Worth(FREE, heat=0.5)
    draft = Plan(Shape(2, 1, MOST), worth=lambda feed: worth).draft(feed, *toy.begin())
    for row in range(2):
        code, chance, total = toy.prefix[row], 1.0, 0.0
        for token in draft.tokens[row, 1:].tolist():
            chance *= float((toy.lm.logits(code) / 0.5).softmax(-1)[token])
            total += chance
            code = toy.lm.after(code, token)
        assert worth.predicted[row] == pytest.approx(total, rel=1e-5)


def test_drawn_guesses_have_a_tree_that_is_fixed_beforehand():
    """Under rules that draw them, nothing depends on their values: the calibrated tree, or paths of equal length."""
    feed = replace(feed_of(1.0), samples=True)
    tree = {1.0: [[0], [1], [0, 0]]}
    draft = plan(DEAR, trees=tree).draft(feed, *Toy().begin())
    assert draft.parent.tolist() == [[-1, 0, 0, 1]] * 2
    assert draft.q is not None
    assert plan(DEAR, trees=tree).draft(feed_of(1.0), *Toy().begin()).width == 1  # under match it is not used
    assert plan(DEAR, 2).draft(feed, *Toy().begin()).parent.tolist() == [[-1, 0, 0, 0, 1, 2, 3]] * 2
    top = plan(DEAR, candidates="top").draft(feed, *Toy().begin())  # certain guesses may be chosen by value
    assert (top.width, top.q) == (1, None)


def test_plans_hold_what_their_drafts_may():
    tree = {1.0: [[0], [1], [0, 0]]}
    assert plan(FREE, 4, 3).nodes == 1 + MOST
    assert plan(FREE, 16, 8).nodes == 1 + 16 * 8  # drawn instead
    assert plan(FREE, trees=tree).nodes == 1 + MOST
    assert Plan(Shape(3, 8, 4)).nodes == 25
    assert Plan(Shape(3), tree).nodes == 4


def test_settings():
    target: Any = make("llama")
    made = planned(Settings(tree="hardware", depth=2, width=5), 6, {"0": [[0], [0, 0], [0, 0, 0]]}, target=target)
    assert made.shape == Shape(2, 5, MOST)
    assert made.trees == {0.0: [[0], [0, 0]]}
    assert isinstance(made.worth, Clock)
    assert made.worth.target is target
    with pytest.raises(UserError, match="does not say whose forwards to time"):
        planned(Settings(tree="hardware"), 6)


# ------------------------------------------------------------------------------------------------------------- measured


def test_measuring_leaves_no_trace():
    target = make("llama")
    before = torch.get_rng_state()
    found = measure(target, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert tuple(found.widths) == WIDTHS
    assert len(found.forward) == len(WIDTHS)
    assert min(found.forward) > 0
    assert (found.level, found.once) == (0.0, 0.0)


class Told:
    """A feed of rows that have accepted so much."""

    def __init__(self, texts: list[list[int]], accepted: list[int]) -> None:
        self.texts, self.count, self.batch = texts, [n + 1 if n >= 0 else 0 for n in accepted], len(texts)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """One whose forwards take a second and whose measurements are counted in `sizes`."""
    made: Any = Clock(SimpleNamespace())  # pyright: ignore
    made.sizes = []
    monkeypatch.setattr(costs, "measure", lambda target, batch: (made.sizes.append(batch), FREE)[1])
    return made


def test_batches_are_timed_once(clock: Any):
    for batch in (1, 3, 4, 4, 8, 5, 1, 2):
        clock(Told([[0] for _ in range(batch)], [0] * batch))
    assert clock.sizes == [1, 4, 8, 2]


def test_heat_follows_what_is_accepted(clock: Any):
    texts: list[list[int]] = [[1], [2]]
    found = torch.tensor([[0.9, 0.5], [0.8, 0.2]])

    def after(accepted: list[int], told: list[list[int]] = texts) -> float:
        """The heat after a step of 1.4 and 1.0 expected tokens."""
        clock.heat, clock.before = HEAT, None
        assert clock(Told(texts, [5, 5]))(found.log(), None, 1) == 2
        return clock(Told(told, accepted)).heat

    assert after([2, 2]) < after([1, 2]) < HEAT < after([1, 1]) < after([0, 0])
    assert after([1, -1]) == pytest.approx(after([1, 1]), rel=1e-2)  # a finished row says nothing
    assert after([1, -1]) > HEAT
    assert after([-1, -1]) == HEAT
    assert after([0], texts[:1]) == after([0, 0], [[1], [2]]) == HEAT  # other rows
    for accepted, end in (([0, 0], 1 / LEAST), ([9, 9], LEAST)):
        clock.before = None
        for _ in range(400):
            clock(Told(texts, accepted))(found.log(), None, 1)
        assert clock.heat == pytest.approx(end)


def test_what_decoding_takes_is_learnt(clock: Any, monkeypatch: pytest.MonkeyPatch):
    """Levels and the rest of a step, once there are enough; the median, so that a pause does no harm."""
    now = [0.0]
    monkeypatch.setattr(costs, "perf_counter", lambda: now[0])
    texts, found, ends = [[1]], torch.tensor([[0.9]]), torch.tensor([[0.9]])
    for step in range(ENOUGH + 1):
        worth = clock(Told(texts, [1]))
        assert (worth.costs.level, worth.costs.once) == ((0.25, 3.0) if step == ENOUGH else (0.0, 0.0))
        now[0] += 9.0  # the first level is not of those behind it
        assert worth(found.log(), ends.log(), 1) is None
        now[0] += 0.25 if step != 3 else 50.0
        assert worth(found.log(), None, 2) == 1
        now[0] += 1.0 + 3.0 if step != 5 else 700.0


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_decoding_by_the_clock_changes_nothing(temperature: float):
    """Rows that join and leave, with real times."""
    target = make("llama")
    drafter: Any = make_drafter("draft_model", target, {"path": make("llama", seed=1), "tree": "hardware"})
    prompts = [[5, 6, 7], [9] * 4, [12, 13], [3, 4, 5, 6]]
    sampling = Sampling(temperature=temperature, seed=4)
    requests = [Request(p, sampling, i, 9 + 4 * i) for i, p in enumerate(prompts)]
    rows = decode_all(target, drafter, requests, Match(), batch_size=2)
    for i, (row, request) in enumerate(zip(rows, requests, strict=True)):
        said = reference(target.model, request.tokens, sampling, number=i, max_new_tokens=request.max_new_tokens)
        assert row.output == said
    assert set(drafter.plan.worth.forwards) == {1, 2}
    assert drafter.plan.worth.heat != HEAT
