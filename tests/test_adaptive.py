"""Limits that follow acceptance: what the drafter is told after it rested, what is lost and won, and that no law moves.

The policy is tried against made-up times and made-up acceptance: seconds and guesses come from a simulation.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from math import inf
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foretoken import limits
from foretoken.adaptive import Adaptive, State, merged
from foretoken.decode import Request, Session
from foretoken.drafter import Feed
from foretoken.drafters import make_drafter
from foretoken.drafters.none import Plain
from foretoken.errors import UserError
from foretoken.generation import decode_all
from foretoken.limits import GRANT, MOST, RATE, Policy, Rows
from foretoken.paths import shallow
from foretoken.rules import RULES, Block, Match, Rejection
from foretoken.sampling import Sampling
from foretoken.step import Step
from foretoken.survival import Prior, Survival
from foretoken.times import Times
from foretoken.tree import Draft
from tests.laws import ALARM, chi_square, counts_of, distance, grown, output_law, p_value, sampled
from tests.test_equality import Script, drafter_for, family, prompts_of
from tests.test_laws import CAUGHT, Plan, Shape, joint_of, pair, tiny

Chance = Callable[[int, int, int], float]

# ----------------------------------------------------------------------------------------- what a drafter is told later


class Recorder:
    """A drafter that remembers what it was told and what it proposed."""

    def __init__(self, drafter: Any) -> None:
        self.drafter, self.needs = drafter, drafter.needs
        self.fed: list[Feed] = []
        self.drafts: list[Draft] = []

    def start(self, batch: int, capacity: int) -> Any:
        return self.drafter.start(batch, capacity)

    def propose(self, feed: Feed, state: Any) -> Draft:
        self.fed.append(feed)
        self.drafts.append(self.drafter.propose(feed, state))
        return self.drafts[-1]


def never_rested(target: Any, drafter: Any, rows: list[tuple[Request, list[int]]], limit: int) -> Draft:
    """What the drafter proposes for requests with these texts if it reads them now, whole."""
    requests = [replace(r, tokens=text[:-1], max_new_tokens=50) for r, text in rows]
    session = Session(target, drafter, requests)
    assert [row.text for row in session.rows] == [text for _, text in rows]
    with torch.inference_mode():
        return drafter.propose(replace(session.feed(), budget=limit + 1), session.state)


INNER = ("suffix", "prompt_lookup", "draft_model", "draft_tree", "early_tree", "mtp_tree", "medusa_tree")
INNER += ("weighted", "deepseek", "deepseek_shared", "eagle_1", "eagle_3", "eagle_paths", "hybrid_tree")


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("key", INNER)
def test_guesses_after_a_rest_are_those_of_a_drafter_that_never_rested(key: str, name: str, temperature: float):
    """Rows of different length that join and leave while it rests and while it drafts."""
    target, draft = family(name, "float64")
    inner = Recorder(drafter_for(key, target, draft))
    script = Script(0, 2, 0, 0, 0, 4, 1, 0, 3, 3, 0, 0)
    drafter = Adaptive(inner, script)  # type: ignore
    sampling = Sampling(temperature=temperature, seed=4)
    requests = [Request(p, sampling, i, 24 + 3 * i) for i, p in enumerate(prompts_of(target))]
    session = Session(target, drafter, requests[:3], capacity=160)
    compared = 0
    for step in range(22):
        if step in (3, 9):
            session.select([len(session.rows) - 1, 0])
        if step in (4, 10, 13):
            late = replace(requests[3], number=5 + step)
            session.join(Session(target, drafter, [late], capacity=160))
        session.select(session.running)
        rows, asked = [(row.request, list(row.text)) for row in session.rows], len(inner.drafts)
        session.step()
        if len(inner.drafts) > asked:
            got, want = inner.drafts[-1], never_rested(target, inner.drafter, rows, script.given[-1])
            assert torch.equal(got.tokens, want.tokens), step
            assert torch.equal(got.parent, want.parent), step
            assert got.height <= script.given[-1]
            compared += got.width > 1
    assert compared >= 2


parts_of = st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=5)


def part(counts: list[int], first: int, width: int = 2) -> Step:
    """Numbered tokens, behind them some that are none; features tell position and row."""
    longest = max(1, *counts) + 1
    tokens = torch.full((3, longest), -9)
    for b, n in enumerate(counts):
        tokens[b, :n] = first + torch.arange(n)
    features = torch.stack([tokens * 2.0, torch.arange(3.0)[:, None].expand(-1, longest)], -1)
    emitted = first + torch.arange(3 * width).view(3, width)
    root = tokens[:, 0] + first
    return Step(tokens, counts, features, root, emitted, torch.tensor([0, 1, 0]))


@given(counts=parts_of)
def test_what_was_missed_is_told_in_order(counts: list[list[int]]):
    parts = [part(c, 100 * i) for i, c in enumerate(counts)]
    whole = merged(parts)
    assert whole.features is not None
    for b in range(3):
        want = [t for p in parts for t in p.tokens[b, : p.count[b]].tolist()]
        assert whole.tokens[b, : whole.count[b]].tolist() == want
        assert whole.features[b, : whole.count[b]].tolist() == [[2.0 * t, float(b)] for t in want]
        later = sum(p.count[b] for p in parts[1:])
        assert int(whole.last[b]) == min(int(parts[0].last[b]) + later, 1)
    assert torch.equal(whole.emitted, parts[0].emitted)
    assert torch.equal(whole.root, parts[-1].root)


def test_a_drafter_that_iterates_goes_on_with_the_answers_to_its_own_draft():
    """Jacobi's guesses are what the target said at those places, however many tokens came since."""
    target, _ = family("llama", "float64")
    inner = Recorder(make_drafter("jacobi", target, {"length": 6}))
    session = Session(target, Adaptive(inner, Script(6, 6, 0, 0, 6)), [Request([5, 6, 7], max_new_tokens=40)])
    places: list[int] = []
    answers: list[list[int]] = []
    for _ in range(5):
        places.append(len(session.rows[0].text) - 1)
        session.step()
        answers.append(session.last.emitted[0].tolist())
    known = answers[1][places[4] - places[1] :]
    assert len(known) >= 2
    assert inner.drafts[-1].tokens[0, 1 : 1 + len(known)].tolist() == known


