"""Walking over what was recorded is decoding: as many forwards, of the same widths, without the target."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from foretoken.bench.engine import decode
from foretoken.bench.offers import NEVER, Asked, Grown, Offer, ask, offer, walk
from foretoken.bench.shapes import ALL, candidates, with_plan
from foretoken.bench.tasks import Prompt
from foretoken.bench.tune import Tuner
from foretoken.decode import Request
from foretoken.drafters import make_drafter
from foretoken.generation import decode_all
from foretoken.rules import Match
from foretoken.sampling import Sampling
from foretoken.target import Target
from tests.models import BITSTORIES, STORIES, asset

PROMPTS = ("Once upon a time", "Tom and his dog went to the park. The dog", "Lily saw a big red")


@cache
def target() -> Target:
    return asset(BITSTORIES, torch.float32)


def requests(temperature: float) -> list[Request]:
    tokenizer: Any = target().tokenizer
    sampling = Sampling(temperature=temperature, seed=3)
    return [Request(tokenizer(p)["input_ids"], sampling, i, 20 + 15 * i) for i, p in enumerate(PROMPTS)]


@cache
def texts(temperature: float) -> list[list[int]]:
    plain = make_drafter("none", target())
    return [row.text for row in decode_all(target(), plain, requests(temperature), Match())]


def model_drafter(**settings: Any) -> Any:
    return make_drafter("draft_model", target(), {"path": asset(STORIES, torch.float32), **settings})


def recorded(make: Any, temperature: float) -> list[tuple[list[Request], Any]]:
    """(requests, offers) of all texts together and of each alone: the longest text's budget is everybody's."""
    both = list(zip(requests(temperature), texts(temperature), strict=True))
    groups = [both, *([pair] for pair in both)]
    return [([r for r, _ in g], ask(target(), make([t for _, t in g]), [r for r, _ in g])) for g in groups]


def same_as_decoding(recordings: Any, drafter: Any, depth: int, nodes: int, stop: float = 0.0) -> None:
    """The walk has the forwards and widths of real decoding."""
    for asked, offers in recordings:
        watch = decode(target(), drafter, Match(), asked)
        found = walk(offers, depth, nodes, stop)
        assert found.forwards == [row.forwards for row in watch.rows]
        assert found.widths == watch.widths


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(
    ("name", "settings"),
    [("suffix", {}), ("suffix", {"nodes": 3}), ("prompt_lookup", {"length": 4}), ("prompt_lookup", {"length": 16})],
)
def test_copying(name: str, settings: dict[str, Any], temperature: float):
    drafter = make_drafter(name, target(), settings)
    same_as_decoding(recorded(lambda t: Asked(drafter, t), temperature), drafter, ALL, ALL)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_chains_of_every_length(temperature: float):
    """One recording of the longest chain tells of every shorter one, and of stopping early."""
    base = model_drafter(tree="chain", depth=5)
    recordings = recorded(lambda t: Grown(base, t, 5, 1), temperature)
    for depth in (1, 3, 5):
        same_as_decoding(recordings, model_drafter(tree="chain", depth=depth), depth, ALL)


@pytest.mark.parametrize("stop", [0.3, 0.6, 0.95])
def test_stopping_early(stop: float):
    """The guess that stops a chain stays in it: alone, since together the longest row decides on the width."""
    base = model_drafter(tree="chain", depth=5)
    _, *alone = recorded(lambda t: Grown(base, t, 5, 1), 0.0)
    same_as_decoding(alone, model_drafter(tree="chain", depth=5, stop=stop), 5, ALL, stop)
    levels = [n for _, offers in alone for n in walk(offers, 5, ALL, stop).levels]
    assert min(levels) < 5 < sum(levels)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("width", [2, 4])
def test_dynamic_trees_of_every_size(width: int, temperature: float):
    base = model_drafter(tree="dynamic", depth=4, width=width, nodes=width + 3 * width * width)
    recordings = recorded(lambda t: Grown(base, t, 4, width), temperature)
    for depth, nodes in ((1, 2), (2, 5), (4, 6), (4, 9)):
        drafter = model_drafter(tree="dynamic", depth=depth, width=width, nodes=nodes)
        same_as_decoding(recordings, drafter, depth, nodes)


def test_an_offer_by_hand():
    """Two guesses behind the root, two behind the first of them; the text takes 7, 9."""
    tokens, parent = [1, 7, 8, 9, 4], [-1, 0, 0, 1, 1]
    joint = np.log([0.5, 0.3, 0.2, 0.25])
    found = offer(tokens, parent, [7, 9, 2], joint)
    assert found.counts.tolist() == [2, 4]
    assert found.ranks[0].tolist() == [1, 1]  # 7 is the likeliest of all
    assert found.ranks[1].tolist() == [NEVER, 4]  # 9 comes behind 7, 8 and 4
    assert np.allclose(found.chances, [0.5, 0.5])
    assert [found.accepted(2, n) for n in (1, 3, 4)] == [1, 1, 2]
    assert (found.accepted(1, 4), found.width(1, 9), found.width(2, 3)) == (1, 3, 4)
    assert found.levels(2, 0.4) == 2
    assert found.levels(2, 0.6) == 1
    wrong = offer(tokens, parent, [8, 9], joint)
    assert wrong.accepted(2, 4) == 1  # 9 is right behind 7 only
    assert offer([1], [-1], [7], None).accepted(3, 3) == 0


def test_a_walk_by_hand():
    """Rows together: the widest draft is everybody's, and a row that is done waits."""

    def guessed(right: int) -> Offer:
        ranks = np.full((2, 2), NEVER)
        ranks[:right, :] = np.arange(1, right + 1)[:, None]
        return Offer(ranks, np.array([1, 2]), np.ones(2))

    long, short = [guessed(n) for n in (2, 0, 0, 1, 0, 0)], [guessed(0), guessed(0)]
    found = walk([long, short], 2, 2)
    assert found.forwards == [3, 2]  # 0 -> 3 -> 5 -> 6
    assert found.widths == [3, 3, 3]
    assert walk([long], 1, 1).forwards == [4]  # 0 -> 2 -> 3 -> 5 -> 6


