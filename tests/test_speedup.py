"""What drafts are worth: every formula against all that can happen, what heads weigh against the modules themselves."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from foretoken.analysis import enumeration as toys
from foretoken.analysis import sizes
from foretoken.analysis import speedup as s
from foretoken.cli import Commands
from foretoken.commands.plan import plan
from foretoken.drafters import blockwise, deepseek_mtp, eagle, medusa, mtp, weighted_heads
from foretoken.errors import UserError
from foretoken.paths import expected
from foretoken.rules import Block, Match, Rejection
from tests import families
from tests.laws import ToyLM, block_branches, branches, expected_count, guesses
from tests.models import ASSETS

rates = st.floats(0.01, 0.99)
falling = st.lists(st.floats(0, 1), min_size=1, max_size=6).map(lambda x: sorted(x, reverse=True))


# ---------------------------------------------------------------------------------------------------- expected tokens


def by_trying(conditional: list[float]) -> list[float]:
    """P(A = 0), P(A = 1), ... over all patterns of right and wrong guesses, whether looked at or not."""
    found = [0.0] * (len(conditional) + 1)
    for right in itertools.product((True, False), repeat=len(conditional)):
        chance = math.prod(r if ok else 1 - r for ok, r in zip(right, conditional, strict=True))
        found[next((i for i, ok in enumerate(right) if not ok), len(right))] += chance
    return found


@settings(max_examples=50, deadline=None)
@given(rates, st.integers(0, 7))
def test_chains_yield_the_mean_of_all_patterns(alpha: float, guesses: int):
    law = by_trying([alpha] * guesses)
    tokens = 1 + sum(n * p for n, p in enumerate(law))
    assert s.chain_tokens(alpha, guesses) == pytest.approx(tokens)
    assert s.tokens_per_forward(s.geometric(alpha, guesses)) == pytest.approx(tokens)
    assert s.head_tokens(alpha, guesses + 1) == pytest.approx(tokens)
    assert s.accepted_law(s.geometric(alpha, guesses)) == pytest.approx(law)
    assert tokens <= s.most_tokens(alpha)
    assert s.alpha_of(tokens, guesses) == pytest.approx(alpha) or guesses == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(rates, min_size=1, max_size=6))
def test_survival_is_the_tail_of_all_patterns(conditional: list[float]):
    law, survival = by_trying(conditional), s.survival_of(conditional)
    assert survival == pytest.approx([sum(law[i:]) for i in range(1, len(law))])
    assert s.accepted_law(survival) == pytest.approx(law)
    assert s.conditional_of(survival) == pytest.approx(conditional)


def test_certain_and_hopeless_guesses():
    assert (s.chain_tokens(1.0, 5), s.chain_tokens(0.0, 5), s.chain_tokens(0.7, 0)) == (6.0, 1.0, 1.0)
    assert (s.most_tokens(1.0), s.most_tokens(0.0)) == (math.inf, 1.0)
    assert s.conditional_of([0.5, 0.0, 0.0]) == [0.5, 0.0, 0.0]


def test_accepted_guesses_at_seven_tenths():
    found = [round(s.chain_tokens(0.7, k) - 1, 4) for k in range(1, 9)]
    assert found == [0.7, 1.19, 1.533, 1.7731, 1.9412, 2.0588, 2.1412, 2.1988]


@pytest.mark.parametrize(("guesses", "chains"), [(1, 1), (1, 3), (3, 1), (3, 2), (3, 4), (4, 3)])
@pytest.mark.parametrize("alpha", [0.2, 0.7])
def test_parallel_guesses_yield_the_longest_of_all_patterns(alpha: float, guesses: int, chains: int):
    law = by_trying([alpha] * guesses)
    tokens = 0.0
    for runs in itertools.product(range(guesses + 1), repeat=chains):
        tokens += math.prod(law[n] for n in runs) * (1 + max(runs))
    assert s.parallel_tokens(alpha, guesses, chains) == pytest.approx(tokens)
    assert s.lookahead_tokens(alpha, guesses, chains, 1) == pytest.approx(tokens)
    assert s.lookahead_tokens(alpha, guesses, chains, 4) == pytest.approx((3 + tokens) / 4)


def tree_by_trying(parent: list[int], acceptance: list[float]) -> float:
    """Every way in which each node picks one of its children, or none."""
    children = [[m for m in range(1, len(parent)) if parent[m] == n] for n in range(len(parent))]
    tokens = 0.0
    for picks in itertools.product(*([None, *c] for c in children)):
        chance = 1.0
        for pick, below in zip(picks, children, strict=True):
            chance *= 1 - sum(acceptance[m] for m in below) if pick is None else acceptance[pick]
        node, count = picks[0], 1
        while node is not None:
            node, count = picks[node], count + 1
        tokens += chance * count
    return tokens


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.lists(rates, min_size=7, max_size=7))
def test_trees_yield_the_mean_of_all_walks(parents: list[int], shares: list[float]):
    parent = [-1, *(min(p, n) for n, p in enumerate(parents))]
    acceptance = [shares[n] / max(1, parent.count(parent[n])) for n in range(len(parent))]
    assert s.tree_tokens(parent, acceptance) == pytest.approx(tree_by_trying(parent, acceptance))


def test_probes_of_a_tree_are_never_accepted():
    assert s.tree_tokens([-1, 0, -1, 2, 1], [0, 0.5, 0.9, 0.9, 0.4]) == pytest.approx(1 + 0.5 + 0.2)
    assert s.tree_tokens([-1, 0, 1, 2], [9, 0.7, 0.7, 0.7]) == pytest.approx(s.chain_tokens(0.7, 3))


def test_published_survivals_add_up_to_published_tokens():
    """Meta's heads on code, FastMTP, DeepSeek-V3's two tokens (arXiv:2404.19737, 2509.18362, 2412.19437)."""
    assert s.tokens_per_forward([0.94, 0.84, 0.72]) == pytest.approx(3.50)
    assert s.tokens_per_forward([0.81, 0.56, 0.36]) == pytest.approx(2.73)
    assert [s.chain_tokens(a, 1) for a in (0.85, 0.90)] == pytest.approx([1.85, 1.90])
    assert s.conditional_of([0.94, 0.84, 0.72]) == pytest.approx([0.94, 0.894, 0.857], abs=5e-4)


# ----------------------------------------------------------------------------------------------------------- estimating


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(rates, st.floats(0.1, 1)), min_size=2, max_size=5), st.integers(1, 6))
def test_pooled_rates_promise_too_much_and_mean_rates_too_little(contexts: list[tuple[float, float]], guesses: int):
    """Contexts each with a rate of their own, and how often they come."""
    total = sum(w for _, w in contexts)
    survival = [sum(w * a**i for a, w in contexts) / total for i in range(1, guesses + 1)]
    tokens = s.tokens_per_forward(survival)
    mean = sum(w * a for a, w in contexts) / total
    assert s.chain_tokens(mean, guesses) <= tokens + 1e-9
    assert s.chain_tokens(s.pooled_alpha(survival), guesses) >= tokens - 1e-9


def test_rates_are_counted_as_they_are_said_to_be():
    """Three guesses a forward; a wrong one ends it."""
    easy, hard = [3, 3, 2, 3], [0, 1, 0, 0]
    tried = [min(a + 1, 3) for a in easy + hard]
    survival = s.counted_survival(easy + hard, 3)
    assert survival == [5 / 8, 4 / 8, 3 / 8]
    assert s.tokens_per_forward(survival) == 1 + sum(easy + hard) / 8
    assert s.pooled_alpha(survival) == pytest.approx(sum(easy + hard) / sum(tried))
    found = s.mean_alpha([sum(easy), sum(hard)], [sum(tried[:4]), sum(tried[4:])])
    assert found == pytest.approx((11 / 12 + 1 / 5) / 2)


def test_rates_that_differ_between_contexts():
    """Beta(2.1, 0.9), four guesses: the moments by a sum over contexts, and the three expectations."""
    survival = s.beta_survival(2.1, 0.9, 4)
    x = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    density = x**1.1 * (1 - x) ** -0.1
    assert survival == pytest.approx([float((density * x**i).sum() / density.sum()) for i in range(1, 5)], abs=1e-5)
    pooled = s.pooled_alpha(survival)
    found = [s.tokens_per_forward(survival), s.chain_tokens(survival[0], 4), pooled, s.chain_tokens(pooled, 4)]
    assert found == pytest.approx([3.0655, 2.7731, 0.7686, 3.1623], abs=5e-5)


# ----------------------------------------------------------------------------------------------------------- wall clock

TABLE = {
    0.5: "5 (1.875) 3 (1.630) 2 (1.458) 1 (1.250)",
    0.6: "7 (2.297) 4 (1.921) 3 (1.674) 2 (1.400)",
    0.7: "9 (2.972) 6 (2.353) 4 (1.981) 3 (1.583)",
    0.8: "14 (4.232) 8 (3.092) 6 (2.470) 4 (1.868)",
    0.9: "24 (7.486) 13 (4.674) 10 (3.431) 7 (2.373)",
}
"""The best number of guesses and its speed-up at c = .01, .05, .10, .20."""


@pytest.mark.parametrize("alpha", TABLE)
def test_best_lengths(alpha: float):
    found = [s.best_length(alpha, c) for c in (0.01, 0.05, 0.10, 0.20)]
    assert " ".join(f"{y.guesses} ({y.speedup:.3f})" for y in found) == TABLE[alpha]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 99), st.integers(0, 120))
def test_drafting_pays_if_guesses_are_right_more_often_than_they_cost(alpha: int, c: int):
    """Whole hundredths: near alpha = c the gain is lost in rounding."""
    found = s.best_length(alpha / 100, c / 100)
    assert s.pays(alpha / 100, c / 100) == (alpha > c) == (found.guesses > 0)
    if alpha > c:
        assert found.speedup >= (1 + alpha / 100) / (1 + c / 100) - 1e-12
    else:
        assert found == s.PLAIN


@settings(max_examples=100, deadline=None)
@given(falling, st.floats(0, 1), st.lists(st.floats(0, 1), min_size=9, max_size=9), st.floats(0, 1))
def test_the_best_length_is_that_of_all(survival: list[float], c: float, steps: list[float], own: float):
    v = [1.0]
    for step in steps:
        v.append(v[-1] + step)

    def rate(n: int) -> float:
        return (1 + sum(survival[:n])) / (v[n] + n * c + (own if n else 0))

    found = s.best_length(survival, c, v, own)
    assert found.speedup == pytest.approx(max(map(rate, range(len(survival) + 1))))
    assert found.speedup == pytest.approx(rate(found.guesses))
    assert s.best_length(survival, c, lambda width: v[width - 1], own) == found


def test_of_equally_fast_lengths_the_shortest_is_best():
    assert s.best_length([0.5, 0.5, 0.25], 0.0, [1.0, 1.0, 4 / 3, 1.5]).guesses == 1
    assert s.best_length([0.5, 0.5], 0.5) == s.PLAIN
    assert s.best_length([0.0, 0.0], 0.0) == s.PLAIN


def test_lengths_stop_where_nothing_is_known():
    assert [y.guesses for y in s.chains(0.9, 0.0, [1.0, 1.0, 1.0])] == [0, 1, 2]
    assert [y.guesses for y in s.chains([0.9, 0.8], 0.0)] == [0, 1, 2]
    assert [y.guesses for y in s.chains(0.9, 0.0, most=1)] == [0, 1]
    assert s.chains(0.9, 0.0)[-1].guesses == s.MOST


@settings(max_examples=50, deadline=None)
@given(rates, st.integers(0, 8), st.floats(0, 1), st.floats(1, 3))
def test_speedups_are_leviathans(alpha: float, guesses: int, c: float, v: float):
    top = 1 - alpha ** (guesses + 1)
    assert s.chain_speedup(alpha, guesses, c, v) == pytest.approx(top / ((1 - alpha) * (guesses * c + v)))
    found = s.operations(s.chain_tokens(alpha, guesses), guesses, c)
    assert found == pytest.approx((1 - alpha) * (guesses * c + guesses + 1) / top)
    y = s.chains(alpha, c, lambda width: v, most=8, arithmetic=c / 2)[guesses]
    if guesses:
        assert y.speedup == pytest.approx(s.chain_speedup(alpha, guesses, c, v))
        assert y.operations == pytest.approx(s.operations(y.tokens, guesses, c / 2))
    assert s.chain_speedup(alpha, guesses, c, v) >= s.chain_speedup(alpha, guesses, c + 0.1, v) or not guesses
    assert s.chain_speedup(alpha, guesses, c, v) <= s.chain_speedup(min(alpha + 0.005, 1), guesses, c, v)


def test_guesses_that_are_never_right_cost_their_time():
    for n, c, v in ((0, 0.1, 1.0), (3, 0.1, 1.2), (5, 0.0, 1.0)):
        assert s.chain_speedup(0.0, n, c, v) == pytest.approx(1 / (n * c + v))


def test_a_step_is_judging_drafting_and_the_rest():
    """In any unit: 3 tokens in 20 + 6 + 4 ms where plain decoding takes 20 ms for one."""
    assert s.speedup(3, 20, 6, 4, plain=20) == pytest.approx(2.0)
    assert s.speedup(3, 1, 0.3, 0.2) == pytest.approx(2.0)
    assert s.chains([0.9], 0.3, [1.0, 1.5], own=0.1)[1].speedup == pytest.approx(1.9 / 1.9)


def test_published_speedups_are_tokens_over_overhead():
    """Medusa's table 1 (arXiv:2401.10774), whose τ and overhead are rounded."""
    for tokens, overhead, printed in ((3.47, 1.22, 2.83), (3.14, 1.18, 2.66), (3.51, 1.23, 2.83), (3.01, 1.27, 2.35)):
        assert s.speedup(tokens, overhead, 0) == pytest.approx(printed, abs=0.025)