# ---------------------------------------------------------------------------------------------- made-up times and texts


class World:
    """A plain step takes 1, a draft of h guesses 1 + (v - 1) h / 8 + c h; guess i at place n survives by chance.

    offer  chance that there is anything to draft
    fixed  the only length there is
    drift  how much longer a step is with every token
    read   how much longer the first draft takes, before which the drafter reads the prompt
    call   what a call of the target takes besides, however many plain steps are made in it
    """

    def __init__(
        self,
        v: float,
        c: float,
        *,
        seed: int = 0,
        offer: float = 1.0,
        fixed: int = 0,
        drift: float = 0.0,
        read: float = 0.0,
        call: float = 0.0,
    ):
        self.v, self.c, self.offer, self.fixed, self.drift, self.read = v, c, offer, fixed, drift, read
        self.call = call
        self.random, self.now, self.tokens, self.all = random.Random(seed), 0.0, 0, 0

    def seconds(self, height: int) -> float:
        return (1 + (self.v - 1) * height / 8 + self.c * height) * (1 + self.drift * self.tokens)


def decoded(
    world: World,
    pick: "int | Policy",
    chance: Chance,
    tokens: int,
    rows: int = 1,
    until: float = inf,
    run: int = 1,
) -> tuple[float, list[int]]:
    """Time that `tokens` of each row take with a fixed limit or a policy's, and the height of every draft.

    run: plain steps that are made at once where the policy allows
    """
    texts, out, count = [[0] for _ in range(rows)], [0] * rows, [1] * rows
    known = None if isinstance(pick, int) else pick.rows(rows)
    total, heights = 0.0, list[int]()
    while min(out) < tokens and total < until:
        budget = tokens - min(out)
        feed: Any = SimpleNamespace(texts=texts, count=count, budget=budget, batch=rows, run=run)
        limit = min(pick, budget - 1) if isinstance(pick, int) else pick.choose(feed, known)  # type: ignore
        height = 0
        seconds = world.read if limit and known is not None and known.fresh else 0.0
        if limit and world.random.random() < world.offer:
            height = world.fixed or limit
        if not isinstance(pick, int):
            assert known is not None
            known.behind = 0 if limit else known.behind + 1
            pick.drafted(feed, known, limit, height)
        plain = run if known is None else known.plain
        times = 1 if limit else min(plain, budget)
        seconds += times * world.seconds(height) + world.call
        world.now += seconds * world.random.uniform(0.95, 1.05)
        total += seconds
        count = [0] * rows
        for b in range(rows):
            if out[b] < tokens:
                deep = next((i for i in range(height) if world.random.random() >= chance(b, out[b], i + 1)), height)
                count[b] = min(deep + times, tokens - out[b])
                out[b] += count[b]
        world.tokens, world.all = max(out), sum(out)
        heights += times * [height]
    return total, heights


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[float, list[int]]]:
    """`decoded` with the world's own time."""

    def run(world: World, *how: Any, **more: Any) -> tuple[float, list[int]]:
        monkeypatch.setattr(limits, "perf_counter", lambda: world.now)
        return decoded(world, *how, **more)

    return run


