"""A hybrid's draft holds the paths of both parts, and a step keeps what the better one guessed."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretoken.decode import Request, Session
from foretoken.drafter import Drafter, Feed, Needs
from foretoken.drafters import configured, make_drafter
from foretoken.drafters.hybrid import Config, Hybrid, build
from foretoken.errors import UserError
from foretoken.generation import generate
from foretoken.sampling import Sampling
from foretoken.tree import Draft, merge, stack, tree
from tests.models import BITSTORIES, STORIES, asset

settings.load_profile("ci")

CPU = torch.device("cpu")
TALE = "Once upon a time, there was a little girl named Lily. One day, Lily went to the park. " * 2

Path = tuple[int, ...]


# ---------------------------------------------------------------------------------------------------------------- merge


@st.composite
def drafts(draw: Any, rows: int) -> Draft:
    """Trees of few tokens, so that paths meet, with probes anywhere; sometimes chains that end early."""
    N = draw(st.integers(1, 7))
    tokens = [[9] + [draw(st.integers(0, 2)) for _ in range(N - 1)] for _ in range(rows)]
    if draw(st.booleans()):
        lengths = [draw(st.integers(1, N)) for _ in range(rows)]
        return stack([(t[:n], list(range(-1, n - 1))) for t, n in zip(tokens, lengths, strict=True)], CPU)
    parent = [[-1] + [draw(st.integers(-1, n - 1)) for n in range(1, N)] for _ in range(rows)]
    return tree(torch.tensor(tokens), torch.tensor(parent))


@st.composite
def pairs(draw: Any) -> tuple[Draft, Draft]:
    rows = draw(st.integers(1, 3))
    return draw(drafts(rows)), draw(drafts(rows))


def path_of(draft: Draft, row: int, node: int) -> Path | None:
    """The tokens from behind the root to the node; None for what does not hang from the root."""
    if node == 0:
        return ()
    parent = int(draft.parent[row, node])
    above = None if parent < 0 else path_of(draft, row, parent)
    return None if above is None else (*above, int(draft.tokens[row, node]))


def paths_of(draft: Draft, row: int) -> list[Path]:
    """The paths of all nodes that can be accepted, the root's first."""
    found = [path_of(draft, row, n) for n in range(draft.width)]
    return [p for p in found if p is not None]


def with_law(draft: Draft, seed: int = 0) -> Draft:
    """Random laws [B, N, 4] at the nodes."""
    q = torch.rand(*draft.tokens.shape, 4, generator=torch.Generator().manual_seed(seed))
    return tree(draft.tokens, draft.parent, q)


def check_shape(draft: Draft) -> None:
    """What holds for any draft: parents first, and the height, visibility and order that the parents say."""
    node = torch.arange(draft.width)
    assert bool((draft.parent < node).all())
    same = tree(draft.tokens, draft.parent)
    live = draft.parent >= 0
    live[:, 0] = True
    assert torch.equal(draft.ancestors[live], same.ancestors[live])
    assert draft.height >= same.height
    if draft.chained:
        assert bool(((draft.parent == node - 1) | (draft.parent < 0)).all())
    else:
        assert draft.height == same.height


@given(pairs())
def test_a_merged_draft_holds_every_path_of_both_once(pair: tuple[Draft, Draft]):
    a, b = pair
    merged = merge(a, b)
    check_shape(merged)
    most = 0
    for row in range(len(a.tokens)):
        found, union = paths_of(merged, row), set(paths_of(a, row)) | set(paths_of(b, row))
        assert len(found) == len(set(found))
        assert set(found) == union
        most = max(most, len(union))
    assert merged.width == most <= a.width + b.width - 1
    assert torch.equal(merged.tokens[:, 0], a.tokens[:, 0])
    assert merged.q is None and merged.certain is None


@given(pairs())
def test_merging_is_the_same_in_either_order_and_once_is_enough(pair: tuple[Draft, Draft]):
    a, b = pair
    for row in range(len(a.tokens)):
        assert set(paths_of(merge(a, b), row)) == set(paths_of(merge(b, a), row))
        assert paths_of(merge(merge(a, b), b), row) == paths_of(merge(a, b), row)