def test_ratios_between_measured_widths():
    assert s.between({1: 1.0, 3: 1.4, 5: 1.2}) == pytest.approx([1.0, 1.2, 1.4, 1.4, 1.4])
    assert s.between({4: 30.0, 1: 20.0, 2: 10.0}) == pytest.approx([1.0, 1.0, 1.25, 1.5])  # in any unit
    assert (s.known(s.between({1: 1, 7: 2}), 99), s.known(s.free, 999), s.known([1.0] * 9, 3)) == (6, 999, 3)
    with pytest.raises(UserError, match="widths 2, 8; it must be given at width 1"):
        s.between({8: 1.0, 2: 1.0})


def test_the_best_trees_grow_node_by_node():
    accuracy = [[0.6, 0.2, 0.1], [0.5, 0.2, 0.1], [0.4, 0.1, 0.05]]
    every = [p for n in (1, 2, 3) for p in itertools.product(range(3), repeat=n)]
    found = s.trees(accuracy, 0.1, lambda width: 1 + 0.05 * width, 0.05, 0.01, most=6)
    for y in found[1:4]:
        sets = [t for t in itertools.combinations(every, y.guesses) if all(p[:-1] in (*t, ()) for p in t)]
        yields = [expected(torch.tensor(accuracy), t) for t in sets]
        assert y.tokens == pytest.approx(max(yields))
        assert y.levels in {max(map(len, t)) for t, e in zip(sets, yields, strict=True) if e > max(yields) - 1e-9}
    for y in found[1:]:
        assert y.speedup == pytest.approx(y.tokens / (1 + 0.05 * (y.guesses + 1) + 0.1 * y.levels + 0.05))
        assert y.operations == pytest.approx((y.guesses * 1.01 + 1) / y.tokens)
    assert len(s.trees([[0.5, 0.0]], 0.1)) == 2  # what is never right is no guess
    assert len(s.trees(accuracy, 0.1, [1.0, 1.0, 1.0])) == 3