def always(chance: float) -> Chance:
    return lambda row, place, depth: chance


COSTS = [(1.05, 0.0), (1.3, 0.0), (2.0, 0.05), (1.2, 0.1), (1.2, 0.3), (1.5, 0.5), (1.2, 1.0)]


@pytest.mark.parametrize("run", [1, 8])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("tokens", [64, 256, 1000])
@pytest.mark.parametrize(("v", "c"), COSTS)
def test_text_that_defeats_drafting_takes_at_most_a_twentieth_more(
    timed: Any, v: float, c: float, tokens: int, rows: int, run: int
):
    worlds = [World(v, c, seed=s) for s in range(8)]
    found = [timed(world, Policy(16), always(0.04), tokens, rows, run=run)[0] / tokens for world in worlds]
    assert np.mean(found) <= 1.05
    assert max(found) <= 1.07  # a guess that happens to be right asks for another


@pytest.mark.parametrize("c", [2.0, 5.0, 20.0])
def test_what_cannot_be_known_before_it_is_tried_is_lost_few_times(timed: Any, c: float):
    """However slow the drafter is: two drafts of one guess until that shows, then as many as the account pays."""
    for tokens in (64, 500, 4000):
        took, heights = timed(World(1.2, c), Policy(16), always(0.0), tokens)
        assert set(heights) == {0, 1}
        tries = sum(h > 0 for h in heights)
        assert tries <= max(3, (GRANT + RATE * took) / c + 2)
        assert took <= tokens + GRANT + RATE * took + 3 * c


def test_a_stream_of_short_texts_is_no_slower_either(timed: Any):
    """What was learnt stays: forty requests of 64 tokens, one policy."""
    policy, world = Policy(16), World(1.3, 0.4)
    took = [timed(world, policy, always(0.04), 64)[0] / 64 for _ in range(40)]
    assert np.mean(took) <= 1.03
    assert max(took) <= 1.07


def test_steps_that_must_be_plain_are_not_looked_at(timed: Any, monkeypatch: pytest.MonkeyPatch):
    """While the account covers no limit there is nothing to decide."""
    decide, asked = Policy.decide, list[float]()

    def counted(policy: Policy, *args: Any) -> int:
        asked.append(policy.balance)
        return decide(policy, *args)

    monkeypatch.setattr(Policy, "decide", counted)
    _, heights = timed(World(1.2, 5.0), Policy(16), always(0.0), 1000)
    assert len(heights) == 1000 and sum(h > 0 for h in heights) >= 3
    assert len(asked) <= 450


def test_what_will_be_plain_is_asked_for_at_once(timed: Any, monkeypatch: pytest.MonkeyPatch):
    """Where nothing pays the policy is asked once for several steps; as often drafts are tried, and as much is lost."""
    chosen, choose, tries, took = list[int](), Policy.choose, list[int](), list[float]()
    monkeypatch.setattr(Policy, "choose", lambda *args: chosen.append(0) or choose(*args))
    for run in (1, 8):
        chosen.clear()
        total, heights = timed(World(1.2, 1.0), Policy(16), always(0.0), 1000, run=run)
        tries.append(sum(h > 0 for h in heights))
        took.append(total)
    assert len(chosen) <= 300
    assert abs(tries[0] - tries[1]) <= 0.2 * tries[0]
    assert took[1] <= 1.02 * took[0]


@pytest.mark.parametrize(("chance", "offer"), [(0.5, 1.0), (0.8, 0.1), (0.04, 0.5)])
@pytest.mark.parametrize("call", [0.3, 0.8])
def test_a_draft_must_beat_plain_steps_made_at_once(timed: Any, call: float, chance: float, offer: float):
    """What would be faster than one plain step in a call, and is not than one of eight; steps without a draft too."""
    world = World(1.4, 0.3, call=call, offer=offer)
    best = best_fixed(timed, 1.4, 0.3, always(chance), 3000, call=call, offer=offer, run=8)
    took, heights = timed(world, Policy(16), always(chance), 3000, run=8)
    assert best == pytest.approx(3000 * (1 + call / 8), rel=0.01)  # plain
    assert took <= 1.03 * best
    assert any(heights)


@pytest.mark.parametrize("call", [0.0, 0.8])
@pytest.mark.parametrize("offer", [0.5, 1.0])
def test_where_plain_steps_are_made_at_once_good_drafts_still_win(timed: Any, call: float, offer: float):
    best = best_fixed(timed, 1.2, 0.05, always(0.9), 3000, call=call, offer=offer, run=8)
    policy = Policy(16)
    worlds = [World(1.2, 0.05, call=call, offer=offer, seed=s) for s in (3, 4)]
    took = [timed(world, policy, always(0.9), 3000, run=8)[0] for world in worlds]
    assert best < 0.7 * 3000
    assert took[0] <= 1.2 * best  # steps without a draft use up what it may lose before it has won anything
    assert took[1] <= 1.05 * best