def test_candidates_are_what_they_say():
    """Each candidate's walk is the decoding of the drafter that it builds."""
    found = [Prompt("stories", str(i), list(r.tokens), "") for i, r in enumerate(requests(0.0))]
    tuner = Tuner(target(), found[:2], batch=1, temperature=0.0, new=24, seed=0)
    base = model_drafter()
    seen: set[str] = set()
    for drafter, settings in (("draft_model", {"path": base.model}), ("suffix", {}), ("lookahead", {})):
        for candidate in candidates(target(), drafter, settings, tuner.known, tuner.watch):
            if candidate.kind in seen and not candidate.corner:
                continue
            seen.add(candidate.kind)
            watches = tuner.watch(candidate.make())
            rows = [row for watch in watches for row in watch.rows]
            assert [n for w in candidate.walks for n in w.forwards] == [row.forwards for row in rows], candidate.label
            total = sum(row.emitted - 1 for row in rows)
            assert candidate.tokens_per_forward == pytest.approx(total / sum(row.forwards for row in rows))
            twice = make_drafter(drafter, target(), candidate.settings)
            assert [w.widths for w in tuner.watch(twice)] == [w.widths for w in watches]
    assert {k.partition(" ")[2] for k in seen if k.startswith("draft_model")} == {
        "chain",
        "dynamic 2",
        "dynamic 4",
        "dynamic 8",
    }


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("given", [{"depth": 2}, {"tree": "beam", "width": 2}, {"stop": 0.5}, {"tree": "hardware"}])
def test_a_given_tree_is_decoded(given: dict[str, Any], batch: int):
    """One candidate, the drafter as it was asked for; which nodes a hardware tree has depends on times."""
    found = [Prompt("stories", str(i), list(r.tokens), "") for i, r in enumerate(requests(0.0))]
    tuner = Tuner(target(), found[:2], batch=batch, temperature=0.0, new=24, seed=0)
    settings = given | {"path": asset(STORIES, torch.float32)}
    (candidate,) = candidates(target(), "draft_model", settings, tuner.known, tuner.watch)
    assert candidate.settings == settings
    assert candidate.corner
    assert len(candidate.walks) == 2 // batch
    assert candidate.tokens_per_forward > 1
    if given.get("tree") != "hardware":
        watches = tuner.watch(make_drafter("draft_model", target(), settings))
        assert [w.forwards for w in candidate.walks] == [[row.forwards for row in w.rows] for w in watches]
        assert [w.widths for w in candidate.walks] == [w.widths for w in watches]


def test_a_drafter_with_another_tree_keeps_its_weights():
    base = model_drafter(depth=6)
    twin = with_plan(base, tree="chain", depth=2)
    assert twin.model is base.model
    assert (twin.plan.shape.depth, base.plan.shape.depth) == (2, 6)