@pytest.mark.parametrize(("tokens", "block"), [(1000, 4), (12, 5), (10, 1), (7, 10)])
def test_calls_of_blockwise_decoding(tokens: int, block: int):
    """Predict, verify, accept, with heads that are always right."""
    done = calls = 0
    while done < tokens:  # a call to predict, a call to verify
        calls, done = calls + 2, done + block
    assert s.blockwise_calls(tokens, block, merged=False) == calls
    done, calls = 0, 1  # the first prediction
    while done < tokens:  # each call verifies a block and predicts the next
        calls, done = calls + 1, done + block
    assert s.blockwise_calls(tokens, block) == calls


def test_calls_with_heads_of_four():
    assert (s.blockwise_calls(1000, 4, merged=False), s.blockwise_calls(1000, 4)) == (500, 251)


def test_rows_of_lookahead():
    for W, N, G in ((3, 3, 1), (15, 5, 15), (7, 20, 20)):
        window = [(level, column) for level in range(N - 1) for column in range(W)]
        assert s.lookahead_width(W, N, G) == len(window) + len([(g, j) for g in range(G) for j in range(N - 1)])


def test_how_busy_a_device_is():
    assert s.busy(1, 989e12, 4.8e12) == pytest.approx(1 / 206, rel=1e-3)
    assert s.busy(1, 989e12, 4.8e12, size=4) == pytest.approx(1 / 412, rel=1e-3)
    assert s.busy(207, 989e12, 4.8e12) == 1.0