def test_to_think_is_paid_for_as_well(timed: Any, monkeypatch: pytest.MonkeyPatch):
    """A choice takes as long as a plain step: choices become few."""
    world, extra, thought = World(1.2, 0.1), Policy.extra, list[float]()

    def slow(*args: Any) -> Any:
        world.now += 1.0
        thought.append(1.0)
        return extra(*args)

    monkeypatch.setattr(Policy, "extra", slow)
    took, heights = timed(world, Policy(16), always(0.04), 3000)
    assert any(heights)
    assert took + sum(thought) <= (1 + RATE) * 3000 + 2 * GRANT


def test_an_interrupted_choice_is_not_paid_for(monkeypatch: pytest.MonkeyPatch):
    """Somebody else had the processor for a thousand steps: that bars no draft."""
    now, policy = [0.0], Policy(4)
    monkeypatch.setattr(limits, "perf_counter", lambda: now[0])
    feed: Any = SimpleNamespace(texts=[[1]], count=[1], budget=9, batch=1, run=1)
    rows = policy.rows(1)
    pauses = iter((0.0, 1000.0))
    policy.decide = lambda times, feed, rows: now.__setitem__(0, now[0] + next(pauses)) or 0  # type: ignore
    for _ in range(2):
        policy.drafted(feed, rows, policy.choose(feed, rows), 0)
        now[0] += 1.0
    assert policy.balance == pytest.approx(GRANT + RATE - limits.PAUSE)


def test_a_deeper_limit_is_tried_if_it_may_pay_where_one_guess_does_not():
    """One guess takes three plain steps. If four take no longer they pay."""
    policy = Policy(16)
    policy.balance, policy.rested = MOST, True
    feed: Any = SimpleNamespace(texts=[[1]], count=[1], budget=99, batch=1, run=1)
    rows = policy.rows(1)
    rows.limits = [0]
    assert policy.decide(times_with(d0=1.0, d1=3.0), feed, rows) == 4


@pytest.mark.parametrize("call", [1.5, 3.0])
def test_what_one_guess_cannot_bring_four_may(timed: Any, call: float):
    """Drafts take three plain steps, of one guess or of sixteen: deeper ones are timed where they may pay."""
    policy = Policy(16)
    took = [timed(World(1.1, 0.0, call=call, seed=s), policy, always(0.9), 1000, run=8)[0] for s in range(3)]
    best = best_fixed(timed, 1.1, 0.0, always(0.9), 1000, call=call, run=8)
    assert best < 0.6 * 1000 * (1 + call / 8)
    assert took[0] <= 1.4 * best
    assert took[2] <= 1.05 * best


def test_what_cannot_pay_is_seldom_timed(timed: Any):
    """Four guesses that take eight plain steps: not even if they were all right, unless the machine changes."""
    world, policy = World(15.0, 0.0, fixed=4), Policy(4)
    _, heights = timed(world, policy, always(0.9), 4000, run=8)
    tried = [i for i, height in enumerate(heights) if height]
    assert 4 <= len(tried) <= 12
    assert max(np.diff(tried)) >= limits.LONG
    world.v = 1.2  # now they pay
    _, heights = timed(world, policy, always(0.9), 4000, run=8)
    assert sum(h > 0 for h in heights) > 600


def test_sessions_that_wait_for_each_token_have_times_of_their_own(timed: Any):
    """Drafts that beat single plain steps, and not those made at once: one policy serves both."""
    policy = Policy(16)
    for _ in range(3):
        for run in (8, 1):
            _, heights = timed(World(1.4, 0.3, call=1.5), policy, always(0.5), 1500, run=run)
            drafted = sum(h > 0 for h in heights) / len(heights)
            assert drafted < 0.05 if run > 1 else drafted > 0.5


@pytest.mark.parametrize("offer", [0.1, 1.0])
@pytest.mark.parametrize("read", [5.0, 20.0])
def test_prompts_are_seldom_read_for_drafts_that_do_not_pay(timed: Any, read: float, offer: float):
    """However long the drafter needs for them, and if it has no guess behind them; for every request if they pay."""
    policy, world = Policy(16), World(1.3, 0.4, read=read, offer=offer)
    took = [timed(world, policy, always(0.04), 64) for _ in range(60)]
    assert np.mean([t for t, _ in took]) / 64 <= 1.05
    assert sum(any(heights) for _, heights in took) >= 3  # it is tried again
    policy, world = Policy(16), World(1.2, 0.05, read=read)
    took = [timed(world, policy, always(0.9), 64) for _ in range(40)]
    assert all(any(heights) for _, heights in took)


