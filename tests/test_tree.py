"""Trees against their definition in plain Python: follow the parents."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretoken.rules import at_parent, keep
from foretoken.tree import Accepted, chain, closure, fresh, longest, path_to, stack, tree

settings.load_profile("ci")  # the same examples every time, and no deadline on a busy machine

CPU = torch.device("cpu")


@st.composite
def forests(draw, rows=3, nodes=9):
    """`parent` lists [B][N] with parent < node and -1 anywhere."""
    N = draw(st.integers(1, nodes))
    B = draw(st.integers(1, rows))
    return [[-1] + [draw(st.integers(-1, n - 1)) for n in range(1, N)] for _ in range(B)]


@st.composite
def judged(draw):
    """Forests, and for every node whether it fits."""
    parent = draw(forests())
    return parent, [[draw(st.booleans()) for _ in row] for row in parent]


def ancestry(parent: list[int], node: int) -> list[int]:
    """The node and all above it, the highest first."""
    return ([] if parent[node] < 0 else ancestry(parent, parent[node])) + [node]


def numbered(parent: list[list[int]]):
    """A draft with these parents whose tokens differ everywhere."""
    B, N = len(parent), len(parent[0])
    return tree(100 * torch.arange(1, B + 1)[:, None] + torch.arange(N), torch.tensor(parent))


@given(forests())
def test_a_node_sees_itself_and_all_above_it(parent):
    draft = numbered(parent)
    assert torch.equal(closure(torch.tensor(parent)), draft.ancestors)
    for b, row in enumerate(parent):
        for n in range(len(row)):
            seen = ancestry(row, n)
            assert draft.ancestors[b, n].nonzero().flatten().tolist() == seen
            assert int(draft.depth[b, n]) == len(seen) - 1
    assert draft.height == max(len(ancestry(row, n)) - 1 for row in parent for n in range(len(row)))
    follows = all(p == n - 1 for row in parent for n, p in enumerate(row))
    assert draft.chained == follows


@given(judged())
def test_longest_is_the_first_of_the_deepest_nodes_that_fit_with_all_above(case):
    parent, fits = case
    draft = numbered(parent)
    before = torch.tensor(fits)
    path, count = longest(draft, before)
    assert before.tolist() == fits  # the caller's tensor is not changed
    for b, row in enumerate(parent):
        alive = [0]
        for n in range(1, len(row)):
            if row[n] in alive and fits[b][n]:
                alive.append(n)
        best = max((ancestry(row, n) for n in alive), key=len)  # `max` returns the first
        assert path[b, : int(count[b])].tolist() == best
        assert path[b, int(count[b]) :].tolist() == [0] * (len(row) - len(best))


@given(forests(), st.data())
def test_path_to_a_node_goes_from_the_top_through_its_ancestors(parent, data):
    draft = numbered(parent)
    node = [data.draw(st.integers(0, len(row) - 1)) for row in parent]
    path, count = path_to(draft, torch.tensor(node))
    for b, row in enumerate(parent):
        assert path[b, : int(count[b])].tolist() == ancestry(row, node[b])
        assert path[b, int(count[b]) :].sum() == 0


@given(judged())
def test_fresh_tokens_are_the_accepted_guesses_and_the_one_after_them(case):
    parent, fits = case
    draft = numbered(parent)
    path, count = longest(draft, torch.tensor(fits))
    after = torch.arange(7, 7 + len(parent))
    emitted = fresh(draft, Accepted(path, count, after))
    for b in range(len(parent)):
        guesses = [int(draft.tokens[b, n]) for n in path[b, : int(count[b])].tolist()[1:]]
        assert emitted[b, : int(count[b])].tolist() == [*guesses, int(after[b])]


@given(judged())
def test_keep_emits_what_the_last_accepted_node_says(case):
    parent, fits = case
    draft = numbered(parent)
    says = 1000 + draft.tokens
    accepted = keep(draft, torch.tensor(fits), says)
    for b in range(len(parent)):
        last = int(accepted.path[b, int(accepted.count[b]) - 1])
        assert int(accepted.next[b]) == 1000 + int(draft.tokens[b, last])


@given(forests())
def test_at_parent_is_the_value_of_the_node_above(parent):
    draft = numbered(parent)
    found = at_parent(draft, draft.tokens)
    for b, row in enumerate(parent):
        for n, p in enumerate(row):
            if p >= 0:
                assert int(found[b, n]) == int(draft.tokens[b, p])
        assert int(found[b, 0]) == int(draft.tokens[b, 0])


@given(st.integers(1, 4), st.integers(1, 8), st.data())
def test_a_chain_is_the_tree_of_nodes_that_follow_each_other(B, N, data):
    tokens = torch.arange(B * N).view(B, N)
    count = [data.draw(st.integers(1, N)) for _ in range(B)]
    draft = chain(tokens, torch.tensor(count))
    parent = [[n - 1 if n < count[b] else -1 for n in range(N)] for b in range(B)]
    same = tree(tokens, torch.tensor(parent))
    assert torch.equal(draft.parent, same.parent)
    assert draft.chained
    assert same.chained == all(c == N for c in count)
    assert draft.height == N - 1
    assert torch.equal(
        draft.depth, torch.arange(N).expand(B, N)
    )  # nodes past the count keep their places: they are read
    path, kept = longest(draft, torch.ones(B, N, dtype=torch.bool))
    assert kept.tolist() == count
    assert path.tolist() == [[n if n < count[b] else 0 for n in range(N)] for b in range(B)]


@given(forests(rows=1, nodes=6), forests(rows=1, nodes=6))
def test_stacked_rows_are_their_trees_and_padding_that_is_never_accepted(one, two):
    rows = [([10 + n for n in range(len(p[0]))], p[0]) for p in (one, two)]
    draft = stack(rows, CPU)
    path, count = longest(draft, torch.ones_like(draft.parent, dtype=torch.bool))
    for b, (tokens, parent) in enumerate(rows):
        n = len(tokens)
        assert draft.tokens[b, :n].tolist() == tokens
        assert draft.parent[b].tolist() == parent + [-1] * (draft.width - n)
        assert torch.equal(
            draft.ancestors[b, :n, :n], tree(torch.tensor([tokens]), torch.tensor([parent])).ancestors[0]
        )
        assert not draft.ancestors[b, :n, n:].any()
        padding = torch.ones(draft.width, draft.width).tril() if draft.chained else torch.eye(draft.width)
        assert torch.equal(draft.ancestors[b, n:], padding.bool()[n:])
        assert int(path[b, int(count[b]) - 1]) < n


@settings(max_examples=50)
@given(judged(), st.data())
def test_a_probe_and_all_below_it_are_never_accepted(case, data):
    parent, fits = case
    N = len(parent[0])
    probe = data.draw(st.integers(0, N - 1))
    parent = [[-1 if n == probe else p for n, p in enumerate(row)] for row in parent]
    path, count = longest(numbered(parent), torch.tensor(fits))
    for b in range(len(parent)):
        assert probe == 0 or probe not in path[b, : int(count[b])].tolist()


def test_the_first_of_equally_deep_paths_wins():
    draft = tree(torch.zeros(1, 5, dtype=torch.int64), torch.tensor([[-1, 0, 0, 1, 2]]))
    for fits, expected in (([1, 1, 1, 1, 1], [0, 1, 3]), ([1, 1, 1, 0, 0], [0, 1]), ([1, 1, 1, 0, 1], [0, 2, 4])):
        path, count = longest(draft, torch.tensor([fits], dtype=torch.bool))
        assert path[0, : int(count[0])].tolist() == expected