# --------------------------------------------------------------------------------------------------------------- toys


def laws_of(lm: ToyLM, depth: int) -> list[torch.Tensor]:
    return [lm.law(lm.prefixes(n)).view((lm.vocab,) * (n + 1)) for n in range(depth)]


@pytest.mark.parametrize("seed", range(3))
def test_chains_of_a_toy_are_judged_as_the_rules_judge_them(seed: int):
    target, drafter = ToyLM(3, 4, seed), ToyLM(3, 4, seed + 500)
    p, q = laws_of(target, 4), laws_of(drafter, 3)
    drafts = guesses(target, drafter, target.prefixes(0), 3)
    token, block = expected_count(Rejection(), drafts), expected_count(Block(), drafts, in_order=False)
    assert s.tokens_per_forward(toys.chain_survival(p, q)) == pytest.approx(token, abs=1e-12)
    assert s.tokens_per_forward(toys.block_survival(p, q)) == pytest.approx(block, abs=1e-12)
    assert toys.block_gain(p, q) == pytest.approx(block - token, abs=1e-12)
    for found, ways in (
        (toys.chain_survival(p, q), branches(Rejection(), drafts, laws=False)),
        (toys.block_survival(p, q), block_branches(Block(), drafts, laws=False)),
    ):
        reached = [sum(float((drafts.weight * w.chance * (w.last >= i)).sum()) for w in ways) for i in (1, 2, 3)]
        assert found == pytest.approx(reached, abs=1e-12)