def best_fixed(
    timed: Any, v: float, c: float, chance: Chance, tokens: int, rows: int = 1, run: int = 1, **more: Any
) -> float:
    """Time of the best limit of all that there are."""
    tried = (0, 1, 2, 3, 4, 6, 8, 12, 16)
    return min(
        np.mean([timed(World(v, c, seed=s, **more), d, chance, tokens, rows, run=run)[0] for s in range(3)])
        for d in tried
    )


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize(("v", "c"), [(1.1, 0.0), (1.5, 0.02), (1.2, 0.1), (1.2, 0.3)])
@pytest.mark.parametrize("chance", [0.6, 0.8, 0.9])
def test_on_good_text_it_is_as_fast_as_the_best_fixed_limit(timed: Any, chance: float, v: float, c: float, rows: int):
    tokens = 2500
    best = best_fixed(timed, v, c, always(chance), tokens, rows)
    took = np.mean([timed(World(v, c, seed=s), Policy(16), always(chance), tokens, rows)[0] for s in range(3, 6)])
    assert took <= 1.05 * best


@pytest.mark.parametrize("fixed", [4, 7])
def test_drafters_of_one_length_are_on_or_off(timed: Any, fixed: int):
    for chance in (0.0, 0.85):
        took, heights = timed(World(1.5, 0.0, fixed=fixed), Policy(7), always(chance), 1000)
        assert set(heights) == {0, fixed}
        best = min(timed(World(1.5, 0.0, fixed=fixed), d, always(chance), 1000)[0] for d in (0, fixed))
        assert took <= 1.05 * best


def test_limits_beyond_what_a_drafter_offers_are_not_tried_for_long(timed: Any):
    """Drafts end after five guesses: of the deeper limits one is enough."""

    asked = set[int]()

    class Shallow(Policy):
        def drafted(self, feed: Feed, rows: Any, limit: int, height: int) -> None:
            asked.add(limit)
            super().drafted(feed, rows, limit, min(height, 5))

    policy = Shallow(16)
    timed(World(1.1, 0.0), policy, lambda row, place, depth: 0.95 if depth <= 5 else 0.0, 600)
    assert len(asked - {0, 1, 2, 3, 4, 6}) <= 2
    assert policy.candidates(policy.times[0, 1]) == [1, 2, 3, 4, 6]


@pytest.mark.parametrize("offer", [0.1, 0.5])
def test_steps_without_a_draft_are_free(timed: Any, offer: float):
    best = best_fixed(timed, 1.4, 0.0, always(0.8), 3000, offer=offer)
    took = np.mean([timed(World(1.4, 0.0, offer=offer, seed=s), Policy(16), always(0.8), 3000)[0] for s in range(3)])
    assert took <= 1.05 * best
    bad, _ = timed(World(1.6, 0.1, offer=offer), Policy(16), always(0.02), 3000)
    assert bad <= 1.03 * 3000


def test_text_that_turns(timed: Any):
    """Good, bad, good, each 600 tokens: nearly the best limit where one pays and none where not."""

    def chance(row: int, place: int, depth: int) -> float:
        return 0.03 if 600 <= place < 1200 else 0.85

    good = best_fixed(timed, 1.2, 0.1, always(0.85), 600)
    found = [timed(World(1.2, 0.1, seed=s), Policy(16), chance, 1800) for s in range(6)]
    assert np.mean([took for took, _ in found]) <= 1.1 * (2 * good + 600)
    assert np.mean([took for took, _ in found]) <= 0.95 * best_fixed(timed, 1.2, 0.1, chance, 1800)
    assert all(450 <= sum(h == 0 for h in heights) <= 800 for _, heights in found)


def test_good_and_bad_rows_share_a_limit_that_suits_their_sum(timed: Any):
    """Tokens of all rows per time; who ends first does not matter, because others take the places."""

    def mixed(row: int, place: int, depth: int) -> float:
        return 0.85 if row % 2 else 0.1

    def rate(pick: "int | Policy", seed: int) -> float:
        world = World(1.3, 0.05, seed=seed)
        total, _ = timed(world, pick, mixed, 10**6, 6, until=900.0)
        return world.all / total

    best = max(np.mean([rate(d, s) for s in range(3)]) for d in (0, 1, 2, 3, 4, 6, 8, 12, 16))
    assert np.mean([rate(Policy(16), s) for s in range(3)]) >= 0.95 * best