@pytest.mark.parametrize("drawn_first", [True, False])
@given(pair=pairs())
def test_drawn_nodes_all_stay_in_order_with_their_laws(drawn_first: bool, pair: tuple[Draft, Draft]):
    """Certain ones are the others, but for those that equal a drawn node before them."""
    a, b = with_law(pair[0]), pair[1]
    merged = merge(a, b) if drawn_first else merge(b, a)
    check_shape(merged)
    assert merged.q is not None and merged.certain is not None and a.q is not None
    for row in range(len(a.tokens)):
        drawn = [n for n in range(a.width) if path_of(a, row, n) is not None]
        kept = [n for n in range(merged.width) if not merged.certain[row, n]]
        assert [path_of(a, row, n) for n in drawn] == [path_of(merged, row, n) for n in kept]
        torch.testing.assert_close(merged.q[row, kept], a.q[row, drawn], rtol=0, atol=0)
        others = [n for n in range(merged.width) if n not in kept and path_of(merged, row, n) is not None]
        copied = [path_of(merged, row, n) for n in others]
        assert not merged.q[row, others].any()
        taken = set(paths_of(a, row)) if drawn_first else {()}
        assert len(copied) == len(set(copied))
        assert set(copied) == set(paths_of(b, row)) - taken


def test_rows_without_guesses_stay_roots_and_a_longer_chain_stays_a_chain():
    alone = tree(torch.tensor([[5], [6]]), torch.full((2, 1), -1))
    merged = merge(alone, alone)
    assert (merged.tokens.tolist(), merged.parent.tolist(), merged.height) == ([[5], [6]], [[-1], [-1]], 0)
    short = stack([([5, 1], [-1, 0]), ([6], [-1])], CPU)
    long = stack([([5, 1, 2], [-1, 0, 1]), ([6, 3], [-1, 0])], CPU)
    for merged in (merge(short, long), merge(long, short), merge(long, alone)):
        assert merged.chained
        assert [paths_of(merged, row) for row in (0, 1)] == [[(), (1,), (1, 2)], [(), (3,)]]


# -------------------------------------------------------------------------------------------------------------- drafter


@dataclass
class Recorder:
    """A drafter that remembers what it was told and what it proposed."""

    drafter: Drafter
    fed: list[tuple[Any, ...]] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)

    @property
    def needs(self) -> Needs:
        return self.drafter.needs

    def start(self, batch: int, capacity: int) -> Any:
        return self.drafter.start(batch, capacity)

    def propose(self, feed: Feed, state: Any) -> Draft:
        self.fed.append((feed.tokens, feed.count, feed.features, feed.root, feed.length.clone()))
        self.drafts.append(self.drafter.propose(feed, state))
        return self.drafts[-1]


def accepted(draft: Draft, row: int, follows: list[int]) -> int:
    """How many of the tokens that follow a draft guessed in one path."""
    paths = set(paths_of(draft, row))
    return max(n for n in range(len(follows) + 1) if tuple(follows[:n]) in paths)


@pytest.mark.parametrize("temperature", [0.0, 0.4])
def test_every_step_accepts_what_the_better_part_would(temperature: float):
    target = asset(BITSTORIES)
    trained = Recorder(make_drafter("draft_model", target, {"path": asset(STORIES), "depth": 2}))
    copying = Recorder(make_drafter("suffix", target, {"nodes": 9}))
    assert target.tokenizer is not None
    prompts = [target.tokenizer(text)["input_ids"] for text in (TALE, "The dog", TALE[5:])]
    requests = [Request(p, Sampling(temperature=temperature, seed=3), i, 90) for i, p in enumerate(prompts)]
    session = Session(target, Hybrid(trained, copying), requests)
    better = [0, 0, 0]
    while session.running:
        before = [len(row.text) for row in session.rows]
        running = session.running
        session.step()
        for b in running:
            new = session.rows[b].text[before[b] :]
            parts = [accepted(part.drafts[-1], b, new) for part in (trained, copying)]
            assert len(new) - 1 >= max(parts) or session.rows[b].finish is not None
            better[0 if parts[0] == parts[1] else 1 if parts[0] > parts[1] else 2] += 1
    assert min(better) > 0, "each part is at times the better one"


def test_the_trained_part_is_told_what_it_is_told_alone():
    """Features, tokens, root and length at a committed position do not depend on what else was in the draft."""
    target = asset(BITSTORIES, torch.float64)
    told: list[dict[int, tuple[int, Any]]] = []
    for wrap in (lambda part: part, lambda part: Hybrid(part, make_drafter("suffix", target, {}))):
        part = Recorder(Watching())
        assert target.tokenizer is not None
        session = Session(target, wrap(part), [Request(target.tokenizer(TALE)["input_ids"], Sampling(), 0, 40)])
        while session.running:
            session.step()
        seen: dict[int, tuple[int, Any]] = {}
        for tokens, count, features, root, length in part.fed:
            first = int(length[0]) - count[0]
            seen |= {first + i: (int(tokens[0, i]), features[0, i]) for i in range(count[0])}
            assert int(root[0]) == session.rows[0].text[int(length[0])]
        told.append(seen)
    shared = set(told[0]) & set(told[1])
    assert len(shared) > len(TALE) // 8
    for at in shared:
        assert told[0][at][0] == told[1][at][0]
        torch.testing.assert_close(told[0][at][1], told[1][at][1], rtol=1e-9, atol=1e-9)