def test_block_verification_gains_and_never_loses():
    """Twenty pairs of random laws over three tokens, three guesses."""
    gains = [toys.block_gain(toys.toy(3, 3, seed), toys.toy(3, 3, seed + 100)) for seed in range(20)]
    assert min(gains) >= 0
    assert sum(gains) / 20 == pytest.approx(0.10, abs=0.03)
    for p, q in ((toys.toy(4, 1, 1), toys.toy(4, 1, 2)), (toys.toy(3, 3, 1), toys.toy(3, 3, 1))):
        assert toys.block_gain(p, q) == pytest.approx(0, abs=1e-12)  # one guess; a drafter that is the target


def test_laws_with_zeros():
    p = [torch.tensor([0.5, 0.5, 0.0]), torch.tensor([[1.0, 0.0, 0.0]] * 3)]
    q = [torch.tensor([0.0, 0.5, 0.5]), torch.tensor([[0.5, 0.5, 0.0]] * 3)]
    assert toys.chain_survival(p, q) == pytest.approx([0.5, 0.25])
    assert toys.block_survival(p, q) == pytest.approx([0.5, 0.25])
    assert toys.sampled_tree_tokens([-1, 0, 0], p, q) == pytest.approx(1.5)  # q never draws what is left of p
    assert toys.sampled_tree_tokens([-1, 0, 1], p, q) == pytest.approx(1.75)


@pytest.mark.parametrize(("depth", "width"), [(1, 1), (1, 2), (1, 3), (2, 2), (3, 1)])
@pytest.mark.parametrize("seed", range(2))
def test_trees_of_a_toy_are_judged_as_the_rules_judge_them(depth: int, width: int, seed: int):
    """Siblings at the root, each going on alone."""
    target, drafter = ToyLM(4, 4, seed), ToyLM(4, 4, seed + 500)
    drafts = guesses(target, drafter, target.prefixes(0), depth, width)
    parent = drafts.draft.parent[0].tolist()
    found = toys.sampled_tree_tokens(parent, laws_of(target, depth), laws_of(drafter, depth))
    assert found == pytest.approx(expected_count(Rejection(), drafts), abs=1e-12)
    if width == 1:
        found = s.tokens_per_forward(toys.chain_survival(laws_of(target, depth), laws_of(drafter, depth)))
        assert toys.sampled_tree_tokens(parent, laws_of(target, depth), laws_of(drafter, depth)) == pytest.approx(found)


def test_siblings_that_are_all_tokens_are_accepted():
    p, q = toys.toy(4, 1, 1)[0], toys.toy(4, 1, 2)[0]
    chances = [float(toys.sibling_chances(p, q, n).sum()) for n in range(1, 5)]
    assert chances == sorted(chances)
    assert (chances[0], chances[-1]) == pytest.approx((toys.overlap(p, q), 1.0))
    # what was tried and refused, or accepted, or still waits: token by token never more than p
    assert bool((toys.sibling_chances(p, q, 3).sum(0) <= p + 1e-12).all())


def test_fixed_guesses_of_a_toy():
    target, other = ToyLM(3, 4, 1), ToyLM(3, 4, 2)
    p = laws_of(target, 3)
    drafts = guesses(target, other, target.prefixes(0), 3, 2, law=False, best=True)
    parent, tokens = drafts.draft.parent[0].tolist(), drafts.draft.tokens[0].tolist()
    found = toys.certain_tree_tokens(parent, tokens, p)
    assert found == pytest.approx(expected_count(Rejection(), drafts), abs=1e-12)
    sequences = list(itertools.product(range(3), repeat=3))  # under `match` the target says one of these
    paths = {0: ()}
    for n in range(1, len(parent)):
        paths[n] = (*paths[parent[n]], tokens[n])
    longest = [max(len(path) for path in paths.values() if said[: len(path)] == path) for said in sequences]
    assert found == pytest.approx(1 + sum(float(c) * n for c, n in zip(toys.joint(p).flatten(), longest, strict=True)))
    assert not Match.samples


def test_one_guess_is_accepted_as_often_as_laws_overlap():
    for seed in range(5):
        p, q = toys.toy(6, 1, seed)[0], toys.toy(6, 1, seed + 50)[0]
        assert toys.overlap(p, q) == pytest.approx(1 - float((p - q).abs().sum() / 2))
        assert toys.chain_survival([p], [q]) == pytest.approx([toys.overlap(p, q)])