def test_steps_that_grow_slower_change_nothing(timed: Any):
    """Plain steps take three times as long at the end; plain ones are timed now and then."""
    for chance, tokens in ((0.8, 2000), (0.02, 2000)):
        best = best_fixed(timed, 1.2, 0.15, always(chance), tokens, drift=0.001)
        took, _ = timed(World(1.2, 0.15, drift=0.001), Policy(16), always(chance), tokens)
        assert took <= 1.06 * best


def test_interrupted_steps_do_no_harm(timed: Any):
    """Every fortieth step takes ten times as long, for no reason."""

    class Rough(World):
        def seconds(self, height: int) -> float:
            usual = super().seconds(height)
            self.now += 9 * usual if self.random.random() < 0.025 else 0.0  # seen by the clock, not counted
            return usual

    best = best_fixed(timed, 1.2, 0.1, always(0.8), 3000)
    took = np.mean([timed(Rough(1.2, 0.1, seed=s), Policy(16), always(0.8), 3000)[0] for s in range(4)])
    assert took <= 1.06 * best
    bad = [timed(Rough(1.3, 0.3, seed=s), Policy(16), always(0.03), 600)[0] / 600 for s in range(4)]
    assert max(bad) <= 1.05


def test_a_good_stretch_lends_a_bad_one_no_more_than_the_account_holds(timed: Any):
    policy = Policy(16)
    timed(World(1.2, 0.2), policy, always(0.95), 3000)
    assert 0.8 * MOST < policy.balance <= MOST
    took, _ = timed(World(1.2, 0.2), policy, always(0.0), 400)
    assert took <= 400 + MOST + RATE * took


# ------------------------------------------------------------------------------------------------------------ estimates


def test_chances_do_not_depend_on_the_limits_under_which_they_were_seen():
    """Each depth is counted only where it was allowed and the guess before survived."""
    draw = np.random.default_rng(0)
    true = np.array([0.8, 0.5, 0.9, 0.7])
    survival, prior = Survival.none(2000, 4), Prior(4)
    for _ in range(60):
        limit = draw.integers(1, 5, 2000)
        accepted = np.minimum((draw.random((2000, 4)) < true).cumprod(1).sum(1), limit)
        survival.note(limit[None], accepted[None])
        prior.note(limit[None], accepted[None])
    assert survival.hits.sum(0) / survival.risk.sum(0) == pytest.approx(true, abs=0.02)
    assert prior.chances == pytest.approx(true, abs=0.15)
    before = survival.risk.copy()
    survival.note(np.zeros((1, 2000), dtype=np.int64), np.zeros((1, 2000), dtype=np.int64))
    assert (survival.risk == before).all()  # a row that did not draft keeps what it had


def test_what_was_noted_late_is_what_would_have_been_noted_at_once():
    """Rows learn of several steps together, and before any of them leaves or another comes."""
    draw = np.random.default_rng(1)
    at_once, late = Rows.new(3, Prior(4)), Rows.new(3, Prior(4))
    for step in range(30):
        limits = [int(n) for n in draw.integers(0, 5, 3)]
        counts = [int(draw.integers(0, n + 2)) for n in limits]
        for rows in (at_once, late):
            rows.news.append((limits, counts))
        at_once.learn()
        if step == 13:
            late.select([2, 0, 1])
            at_once.select([2, 0, 1])
        if step == 22:
            late.join(Rows.new(0, late.prior))
    late.learn()
    assert late.survival.risk == pytest.approx(at_once.survival.risk)
    assert late.survival.hits == pytest.approx(at_once.survival.hits)
    assert late.prior.chances == pytest.approx(at_once.prior.chances)


def test_a_limit_that_stays_ends_with_the_account():
    """A limit stays for a few steps, but not for one more that the account does not cover."""
    policy = Policy(4)
    texts, rows = [[1]], policy.rows(1)
    feed: Any = SimpleNamespace(texts=texts, count=[1], budget=99, batch=1, run=1)
    policy.decide = lambda times, feed, rows: 0  # type: ignore
    policy.choose(feed, rows)
    for balance, limit in ((5.0, 3), (0.5, 0)):
        policy.kept, policy.limit, policy.loss, policy.balance = 2, 3, 1.0, balance
        assert policy.choose(feed, rows) == limit


def times_with(**seconds: float) -> Times:
    """Timings of limits, each often enough to be believed."""
    times = Times()
    for limit, took in seconds.items():
        for _ in range(6):
            times.note(int(limit[1:]), took)
    return times


def test_times_between_and_behind_the_limits_that_were_timed():
    assert Times().ratios([1, 4]) == [1.0, 1.0]
    one = times_with(d0=2.0, d2=4.0)
    assert one.ratios([1, 2, 4]) == pytest.approx([1.5, 2.0, 2.5])  # half as steep behind
    on_line = times_with(d0=2.0, d1=2.5, d4=4.0, d8=6.0)
    assert on_line.ratios([1, 2, 3, 4, 8, 12]) == pytest.approx([1.25, 1.5, 1.75, 2.0, 3.0, 4.0])
    assert Times(one).ratios([1, 2]) == pytest.approx([1.5, 2.0])  # another batch size begins with these
    assert Times(one).due


