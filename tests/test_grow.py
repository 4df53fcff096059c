"""Dynamic trees against a plain reading of EAGLE-2, and every tree over every kind of guesser."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foretoken.decode import Request, Session
from foretoken.drafter import Feed
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.grow import Growth, Guessed, Shape, grow, pruned
from foretoken.paths import planted, star
from foretoken.plan import Plan, Settings, blind, planned
from foretoken.sampling import Sampling
from foretoken.tree import Draft, closure
from tests.families import make
from tests.laws import ToyLM

VOCAB = 7


def feed_of(temperature: float = 0.0, rows: int = 2, seed: int = 3) -> Feed:
    """The feed of a session's first step, its vocabulary cut to the toy's."""
    sampling = Sampling(temperature=temperature, seed=seed)
    session = Session(
        make("llama"), make_drafter("none", make("llama")), [Request([5, 6], sampling, i, 40) for i in range(rows)]
    )
    session.sampler.vocab = VOCAB
    return session.feed()


class Toy:
    """A guesser over a toy language model, one text per row, that keeps what it was asked to read."""

    def __init__(self, rows: int = 2, seed: int = 0) -> None:
        self.lm, self.prefix = ToyLM(VOCAB, 5, seed, spread=1.5), torch.arange(rows)
        self.read: list[Growth] = []

    def begin(self) -> tuple[Tensor, Any]:
        def extend(growth: Growth) -> Tensor:
            self.read.append(growth)
            return self.lm.logits(self.lm.nodes(self.prefix, growth.tokens[:, 1:], growth.seen[..., 1:]))

        return self.lm.logits(self.prefix)[:, None], extend


def paths_of(draft: Draft, row: int) -> set[tuple[int, ...]]:
    """The token paths of a row's acceptable nodes."""
    tokens, ancestors = draft.tokens[row].tolist(), draft.ancestors[row]
    kept = [n for n in range(1, draft.width) if int(draft.parent[row, n]) >= 0]
    return {tuple(tokens[m] for m in range(1, n + 1) if ancestors[n, m]) for n in kept}


def eagle2(values: Any, width: int, depth: int, nodes: int) -> set[tuple[int, ...]]:
    """The paths that EAGLE-2 keeps: `values(path, level)` are the ranked scores [V] behind a path."""
    layer: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    every: list[tuple[float, tuple[int, ...]]] = []
    for level in range(1, depth + 1):
        offered = []
        for joint, path in layer:
            chances = values(path, level).float().log_softmax(-1)
            best = chances.argsort(descending=True, stable=True)[:width].tolist()
            offered += [(joint + min(0.0, float(chances[t])), (*path, t)) for t in best]
        every += offered
        layer = sorted(offered, key=lambda o: -o[0])[:width]
    return {path for _, path in sorted(every, key=lambda o: (-o[0], len(o[1])))[:nodes]}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("width", "depth", "nodes"), [(1, 3, 2), (2, 3, 5), (3, 2, 12), (3, 4, 9), (4, 4, 40), (7, 2, 8)]
)
def test_dynamic_trees_are_eagle_2s(width: int, depth: int, nodes: int, temperature: float):
    """Expanded by joint probability, the likeliest of all guesses kept; under the target's noise if sampled."""
    feed, toy = feed_of(temperature), Toy()
    draft = grow(Shape(depth, width, nodes), feed, *toy.begin())
    for row in range(2):

        def values(path: tuple[int, ...], level: int, row: int = row) -> Tensor:
            code = toy.prefix[row]
            for token in path:
                code = toy.lm.after(code, token)
            return feed.rank(feed.values(toy.lm.logits(code).expand(2, 1, -1)), level)[row, 0]

        assert paths_of(draft, row) == eagle2(values, width, depth, nodes)
    assert torch.equal(draft.ancestors, closure(draft.parent))
    assert [g.fresh.shape[1] for g in toy.read] == [width] * (depth - 1)
    assert draft.chained == (width == 1)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_of_equal_guesses_the_ancestor_stays(data: st.DataObject):
    """Any number of guesses kept is connected, however many are equally likely."""
    count = data.draw(st.integers(2, 20))
    above = [-1, *(data.draw(st.integers(-1, n - 1)) for n in range(1, count))]
    joint: list[float] = []
    for parent in above:
        joint.append((joint[parent] if parent >= 0 else 0.0) - data.draw(st.sampled_from([0.0, 0.0, 0.5, 1.0])))
    level = [0] * count
    for n, parent in enumerate(above):
        level[n] = 0 if parent < 0 else level[parent] + 1
    order = sorted(range(count), key=lambda n: level[n])  # guesses come by depth
    place = {n: i for i, n in enumerate(order)}
    found = Guessed(
        torch.tensor([[10 + n for n in order]]),
        torch.tensor([[place[above[n]] if above[n] >= 0 else -1 for n in order]]),
        torch.tensor([[joint[n] for n in order]]),
    )
    nodes = data.draw(st.integers(1, count))
    draft = pruned(torch.tensor([0]), found, nodes, count, chained=False)
    assert draft.width == 1 + nodes
    for n in range(1, draft.width):
        parent = int(draft.parent[0, n])
        said = above[int(draft.tokens[0, n]) - 10]
        assert 0 <= parent < n
        assert int(draft.tokens[0, parent]) == (0 if said < 0 else 10 + said)
    kept = sorted((joint[int(t) - 10] for t in draft.tokens[0, 1:]), reverse=True)
    assert kept == sorted(joint, reverse=True)[:nodes]