def test_heads_that_are_not_told_the_guess_before():
    """The floor of the exact marginal, the ceiling of all, and what is best in which sense."""
    generator = torch.Generator().manual_seed(1)
    better = 0
    for seed in range(20):
        p = toys.toy(4, 2, seed, spread=2.0)
        marginal, best = toys.marginal(*p), toys.best_head(*p)
        nats = toys.information(*p)
        own, ceiling = toys.head_overlap(*p, marginal), toys.head_overlap(*p, best)
        assert toys.head_floor(nats) <= own <= ceiling + 1e-12
        assert torch.allclose(marginal, toys.joint(p).sum(0))
        assert float(best.sum()) == pytest.approx(1)
        better += ceiling > own + 1e-3
        kl = float((p[0][:, None] * p[1] * (p[1] / marginal).log()).sum())
        assert nats == pytest.approx(kl)
        others = torch.rand(200, 4, generator=generator, dtype=torch.float64) ** 3
        for q in torch.cat([others / others.sum(1, keepdim=True), torch.eye(4, dtype=torch.float64)]):
            assert toys.head_overlap(*p, q) <= ceiling + 1e-12
            assert float((p[0][:, None] * p[1] * (p[1] / q).log()).sum()) >= nats - 1e-12
    assert better > 10


def test_the_marginal_is_not_the_ceiling():
    """Two contexts that share no token: the likelier one's law is right more often than the mixture."""
    weight, laws = torch.tensor([0.6, 0.4]), torch.eye(2)
    assert toys.head_overlap(weight, laws, toys.marginal(weight, laws)) == pytest.approx(0.36 + 0.16)
    assert toys.head_overlap(weight, laws, toys.best_head(weight, laws)) == pytest.approx(0.6)
    assert toys.head_floor(3.0) == 0.0
    assert toys.information(weight, torch.tensor([[0.3, 0.7]] * 2)) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("mass", [0.5, 0.9, 0.99, 1.0])
def test_what_a_truncated_marginal_leaves_out(mass: float):
    for seed in range(10):
        p = toys.toy(6, 2, seed, spread=2.0)
        kept = toys.marginal(*p, mass)
        left = float(1 - kept.sum())
        assert float((toys.marginal(*p) - kept).abs().sum()) == pytest.approx(left, abs=1e-12)
        assert -1e-12 <= left <= 1 - mass + 1e-12
        sums = p[0].sort(descending=True).values.cumsum(0)
        assert 1 - left == pytest.approx(float(sums[sums >= mass - 1e-12][0]))  # one token fewer would not reach it
        off = float((kept / kept.sum() - toys.marginal(*p)).abs().sum() / 2)
        assert off <= left + 1e-12


# ---------------------------------------------------------------------------------------------------------------- sizes


@pytest.fixture(scope="module")
def llama() -> Any:
    return families.make("llama", torch.float32)


def sizes_like(target: Any) -> sizes.Target:
    c = target.config
    keys = c.num_key_value_heads * (c.hidden_size // c.num_attention_heads)
    total = sum(p.numel() for p in target.model.parameters())
    return sizes.Target(c.hidden_size, c.vocab_size, total, c.intermediate_size, c.num_hidden_layers, keys)


@pytest.mark.parametrize("guesses", [1, 3])
def test_heads_weigh_what_their_modules_do(llama: Any, guesses: int):
    """Weight for weight against the drafters' own modules."""
    t = sizes_like(llama)
    modules = {
        sizes.mtp: mtp.fresh(llama, mtp.Architecture(guesses + 1)),
        sizes.medusa: medusa.fresh(llama, medusa.Architecture(guesses)),
        sizes.medusa_shared: medusa.fresh(llama, medusa.Architecture(guesses, unembedding="shared")),
        sizes.blockwise: blockwise.fresh(llama, blockwise.Architecture(guesses + 1)),
        sizes.weighted_heads: weighted_heads.fresh(llama, weighted_heads.Architecture(guesses + 1)),
        sizes.deepseek: deepseek_mtp.fresh(llama, deepseek_mtp.Architecture(guesses, guesses)),
        sizes.deepseek_reused: deepseek_mtp.fresh(llama, deepseek_mtp.Architecture(1, guesses)),
        sizes.eagle1: eagle.fresh(llama, eagle.Architecture(version=1)),
        sizes.eagle3: eagle.fresh(llama, eagle.Architecture()),
    }
    assert {sizes.linear, *modules} == set(sizes.KINDS)
    for kind, module in modules.items():
        found = kind(t, guesses)
        weights = list(module.parameters())
        assert found.parameters == sum(w.numel() for w in weights), found.kind
        own = sum(w.numel() for w in weights if w.ndim > 1)
        assert found.guesses == guesses
        times = guesses if found.units == 1 and found.kind != "blockwise" else 1
        fusion = 3 * t.hidden**2 if kind is sizes.eagle3 else 0
        shared = 0 if kind in (sizes.eagle3, sizes.medusa) else guesses * t.unembedding
        assert found.matrices == fusion + times * (own - fusion) + shared, found.kind
    narrow = eagle.fresh(llama, eagle.Architecture(vocabulary=32))
    assert sizes.eagle3(t, guesses, 32).parameters == sum(w.numel() for w in narrow.parameters())
    wide = blockwise.fresh(llama, blockwise.Architecture(guesses + 1, hidden=20))
    assert sizes.blockwise(t, guesses, 20).parameters == sum(w.numel() for w in wide.parameters())


def test_heads_of_a_7b_model():
    t = sizes.Target(4096, 32000, 7_000_000_000, sizes.usual_inner(4096))
    assert t.inner == 11008
    three, four = sizes.linear(t, 3), sizes.linear(t, 4)
    assert three.parameters == 393_216_000
    assert three.parameters / t.parameters == pytest.approx(0.05617, abs=5e-6)
    assert four.training / (sizes.TRAINED * t.parameters) == pytest.approx(0.0749, abs=5e-5)
    assert three.training / (sizes.TRAINED * t.parameters) == pytest.approx(0.0562, abs=5e-5)
    assert (four.training, four.drafting) == (6 * 4 * 4096 * 32000, 2 * 4 * 4096 * 32000)
    assert sizes.medusa(t, 1).parameters == 4096**2 + 4096 + 4096 * 32000 == 147_853_312
    assert sizes.mtp(t, 3).each == 202_383_360
    assert sizes.logits_bytes(2048, 32000, 4) == 1_048_576_000 == 4 * sizes.logits_bytes(2048, 32000, 1)


# -------------------------------------------------------------------------------------------------------- command line

app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)
app.add_typer(plan, name="plan")