def test_times_never_fall_and_a_few_slow_steps_count_little():
    limits = [1, 2, 3, 4, 6, 8]
    steady = times_with(d0=1.0, d1=1.2, d2=1.25, d3=1.3, d4=1.35, d6=1.45, d8=1.55)
    before = steady.ratios(limits)
    for _ in range(7):
        steady.note(4, 2.7)  # a slow stretch: the median of this limit is twice what it was
    after = steady.ratios(limits)
    assert steady.typical[4] == 2.7
    assert (np.diff(after) >= 0).all()
    assert after[3] < 2.1  # a part of that is believed
    assert after[1] < 1.35 * before[1]
    for _ in range(400):
        steady.note(2, 1.25)
    assert steady.ratios(limits)[3] < 0.9 * after[3]  # and less the longer ago it was


@pytest.mark.filterwarnings("error")
def test_times_of_very_long_ago_still_say_something():
    """A million plain steps behind the last drafted one: answers so short that none is drafted for."""
    times, limits = times_with(d0=1.0, d1=1.2, d2=1.4), [1, 2, 4]
    times.count += 10**6
    assert times.ratios(limits) == pytest.approx([1.2, 1.4, 1.8])


def test_other_rows_are_not_timed(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(limits, "perf_counter", lambda: now[0])
    policy = Policy(4)
    for texts in ([[1]], [[2]], [[3]]):
        feed: Any = SimpleNamespace(texts=texts, count=[1], budget=9, batch=1, run=1)
        rows = policy.rows(1)
        now[0] += 5.0
        policy.drafted(feed, rows, policy.choose(feed, rows), 0)
    assert policy.times[0, 1].typical == {}
    assert policy.balance == GRANT


def test_the_last_token_is_not_drafted_for():
    policy = Policy(4)
    policy.decide = lambda times, feed, rows: 4  # type: ignore
    for budget, limit in ((9, 4), (4, 3), (2, 1), (1, 0)):
        feed: Any = SimpleNamespace(texts=[[1]], count=[1], budget=budget, batch=1, run=1)
        assert policy.choose(feed, policy.rows(1)) == limit


# ------------------------------------------------------------------------------------------------------------- drafters


def test_fixed_trees_are_cut_at_the_budget():
    paths = [[0], [1], [0, 0], [0, 0, 0], [1, 0]]
    assert shallow(paths, 2) == [[0], [1], [0, 0], [1, 0]]
    target, draft = family("llama", "float64")
    inner = drafter_for("medusa_tree", target, draft)
    session = Session(target, inner, [Request([5, 6, 7], max_new_tokens=30)])
    with torch.inference_mode():
        heights = [inner.propose(replace(session.feed(), budget=n), session.state).height for n in (9, 4, 3, 2, 1)]
    assert heights == [3, 3, 2, 1, 1]


@pytest.mark.parametrize("text", ["true", True])
def test_every_drafter_takes_the_setting(text: Any):
    target, _ = family("llama", "float64")
    made = make_drafter("suffix", target, {"adaptive": text, "nodes": "5"})
    assert isinstance(made, Adaptive)
    assert made.needs.width == 6
    built = make_drafter("jacobi", target)
    assert isinstance(make_drafter(built, target, {"adaptive": text}), Adaptive)
    assert make_drafter(built, target, {"adaptive": "false"}) is built
    assert isinstance(make_drafter("none", target, {"adaptive": text}), Plain)  # nothing to adapt
    with pytest.raises(UserError, match="adaptive is 'maybe'"):
        make_drafter("suffix", target, {"adaptive": "maybe"})
    with pytest.raises(UserError, match="set them where it is built"):
        make_drafter(built, target, {"adaptive": "true", "length": "3"})


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_decoding_by_its_own_clock_changes_nothing(temperature: float):
    """Real times, requests that come and go, the same policy throughout."""
    target, draft = family("llama", "float64")
    sampling = Sampling(temperature=temperature, seed=4)
    requests = [Request(p, sampling, i, 30 + 9 * i) for i, p in enumerate(prompts_of(target) * 2)]
    want = [row.output for row in decode_all(target, make_drafter("none", target), requests, Match())]
    for name, how in (("draft_model", {"path": draft}), ("suffix", {}), ("lookahead", {"window": 3})):
        drafter = make_drafter(name, target, how | {"adaptive": True})
        assert isinstance(drafter, Adaptive) and isinstance(drafter.policy, Policy)
        drafter.policy.prefill = inf  # reading prompts takes longer than steps of so small a model, as do decisions
        drafter.policy.balance = MOST
        rows = decode_all(target, drafter, requests, Match(), batch_size=3)
        assert [row.output for row in rows] == want
        assert max(max(times.typical) for times in drafter.policy.times.values()) > 0  # it did draft


# ----------------------------------------------------------------------------------------------------------------- laws


def cut(draft: Draft, limit: torch.Tensor) -> Draft:
    """Of row b only guesses of depth `limit[b]` at most can be accepted."""
    return replace(draft, parent=draft.parent.masked_fill(draft.depth > limit[:, None], -1))


def by_the_past(draft: Draft, prefix: torch.Tensor) -> Draft:
    return cut(draft, prefix % 3)


def by_the_guess(draft: Draft, prefix: torch.Tensor) -> Draft:
    """Wrong: a guess that the drafter finds unlikely is left out."""
    assert draft.q is not None
    return cut(draft, torch.where(draft.q[:, 0].gather(1, draft.tokens[:, 1:2])[:, 0] > 0.4, 2, 0))


@pytest.mark.parametrize(("rule", "in_order"), [(Rejection(), True), (Block(), False)], ids=str)
def test_limits_from_the_past_leave_the_joint_law_and_others_do_not(rule: Any, in_order: bool):
    """By enumeration of everything that can happen."""
    target, drafter = pair(3, 1)
    for change, right in ((by_the_past, True), (by_the_guess, False)):
        law = output_law(rule, target, drafter, 3, in_order=in_order, depth=2, change=change)
        assert (distance(law, target.joint(3)) < 1e-9) == right
        assert right or distance(law, target.joint(3)) > 0.01


@pytest.mark.parametrize("rule", [Match(), Rejection(), Block()], ids=str)
def test_limits_that_follow_acceptance_leave_the_joint_law(rule: Any):
    """By sampling: a row drafts one deeper than it last accepted; a row that looks at its guess is caught."""
    target, drafter = pair(3, 1)

    def following(value: bool) -> Callable[[Feed, torch.Tensor], Draft]:
        done = [torch.zeros(1, dtype=torch.int64)]

        def draft(feed: Feed, prefix: torch.Tensor) -> Draft:
            made = grown(Plan(Shape(2)), drafter, feed, prefix)
            if value:
                return by_the_guess(made, prefix)
            last, done[0] = feed.length - done[0], feed.length.clone()
            return cut(made, last % 3)

        return draft

    assert p_value(sampled(rule, target, following(False), 50_000), target) > ALARM
    if rule.samples:
        assert p_value(sampled(rule, target, following(True), 50_000), target) < CAUGHT


class Picky(Adaptive):
    """Wrong: it takes back guesses that it does not like."""

    def propose(self, feed: Feed, state: State) -> Draft:
        draft = super().propose(feed, state)
        return draft if draft.width == 1 else cut(draft, torch.where(draft.tokens[:, 1] < 2, 0, 9))


@pytest.mark.parametrize(
    ("rule", "wrong"), [("match", False), ("rejection", False), ("rejection", True), ("block", False)]
)
def test_adaptive_sessions_have_the_models_joint_law(rule: str, wrong: bool, monkeypatch: pytest.MonkeyPatch):
    """The engine, real models and the policy by a made-up clock: the law of four tokens."""
    target, length, batch, count = tiny(0), 4, 500, 16
    now = [0.0]
    monkeypatch.setattr(limits, "perf_counter", lambda: now[0])
    drafter = (Picky if wrong else Adaptive)(make_drafter("draft_model", target, {"path": tiny(1), "depth": 3}))
    outputs, heights = list[list[int]](), set[int]()
    for n in range(count):
        sampling = Sampling(temperature=1.0, seed=5)
        session = Session(
            target,
            drafter,
            [Request([1, 2, 3], sampling, batch * n + i, length) for i in range(batch)],
            rule=RULES[rule](),
        )
        while session.running:
            session.step()
            now[0] += 1.0
            heights.add(max(session.state.rows.limits))
        outputs += [row.output for row in session.rows]
    assert heights >= {1, 2}
    p = chi_square(counts_of(torch.tensor(outputs), target.vocab), joint_of(target, [1, 2, 3], length), 5.0)
    assert p < CAUGHT if wrong else p > ALARM


def test_plain_steps_are_timed_at_their_lower_quartile():
    """Half of them slowed by drafted steps before them: drafting must not look good beside those."""
    times = Times()
    for seconds in (1.0, 1.3, 1.0, 1.3, 1.3):
        times.note(0, seconds)
        times.note(4, seconds)
    assert (times.typical[0], times.typical[4]) == (1.0, 1.3)