class Watching:
    """Reads the final states and guesses nothing."""

    needs = Needs(1, (-1,))

    def start(self, batch: int, capacity: int) -> Any:
        return make_drafter("suffix", asset(BITSTORIES), {}).start(batch, capacity)

    def propose(self, feed: Feed, state: Any) -> Draft:
        return stack([([root], [-1]) for root in feed.root.tolist()], CPU)


def test_needs_are_those_of_both_parts():
    target = asset(BITSTORIES)
    trained = make_drafter("draft_model", target, {"path": asset(STORIES), "depth": 3, "width": 2})
    made = Config(path=trained, copies=5)
    assert build(target, made).needs == Needs(1 + 3 * 2 + 5, ())
    assert Hybrid(Watching(), trained).needs == Needs(1 + 3 * 2, (-1,))


@pytest.mark.parametrize("rule", ["match", "rejection"])
def test_settings_reach_the_parts_from_text(rule: str):
    target = asset(BITSTORIES)
    text = {"part": "depth=2, width=1", "copy": "prompt_lookup", "copies": "4"}
    made = make_drafter(f"hybrid:draft_model:{STORIES}", target, text)
    assert isinstance(made, Hybrid)
    assert made.needs.width == 1 + 2 + 4
    whole = make_drafter(f"hybrid:draft_model:{STORIES}", target, {"part": {"depth": 2}, "copies": 0})
    assert whole.needs.width == 1 + 2 + make_drafter("suffix", target).needs.width - 1
    plain = generate(target, "Tom and his dog", drafter="none", max_new_tokens=20)
    output = generate(target, "Tom and his dog", drafter=made, rule=rule, max_new_tokens=20)
    assert output.token_ids == plain.token_ids
    assert sum(output.drafted) > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"path": "hybrid:mtp:x"}, "a part of a hybrid"),
        ({"path": "jacobi"}, "jacobi reads the target's answers"),
        ({"path": "lookahead"}, "lookahead reads the target's answers"),
        ({"path": "mtq:x"}, "'mtq' is no drafter"),
        ({"path": "mtp:x", "part": "deep=2"}, "'deep' is no setting of 'mtp'"),
        ({"path": "mtp:x", "part": "depth"}, "write it as key=value"),
        ({"path": "mtp:x", "copy": "sufix"}, "did you mean 'suffix'"),
        ({"path": "mtp:x", "copies": "-1"}, "copies is -1"),
        ({"path": "mtp:x", "copies": "few"}, "a whole number"),
    ],
)
def test_wrong_settings_are_refused_before_anything_loads(given: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        configured(Config, "hybrid", given)


def test_wrong_parts_are_refused():
    target = asset(BITSTORIES)
    with pytest.raises(UserError, match="name it as hybrid:NAME:PATH"):
        make_drafter("hybrid", target)
    for name in ("jacobi", "lookahead"):
        with pytest.raises(UserError, match="numbers anew"):
            make_drafter("hybrid", target, {"path": make_drafter(name, target)})
    hybrid = make_drafter("hybrid", target, {"path": make_drafter("early_exit", target)})
    with pytest.raises(UserError, match="a part of a hybrid"):
        make_drafter("hybrid", target, {"path": hybrid})
    with pytest.raises(UserError, match="set them where it is built"):
        make_drafter("hybrid", target, {"path": make_drafter("early_exit", target), "part": "depth=2"})


def test_block_verification_is_refused():
    target = asset(BITSTORIES)
    drafter = make_drafter("hybrid", target, {"path": make_drafter("early_exit", target)})
    with pytest.raises(UserError, match="got both in one draft"):
        generate(target, TALE, drafter=drafter, rule="block", temperature=1.0, max_new_tokens=9)


def test_drawn_guesses_come_before_copied_ones():
    """Under rejection: a copied guess may be left out behind the drawn one that it equals, not before it."""
    target = asset(BITSTORIES)
    hybrid = Recorder(make_drafter("hybrid", target, {"path": make_drafter("early_exit", target, {"width": 2})}))
    generate(target, [TALE, "The dog"], drafter=hybrid, rule="rejection", temperature=1.0, max_new_tokens=20)
    copied = 0
    for draft in hybrid.drafts:
        assert draft.q is not None and draft.certain is not None
        real = draft.parent[:, 1:] >= 0
        assert bool((draft.certain[:, 1:].cummax(1).values == draft.certain[:, 1:])[real].all())
        copied += int((draft.certain[:, 1:] & real).sum())
        assert bool((~draft.certain[:, 1:] & real).any())
    assert copied > 0