def test_a_dynamic_tree_of_all_guesses_holds_the_beam():
    """What a beam follows is among what a dynamic tree of the same width offers."""
    feed, toy = feed_of(), Toy()
    beam, dynamic = (grow(Shape(3, 3, nodes), feed, *toy.begin()) for nodes in (0, 21))
    for row in range(2):
        assert paths_of(beam, row) < paths_of(dynamic, row)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_planted_trees_ask_for_what_has_children_alone(temperature: float):
    """A fixed tree over guesses that depend on each other: ranks under each node's own law."""
    feed, toy = feed_of(temperature), Toy()
    ranks = [(0,), (1,), (2,), (0, 0), (0, 1), (2, 0), (0, 1, 0), (2, 0, 0), (2, 0, 1)]
    draft = planted(ranks, feed, *toy.begin())
    assert [g.fresh.shape[1] for g in toy.read] == [2, 2]
    for row in range(2):
        want = set[tuple[int, ...]]()
        for path in ranks:
            code, said = toy.prefix[row], list[int]()
            for level, rank in enumerate(path, 1):
                ranked = feed.rank(feed.values(toy.lm.logits(code).expand(2, 1, -1)), level)[row, 0]
                said.append(int(ranked.argsort(descending=True)[rank]))
                code = toy.lm.after(code, said[-1])
            want.add(tuple(said))
        assert paths_of(draft, row) == want


def test_drawn_guesses_carry_the_law_they_were_drawn_from():
    feed, toy = replace(feed_of(1.0), samples=True), Toy()
    draft = Plan(Shape(3, 2, 9)).draft(feed, *toy.begin())
    assert draft.q is not None
    assert draft.parent[0].tolist() == [-1, 0, 0, 1, 2, 3, 4]
    for node in range(5):
        code = toy.lm.nodes(toy.prefix, draft.tokens[:, 1:], draft.ancestors[:, node : node + 1, 1:])[:, 0]
        torch.testing.assert_close(draft.q[:, node], toy.lm.law(code).float(), rtol=1e-5, atol=1e-6)
    assert float(draft.q[:, 5:].abs().sum()) == 0  # leaves have no children


def test_drawn_guesses_stand_in_a_fixed_tree_where_there_is_one():
    """A dynamic tree chooses by value, which would bias what is drawn."""
    toy, plan = Toy(), Plan(Shape(3, 2, 5), {1.0: [(0,), (1,), (2,), (1, 0)]})
    drawn = plan.draft(replace(feed_of(1.0), samples=True), *toy.begin())
    assert drawn.parent[0].tolist() == [-1, 0, 0, 0, 2]
    assert plan.draft(feed_of(1.0), *toy.begin()).width == 6
    assert plan.nodes == 6


@pytest.mark.parametrize(
    ("candidates", "temperature", "samples", "law", "noise"),
    [
        ("auto", 1.0, True, True, True),
        ("auto", 0.6, True, False, False),
        ("sampled", 0.6, True, True, True),
        ("top", 1.0, True, False, False),
        ("auto", 1.0, False, False, True),
        ("top", 1.0, False, False, False),
    ],
)
def test_candidates(candidates: str, temperature: float, samples: bool, law: bool, noise: bool):
    """Drawn or the likeliest, by setting, rule and temperature."""
    feed, toy = replace(feed_of(temperature), samples=samples), Toy()
    draft = Plan(Shape(1, 3), candidates=candidates).draft(feed, *toy.begin())
    assert (draft.q is not None) == law
    likeliest = toy.lm.logits(toy.prefix).argsort(descending=True)[:, :3]
    assert torch.equal(draft.tokens[:, 1:], likeliest) != noise


def test_blind_feeds_see_no_noise():
    feed = feed_of(1.0)
    values = torch.randn(2, 1, VOCAB)
    assert not torch.equal(feed.rank(values, 1), values)
    assert torch.equal(blind(feed).rank(values, 1), values)


def test_star():
    assert star(2, 3) == [(0,), (1,), (0, 0), (1, 0), (0, 0, 0), (1, 0, 0)]


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"tree": "dynamc"}, "did you mean 'dynamic'"),
        ({"candidates": "best"}, "'best' is no candidates"),
        ({"depth": -1}, "depth is -1; it must be 0 or more"),
    ],
)
def test_settings_that_cannot_be(given_: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        Settings(**given_)


def test_plans_for_every_tree():
    assert planned(Settings(), 4) == Plan(Shape(4))
    assert planned(Settings(width=3, depth=2), 4) == Plan(Shape(2, 3))
    assert planned(Settings(tree="chain", width=3), 4) == Plan(Shape(4))
    assert planned(Settings(tree="dynamic", nodes=0), 4).nodes == 33
    assert planned(Settings(tree="dynamic", width=3, nodes=20), 4).slots == 21
    widths = {nodes: planned(Settings(tree="dynamic", nodes=nodes), 6).shape.width for nodes in (0, 5, 16, 48, 60)}
    assert widths == {0: 8, 5: 2, 16: 3, 48: 8, 60: 10}  # EAGLE-2's 60 guesses follow 10 paths
    assert planned(Settings(tree="dynamic", nodes=5), 4).slots == 9
    assert planned(Settings(candidates="top"), 4, {"0": [[0], [0, 0]]}).candidates == "top"