def run(*args: str) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(app, ["plan", *args], prog_name="foretoken")


def ok(*args: str) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return re.sub(r" ?\n(?=[a-z])", " ", result.stdout)  # sentences as they were before they were wrapped


def refused(*args: str) -> str:
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("foretoken: ")
    return result.stderr


def table(text: str) -> list[list[str]]:
    """The cells of the table's rows."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def test_a_table_of_lengths():
    found = ok("speed", "--alpha", "0.7", "--c", "0.1", "--most", "8")
    rows = table(found)
    assert rows[4] == ["best", "4", "2.773", "1.981", "1.95"]
    assert [row[0] for row in rows].count("best") == 1
    assert len(rows) == 9
    assert "Fastest: 4 guesses, 1.98 times plain decoding, 2.77 tokens per forward.\n" in found
    assert "1 / (1 - alpha) = 3.333" in found


def test_measured_survivals_on_a_measured_machine(tmp_path: Path):
    measured = {"widths": {"1": {"v": 1.0}, "2": {"v": 1.1}, "4": {"v": 1.5}}}
    (tmp_path / "step.json").write_text(json.dumps(measured))
    for v in (str(tmp_path / "step.json"), "1:1,2:1.1,4:1.5", "1:20 2:22 4:30"):
        found = ok("speed", "--survival", ".8,.6,.4,.1", "--c", ".1", "--own", ".05", "--v", v, "--arithmetic", ".5")
        assert [row[1:] for row in table(found)[1:]] == [
            ["1", "1.800", f"{1.8 / 1.25:.3f}", f"{2.5 / 1.8:.2f}"],
            ["2", "2.400", f"{2.4 / 1.55:.3f}", f"{4 / 2.4:.2f}"],
            ["3", "2.800", f"{2.8 / 1.85:.3f}", f"{5.5 / 2.8:.2f}"],
        ]
    same = ok("speed", "--conditional", "0.8,0.75,0.66666666667", "--c", ".1", "--own", ".05", "--v", "1:1,2:1.1,4:1.5")
    assert [row[:4] for row in table(same)] == [row[:4] for row in table(found)]
    known = Path(__file__).parents[1] / "benchmarks" / "step_134m_bf16.json"
    assert "best" in ok("speed", "--alpha", ".7", "--v", str(known))


def test_drafting_that_does_not_pay():
    found = ok("speed", "--alpha", "0.1", "--c", "0.2")
    assert table(found)[0][0] == "best"
    assert "Drafting does not pay" in found
    assert "0.1 is not above 0.2" in found
    found = ok("speed", "--survival", "0.3,0.2", "--v", "1:1,4:3")
    assert "Drafting does not pay" in found
    assert "alpha" not in found
    assert "1 / (1 - alpha)" not in ok("speed", "--alpha", "1")


def test_the_end_of_what_is_known():
    assert "ask for more with --most" in ok("speed", "--alpha", "0.9", "--most", "3")
    assert "Nothing is known of larger drafts" in ok("speed", "--survival", "0.9,0.8")


def test_a_table_of_trees():
    found = ok("speed", "--accuracy", ".6,.15,.08;.5,.1", "--v", "1:1,8:1.2", "--c", ".1")
    rows = table(found)
    assert rows[2][1:4] == ["2", "2", "1.900"]
    assert rows[3][1:4] == ["3", "2", "2.050"]
    assert rows[3][4] == f"{2.05 / (1 + 0.2 * 3 / 7 + 0.2):.3f}"


def test_a_table_of_heads():
    found = ok("costs", "--hidden", "4096", "--vocab", "32000", "--heads", "4", "--params", "7e9")
    rows = {row[0]: row[1:] for row in table(found)}
    assert rows["linear"] == ["3 x 131.072M", "393.216M", "5.62%", "0.786", "2.359", "5.62%"]
    assert rows["the model"][1:] == ["7.000B", "100%", "14.000", "42.000", "100%"]
    assert rows["mtp"][:3] == ["3 x 202.383M", "607.150M", "8.67%"]
    assert rows["medusa"][0] == "3 x 147.853M"
    assert len(rows) == 1 + len(sizes.KINDS)
    assert "1.049 GB with 4 heads at once, 0.262 GB head by head" in found


@pytest.mark.parametrize("model", ["stdlib5M", "bitstories3M"])
def test_the_heads_of_a_model(model: str):
    target = families.foretoken.load(str(ASSETS / model), device="cpu")
    rows = {row[0]: row[1:] for row in table(ok("costs", "--model", str(ASSETS / model), "--heads", "2"))}
    assert rows["the model"][1] == f"{sum(p.numel() for p in target.model.parameters()) / 1e6:.3f}M"
    for name, module in (
        ("mtp", mtp.fresh(target, mtp.Architecture(2))),
        ("eagle1", eagle.fresh(target, eagle.Architecture(version=1))),
        ("weighted_heads", weighted_heads.fresh(target, weighted_heads.Architecture(2))),
    ):
        assert rows[name][1] == f"{sum(p.numel() for p in module.parameters()) / 1e6:.3f}M"


def test_experts_are_all_counted(tmp_path: Path):
    families.CONFIGS["mixtral"]().save_pretrained(tmp_path)
    made = families.make("mixtral", torch.float32)
    found = ok("costs", "--model", str(tmp_path), "--heads", "2")
    rows = {row[0]: row[1:] for row in table(found)}
    assert rows["the model"][1] == f"{sum(p.numel() for p in made.model.parameters()) / 1e6:.3f}M"
    assert rows["mtp"][1] == f"{sum(p.numel() for p in mtp.fresh(made, mtp.Architecture(2)).parameters()) / 1e6:.3f}M"
    assert f"All {made.config.num_local_experts} experts of a layer are counted" in found


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["speed"], "with one of --alpha"),
        (["speed", "--alpha", ".5", "--survival", ".4"], "with one of --alpha"),
        (["speed", "--alpha", "1.5"], "--alpha is 1.5; it is a probability"),
        (["speed", "--alpha", "nan"], "--alpha is nan"),
        (["speed", "--survival", ".5,.6"], "--survival rises from 0.5 to 0.6 at depth 2"),
        (["speed", "--survival", "1.5"], "--survival has 1.5"),
        (["speed", "--survival", "nan"], "--survival"),
        (["speed", "--survival", ""], "--survival is ''"),
        (["speed", "--conditional", "x"], "--conditional is 'x'"),
        (["speed", "--accuracy", ".3,.4"], "--accuracy has [0.3, 0.4] at depth 1"),
        (["speed", "--accuracy", ".6;.6,.6"], "at depth 2"),
        (["speed", "--alpha", ".5", "--c", "-1"], "--c is -1"),
        (["speed", "--alpha", ".5", "--own", "inf"], "--own is inf"),
        (["speed", "--alpha", ".5", "--arithmetic", "-2"], "--arithmetic is -2"),
        (["speed", "--alpha", ".5", "--v", "8:1.2"], "given at the widths 8; it must be given at width 1 too"),
        (["speed", "--alpha", ".5", "--v", "1:1"], "at width 1 alone"),
        (["speed", "--alpha", ".5", "--v", "1:0,2:1"], "above 0"),
        (["speed", "--alpha", ".5", "--v", "1:1,x:2"], "pairs of a width and a ratio"),
        (["speed", "--alpha", ".5", "--v", "0:1,1:1"], "pairs of a width and a ratio"),
        (["speed", "--alpha", ".5", "--v", "nowhere.json"], "is no file that `foretoken bench-step --out` wrote"),
        (["speed", "--alpha", ".5", "--v", __file__], "is no file that `foretoken bench-step --out` wrote"),
        (["costs", "--hidden", "64"], "--vocab is missing"),
        (["costs", "--model", "x", "--hidden", "64"], "--model brings its own sizes"),
        (["costs", "--model", str(ASSETS)], "is no causal language model"),
        (["costs", "--hidden", "64", "--vocab", "9", "--params", "inf"], "--params is inf"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_one_sentence(args: list[str], says: str):
    sentence = refused(*args)
    assert says in sentence
    assert sentence.count("\n") == 1
    assert sentence.endswith(".\n")
