"""Every acceptance rule against the exact joint law of three tokens, and wrong rules that must be caught."""

import math
from dataclasses import replace
from functools import lru_cache, partial

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from foretoken import rules
from foretoken.costs import Costs, Worth
from foretoken.decode import Request, Session
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.grow import Shape
from foretoken.heads import known
from foretoken.noise import ACCEPT, DRAFT, RESIDUAL, TARGET, Noise
from foretoken.plan import Plan
from foretoken.rules import (
    RULES,
    Block,
    LossyDistance,
    LossyMinBlock,
    LossyTopK,
    LossyTypical,
    Match,
    Rejection,
)
from foretoken.sampling import Sampler, Sampling
from foretoken.target import Target
from foretoken.tree import Draft, merge, stack, tree
from tests.laws import (
    ALARM,
    HIGH,
    LOW,
    ToyLM,
    block_branches,
    branches,
    chi_square,
    counts_of,
    distance,
    expected_count,
    grown,
    guesses,
    next_law,
    output_law,
    p_value,
    sampled,
    table,
    threshold,
)

COUNT = 50_000
CPU = torch.device("cpu")
CAUGHT = 1e-12  # a wrong sampler's p-value is below this; a right one's is above ALARM


@lru_cache
def pair(vocab: int = 3, seed: int = 0) -> tuple[ToyLM, ToyLM]:
    """A target and a drafter that is about as far from it as a small model."""
    target, other = ToyLM(vocab, 6, seed), ToyLM(vocab, 6, seed + 1000)
    return target, table(0.5 * target.table + other.table)


def growing(drafter: ToyLM, depth: int, width: int = 1, stop: float = 0.0):
    return lambda feed, prefix: grown(Plan(Shape(depth, width, 0, stop)), drafter, feed, prefix)


# ---------------------------------------------------------------------------------------------------- exact, enumerated


@pytest.mark.parametrize(
    "how",
    [
        {"depth": 1},
        {"depth": 2},
        {"depth": 3},
        {"depth": 3, "stop": 0.45},
        {"depth": 1, "width": 2},
        {"depth": 1, "width": 3},
        {"depth": 2, "width": 2},
        {"depth": 2, "width": 2, "stop": 0.6},
        {"depth": 2, "law": False},
        {"depth": 2, "width": 2, "law": False, "best": True},
        {"depth": 1, "width": 3, "law": False, "best": True},
    ],
    ids=str,
)
def test_rejection_has_the_targets_joint_law(how):
    target, drafter = pair(3)
    assert distance(output_law(Rejection(), target, drafter, 3, **how), target.joint(3)) < 1e-12


@pytest.mark.parametrize(
    "how",
    [
        {"depth": 1},
        {"depth": 2},
        {"depth": 3},
        {"depth": 3, "stop": 0.45},
        {"depth": 2, "law": False},
        {"depth": 3, "law": False, "best": True},
    ],
    ids=str,
)
def test_block_verification_has_the_targets_joint_law(how):
    target, drafter = pair(3)
    assert distance(output_law(Block(), target, drafter, 3, in_order=False, **how), target.joint(3)) < 1e-12


@pytest.mark.parametrize("how", [{"depth": 2}, {"depth": 1, "width": 3}], ids=str)
def test_rejection_has_the_targets_joint_law_where_laws_have_holes(how):
    """Tokens without mass under either law, as truncation leaves them; width 3 exhausts the drafter's support of 2."""
    target, drafter = (table(top(lm.table, 2)) for lm in pair(4, 5))
    law = output_law(Rejection(), target, drafter, 3, **how)
    assert distance(law, target.joint(3)) < 1e-12
    assert float(law[target.joint(3) == 0].sum()) == 0


def top(logits: Tensor, k: int) -> Tensor:
    """-inf outside the k largest of each row."""
    rows = [[x if x in sorted(row)[-k:] else -math.inf for x in row] for row in logits.tolist()]
    return torch.tensor(rows, dtype=logits.dtype)


def test_acceptance_flips_at_the_ratio_and_leaves_the_residual():
    target, drafter = pair(4)
    given = guesses(target, drafter, target.prefixes(1), depth=1)
    R = len(given.weight)
    u = torch.full((R, 2), HIGH, dtype=torch.float64)
    found, left = threshold(Rejection(), given, u, 1), next_law(Rejection(), given, u)
    u[:, 1] = LOW
    bonus = next_law(Rejection(), given, u)
    for r in range(R):
        p, q = target.law(given.prefix[r]), drafter.law(given.prefix[r])
        x = int(given.draft.tokens[r, 1])
        assert float(found[r]) == pytest.approx(min(1.0, float(p[x] / q[x])), abs=1e-15)
        residual = (p - q).clamp(min=0) / (p - q).clamp(min=0).sum()
        if found[r] < 1:
            torch.testing.assert_close(left[r], residual, rtol=0, atol=1e-14)
        torch.testing.assert_close(bonus[r], target.law(target.after(given.prefix[r], x)), rtol=0, atol=1e-14)


def test_second_and_third_candidates_are_judged_by_what_is_left_of_both_laws():
    target, drafter = pair(4)
    given = guesses(target, drafter, target.prefixes(0), depth=1, width=3)
    u = torch.full((len(given.weight), 4), HIGH, dtype=torch.float64)
    found = torch.stack([threshold(Rejection(), given, u, n) for n in (1, 2, 3)], 1)
    for r in range(len(found)):
        p, q = target.law(given.prefix[r]).tolist(), drafter.law(given.prefix[r]).tolist()
        for n in range(3):
            x = int(given.draft.tokens[r, n + 1])
            accept = min(1.0, p[x] / q[x])
            assert float(found[r, n]) == pytest.approx(accept, abs=1e-14)
            if accept == 1:
                break  # what is left of a certain acceptance is not defined
            over = [max(0.0, a - b) for a, b in zip(p, q, strict=True)]
            p = [a / sum(over) for a in over]
            q[x] = 0.0
            q = [b / sum(q) for b in q]


# ------------------------------------------------------------------------------------ copied guesses beside drawn ones


def copied(vocab: int, prefix: Tensor) -> Draft:
    """Guesses that follow from the prefix [B] alone: up to two paths of two and one of one."""

    def row(code: int) -> tuple[list[int], list[int]]:
        tokens = [0, *((code + i) % vocab for i in (0, 1, 1, code, 2))]
        return tokens[: 2 + code % 5], [-1, 0, 0, 1, 2, 0][: 2 + code % 5]

    return stack([row(code) for code in prefix.tolist()], CPU)


def drawn_first(vocab: int):
    return lambda draft, prefix: merge(draft, copied(vocab, prefix))


def copied_first(vocab: int):
    return lambda draft, prefix: merge(copied(vocab, prefix), draft)


def alternating(vocab: int, mixed=copied_first):
    """Copied guesses between drawn ones, twins included: a copied one may be left out behind its drawn one only."""

    def change(draft: Draft, prefix: Tensor) -> Draft:
        made = mixed(vocab)(draft, prefix)
        order = torch.stack([interleaved(p, c) for p, c in zip(made.parent, made.certain, strict=True)])
        place = order.argsort(1)
        parent = made.parent.gather(1, order)
        parent = torch.where(parent < 0, parent, place.gather(1, parent.clamp(min=0)))
        q = made.q.gather(1, order[..., None].expand_as(made.q))
        return replace(tree(made.tokens.gather(1, order), parent, q), certain=made.certain.gather(1, order))

    return change


def interleaved(above: Tensor, sure: Tensor) -> Tensor:
    """[N]: an order of the nodes, parents [N] first, that takes drawn and certain [N] ones in turn if it can."""
    parent, certain = above.tolist(), sure.tolist()
    order, left = [0], list(range(1, len(parent)))
    while left:
        ready = [n for n in left if parent[n] < 0 or parent[n] in order]
        order.append(next((n for n in ready if certain[n] != certain[order[-1]]), ready[0]))
        left.remove(order[-1])
    return torch.tensor(order)


MIXED = [drawn_first, copied_first, alternating]
HOWS = [{"depth": 1}, {"depth": 2}, {"depth": 2, "width": 2}, {"depth": 1, "width": 3}]


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("mixed", MIXED)
def test_copied_guesses_beside_drawn_ones_leave_the_targets_joint_law(mixed, how):
    target, drafter = pair(3)
    assert distance(output_law(Rejection(), target, drafter, 3, change=mixed(3), **how), target.joint(3)) < 1e-12


@pytest.mark.parametrize("mixed", MIXED)
def test_copied_guesses_beside_drawn_ones_leave_laws_with_holes(mixed):
    """The drafter's support of 2 is exhausted by 3 guesses, and copied tokens may have no mass at all."""
    target, drafter = (table(top(lm.table, 2)) for lm in pair(4, 5))
    law = output_law(Rejection(), target, drafter, 3, depth=1, width=3, change=mixed(4))
    assert distance(law, target.joint(3)) < 1e-12
    assert float(law[target.joint(3) == 0].sum()) == 0


def test_drawn_guesses_first_accept_no_less_than_copied_ones_first():
    """A copied token is accepted with all its probability in either order, drawn ones with more if they come first."""
    over_last, over_alone = [], []
    for seed in range(3):
        target, drafter = pair(4, seed)
        for how in HOWS:
            first, last, alone = (
                expected_count(Rejection(), guesses(target, drafter, target.prefixes(0), change=change, **how))
                for change in (drawn_first(4), copied_first(4), lambda draft, prefix: draft)
            )
            over_last.append(first - last)
            over_alone.append(first - alone)
    assert min(over_last + over_alone) >= -1e-12
    assert sum(over_last) > 0.03 * len(over_last)
    assert sum(over_alone) > 0.03 * len(over_alone)


def test_a_drawn_guess_behind_a_rejected_copied_one_is_judged_by_what_is_left_of_p_and_all_of_q():
    target, drafter = pair(4)
    given = guesses(target, drafter, target.prefixes(0), depth=1, change=copied_first(4))
    u = torch.full((len(given.weight), 3), HIGH, dtype=torch.float64)
    found = torch.stack([threshold(Rejection(), given, u, n) for n in (1, 2)], 1)
    p, q = target.law(torch.tensor(0)), drafter.law(torch.tensor(0))
    for r, (copy, drawn) in enumerate(given.draft.tokens[:, 1:].tolist()):
        assert float(found[r, 0]) == pytest.approx(float(p[copy]), abs=1e-14)
        left = 0.0 if drawn == copy else float(p[drawn] / (1 - p[copy]))
        assert float(found[r, 1]) == pytest.approx(min(1.0, left / float(q[drawn])), abs=1e-14)


def as_if_drawn(draft: Draft) -> Draft:
    """Copied guesses are judged by the law that they were not drawn from."""
    return replace(draft, certain=None)


def without_twins(draft: Draft) -> Draft:
    """A drawn guess that a copied one before it equals is left out."""
    parent = draft.parent.clone()
    for b in range(len(parent)):
        seen = set()
        for n in range(1, draft.width):
            key = (int(draft.parent[b, n]), int(draft.tokens[b, n]))
            parent[b, n] = -1 if key in seen else parent[b, n]
            seen.add(key)
    return replace(tree(draft.tokens, parent, draft.q), certain=draft.certain)


@pytest.mark.parametrize(
    ("mixed", "wrong"),
    [
        (drawn_first, as_if_drawn),
        (copied_first, as_if_drawn),
        (copied_first, without_twins),
        (partial(alternating, mixed=drawn_first), lambda draft: draft),
    ],
    ids=["drawn first", "copied first", "without twins", "copied twins left out before their drawn ones"],
)
@pytest.mark.parametrize("how", [{"depth": 1, "width": 2}, {"depth": 2}], ids=str)
def test_wrong_mixtures_are_caught_by_enumeration(mixed, wrong, how):
    target, drafter = strangers()
    change = mixed(3)
    law = output_law(Rejection(), target, drafter, 3, change=lambda d, prefix: wrong(change(d, prefix)), **how)
    assert distance(law, target.joint(3)) > 0.01


def test_block_verification_refuses_copied_guesses_beside_drawn_ones():
    target, drafter = pair(3)
    given = guesses(target, drafter, target.prefixes(0), 2, change=drawn_first(3))
    with pytest.raises(UserError, match="got both in one draft"):
        given.judge(Block(), torch.rand(len(given.weight), given.draft.width), torch.zeros(len(given.weight), 3))


# -------------------------------------------------------------------------------------------- expected tokens per round


def overlap_tokens(target: ToyLM, drafter: ToyLM, prefix: int, depth: int) -> float:
    """1 + sum over drafts of the product of min(p, q): methods 1.2."""

    def below(code: Tensor, left: int) -> float:
        if left == 0:
            return 0.0
        least = torch.minimum(target.law(code), drafter.law(code)).tolist()
        return sum(m * (1 + below(target.after(code, t), left - 1)) for t, m in enumerate(least))

    return 1 + below(torch.tensor(prefix), depth)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_rejection_accepts_what_the_overlap_of_the_laws_allows(depth):
    for seed in range(4):
        target, drafter = pair(3, seed)
        count = expected_count(Rejection(), guesses(target, drafter, target.prefixes(0), depth))
        assert count == pytest.approx(overlap_tokens(target, drafter, 0, depth), abs=1e-12)


def test_block_verification_never_accepts_less_and_often_more():
    gains = []
    for seed in range(12):
        target, drafter = ToyLM(3, 4, seed), ToyLM(3, 4, seed + 500)
        given = guesses(target, drafter, target.prefixes(0), 3)
        gains.append(expected_count(Block(), given, in_order=False) - expected_count(Rejection(), given))
    assert min(gains) >= -1e-12
    assert 0.05 < sum(gains) / len(gains) < 0.2  # methods 1.3: 0.10 on twenty other such pairs


def test_more_candidates_accept_more():
    target, drafter = pair(4)
    counts = [expected_count(Rejection(), guesses(target, drafter, target.prefixes(0), 1, w)) for w in (1, 2, 3, 4)]
    assert counts == sorted(counts)
    assert counts[-1] == pytest.approx(2.0, abs=1e-12)  # every token is a candidate: one is accepted


@pytest.mark.parametrize(
    ("rule", "depth", "width"), [(Rejection(), 3, 1), (Rejection(), 2, 2), (Block(), 3, 1)], ids=str
)
def test_sampled_rounds_have_the_expected_length(rule, depth, width):
    target, drafter = pair(3, 7)
    given = guesses(target, drafter, target.prefixes(0), depth, width)
    expected = expected_count(rule, given, in_order=isinstance(rule, Rejection))
    count = sampled(rule, target, growing(drafter, depth, width), COUNT, seed=11).count.double()
    assert float((count.mean() - expected).abs()) < 5 * float(count.std()) / math.sqrt(COUNT)


# ---------------------------------------------------------------------------------------- sampled, with the keyed noise


def spreading(drafter: ToyLM, plan: Plan):
    """Two heads: the second knows neither the guess before it nor much of the truth."""

    def draft(feed, prefix) -> Draft:
        first = drafter.logits(prefix)
        return plan.draft(feed, *known(torch.stack([first, first.roll(1, -1)], 1)))

    return draft


PAYING = Plan(Shape(3, 2, 63), worth=lambda feed: Worth(Costs((1, 64), (1.0, 9.0), 0.1)))
RANKS = Plan(Shape(2), {1.0: [(0,), (1,), (0, 0), (1, 0), (0, 1), (2,)]})
DYNAMIC = Plan(Shape(3, 2, 4))


def planning(drafter: ToyLM, plan: Plan):
    """Guesses that know those before them, in any tree."""
    return lambda feed, prefix: grown(plan, drafter, feed, prefix)


def without_law(draft_of):
    return lambda feed, prefix: replace(draft_of(feed, prefix), q=None)


def mixing(mixed, vocab: int, draft_of):
    """Guesses that are drawn, or seen with the target's noise, and copied ones."""
    change = mixed(vocab)
    return lambda feed, prefix: change(draft_of(feed, prefix), prefix)


def scattered(vocab: int, nodes: int = 6, seed: int = 0):
    """Random trees with probes, of random tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draft(feed, prefix) -> Draft:
        B = len(prefix)
        parent = [torch.randint(-1, n, (B,), generator=generator) for n in range(1, nodes)]
        parent = torch.stack([torch.full((B,), -1), *parent], 1)
        tokens = torch.randint(0, vocab, (B, nodes), generator=generator)
        tokens[:, 0] = 0
        return tree(tokens, parent)

    return draft


SAMPLED = [
    ("match", "chain", 3, lambda d: growing(d, 2)),
    ("match", "tree", 3, lambda d: growing(d, 2, 3)),
    ("match", "random trees", 4, lambda d: scattered(4)),
    ("match", "dynamic tree", 4, lambda d: planning(d, DYNAMIC)),
    ("match", "dynamic tree of top tokens", 4, lambda d: planning(d, replace(DYNAMIC, candidates="top"))),
    ("match", "grown tree of ranks", 4, lambda d: planning(d, RANKS)),
    ("match", "tree that pays", 4, lambda d: planning(d, PAYING)),
    ("rejection", "tree that pays, of top tokens", 4, lambda d: planning(d, replace(PAYING, candidates="top"))),
    ("rejection", "tree that pays, drawn instead", 4, lambda d: planning(d, PAYING)),
    ("rejection", "dynamic tree of top tokens", 4, lambda d: planning(d, replace(DYNAMIC, candidates="top"))),
    ("rejection", "dynamic tree, drawn instead", 4, lambda d: planning(d, DYNAMIC)),
    ("rejection", "grown tree of ranks", 4, lambda d: planning(d, RANKS)),
    ("rejection", "chain of 1", 4, lambda d: growing(d, 1)),
    ("rejection", "chain of 2", 4, lambda d: growing(d, 2)),
    ("rejection", "chain of 3", 5, lambda d: growing(d, 3)),
    ("rejection", "chain that stops", 4, lambda d: growing(d, 3, 1, 0.4)),
    ("rejection", "2 paths of 2", 4, lambda d: growing(d, 2, 2)),
    ("rejection", "3 paths of 2", 3, lambda d: growing(d, 2, 3)),
    ("rejection", "3 paths that stop", 4, lambda d: growing(d, 3, 3, 0.6)),
    ("rejection", "chain without law", 4, lambda d: without_law(growing(d, 2))),
    ("rejection", "paths without law", 4, lambda d: without_law(growing(d, 2, 3))),
    ("rejection", "random trees", 4, lambda d: scattered(4)),
    ("block", "chain of 1", 4, lambda d: growing(d, 1)),
    ("block", "chain of 2", 4, lambda d: growing(d, 2)),
    ("block", "chain of 3", 5, lambda d: growing(d, 3)),
    ("block", "chain that stops", 4, lambda d: growing(d, 3, 1, 0.4)),
    ("block", "chain without law", 4, lambda d: without_law(growing(d, 2))),
    ("match", "heads' tree of ranks", 4, lambda d: spreading(d, RANKS)),
    ("rejection", "heads' chain", 4, lambda d: spreading(d, Plan(Shape(2)))),
    ("rejection", "heads' 3 paths", 4, lambda d: spreading(d, Plan(Shape(2, 3)))),
    ("rejection", "heads' tree of ranks", 4, lambda d: spreading(d, RANKS)),
    ("rejection", "heads' tree without law", 4, lambda d: without_law(spreading(d, RANKS))),
    ("block", "heads' chain", 4, lambda d: spreading(d, Plan(Shape(2)))),
    ("match", "hybrid of paths", 4, lambda d: mixing(drawn_first, 4, growing(d, 2, 2))),
    ("rejection", "hybrid of paths that stop", 4, lambda d: mixing(drawn_first, 4, growing(d, 3, 2, 0.6))),
    ("rejection", "hybrid of a tree of ranks", 4, lambda d: mixing(drawn_first, 4, spreading(d, RANKS))),
    ("rejection", "hybrid, copied first", 4, lambda d: mixing(copied_first, 4, growing(d, 2, 2))),
]


@pytest.mark.parametrize(("name", "what", "vocab", "draft"), SAMPLED, ids=[f"{s[0]}: {s[1]}" for s in SAMPLED])
def test_samples_have_the_targets_joint_law(name, what, vocab, draft):
    target, drafter = pair(vocab, 3)
    assert p_value(sampled(RULES[name](), target, draft(drafter), COUNT, seed=1), target) > ALARM


@pytest.mark.parametrize("name", ["match", "rejection", "block"])
@pytest.mark.parametrize(
    ("settings", "warp"),
    [
        (Sampling(temperature=0.6), lambda x: x / 0.6),
        (Sampling(temperature=1.3, top_k=2), lambda x: top(x, 2) / 1.3),
        (
            Sampling(temperature=1.0, logit_bias={1: -math.inf, 2: 0.7}),
            lambda x: x + torch.tensor([0, -math.inf, 0.7, 0]),
        ),
    ],
    ids=["temperature", "top-k", "bias"],
)
def test_samples_have_the_warped_targets_joint_law(name, settings, warp):
    target, drafter = pair(4, 4)
    width = 1 if name == "block" else 3  # with top-k 2, the third guess is beyond the drafter's support
    samples = sampled(RULES[name](), target, growing(drafter, 2, width), COUNT, seed=2, settings=(settings,))
    assert p_value(samples, table(warp(target.table))) > ALARM


@pytest.mark.parametrize("name", ["match", "rejection", "block"])
def test_greedy_rows_beside_sampled_ones_are_greedy_and_those_keep_their_law(name):
    target, drafter = pair(4, 6)
    settings = (Sampling(temperature=0.0), Sampling(temperature=1.0))
    samples = sampled(RULES[name](), target, growing(drafter, 3), 2 * COUNT, seed=3, settings=settings).tokens
    best, code = [], torch.tensor(0)
    for _ in range(3):
        best.append(int(target.logits(code).argmax()))
        code = target.after(code, best[-1])
    assert samples[::2].tolist() == [best] * COUNT
    assert chi_square(counts_of(samples[1::2], 4), target.joint(3)) > ALARM


@pytest.mark.parametrize("draft", [scattered(4, 8), growing(pair(4, 8)[1], 3, 3), growing(pair(4, 8)[1], 2)])
def test_match_emits_the_same_tokens_whatever_was_drafted(draft):
    target = pair(4, 8)[0]
    plain = sampled(
        Match(), target, lambda feed, prefix: tree(feed.root[:, None], feed.root[:, None] - 1), 5000, seed=4
    )
    assert plain.count.max() == 1
    guessed = sampled(Match(), target, draft, 5000, seed=4)
    assert guessed.count.double().mean() > 1.2
    assert torch.equal(guessed.tokens, plain.tokens)


def test_plain_tokens_are_the_argmax_of_scores_and_noise():
    target = pair(4, 8)[0]
    plain = sampled(Match(), target, lambda feed, prefix: tree(feed.root[:, None], feed.root[:, None] - 1), 200, seed=4)
    for request in range(200):
        noise, code = Noise.of([4], [request], torch.device("cpu")), torch.tensor(0)
        for i in range(3):
            gumbel = noise.gumbel(torch.tensor([[i + 1]]), torch.arange(4))[0, 0].double()
            token = int((target.logits(code) + gumbel).argmax())
            assert token == int(plain.tokens[request, i])
            code = target.after(code, token)


def test_looking_at_the_noise_accepts_more_than_not_looking():
    target, drafter = pair(5, 9)

    def blind(feed, prefix):
        unaware = Sampler([Sampling()], feed.sampler.noise, 5)
        return grown(Plan(Shape(2)), drafter, replace(feed, sampler=unaware), prefix)

    seeing = sampled(Match(), target, growing(drafter, 2), 20_000).count.double().mean()
    assert seeing > sampled(Match(), target, blind, 20_000).count.double().mean() + 0.1


# ---------------------------------------------------------------------------------------------------------- lossy rules


def test_rules_are_exact_or_not_as_they_say():
    """Every rule by name, on chains that it accepts: the joint law is the target's if and only if the rule says so."""
    target, drafter = pair(4, 10)
    found = {name: p_value(sampled(make(), target, growing(drafter, 2), COUNT), target) for name, make in RULES.items()}
    assert {name for name, p in found.items() if p > ALARM} == {"match", "rejection", "block"}
    assert all(p < CAUGHT for p in found.values() if p <= ALARM)
    assert {name for name, make in RULES.items() if make().exact} == {"match", "rejection", "block"}
    assert all(("lossy" in name) == (not make().exact) for name, make in RULES.items())


def typical(scores, parent, token, depth):
    p = scores.softmax(-1)
    entropy = -sum(float(x) * math.log(float(x)) for x in p if x > 0)
    return float(p[token]) > min(0.2, 0.5 * math.exp(-entropy))


def among_best(scores, parent, token, depth):
    return sum(float(x) > float(scores[token]) for x in scores) < 2


def near(scores, parent, token, depth):
    return abs(token - parent) <= 1


def early(scores, parent, token, depth):
    return depth < 2 or token == parent


def equal(scores, parent, token, depth):
    return token == parent


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        (LossyTypical(epsilon=0.2, delta=0.5), typical),
        (LossyTopK(k=2), among_best),
        (LossyDistance(distance=1), near),
        (LossyMinBlock(block=2), early),
        (LossyMinBlock(block=1), equal),
        (LossyDistance(distance=0), equal),
        (Match(), equal),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rules_that_judge_each_node_equal_their_definition(rule, fits, temperature):
    """Node by node: what the target emits at the parent, whether the token fits there, and the deepest that does."""
    B, N, V = 150, 7, 5
    draft = scattered(V, N, seed=5)(None, torch.zeros(B, dtype=torch.int64))
    values = torch.randn(B, N, V, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    noise, position = Noise.of([0] * B, list(range(B)), torch.device("cpu")), torch.arange(B)
    sampler = Sampler([Sampling(temperature=temperature)] * B, noise, V)
    accepted = rule(draft, sampler.scores(values, draft, position, [[]] * B))
    for b in range(B):
        parent, tokens = draft.parent[b].tolist(), draft.tokens[b].tolist()
        path = {0: [0]}
        for n in range(1, N):
            if (up := parent[n]) in path:
                law = values[b, up] / (temperature or 1e-6)
                said = emission(values[b, up], temperature, noise, b, int(position[b]) + len(path[up]) - 1)
                scores = values[b, up] if rule.name == "lossy_top_k" else law
                if fits(scores, said, tokens[n], len(path[up])):
                    path[n] = [*path[up], n]
        best = max(path.values(), key=len)
        assert accepted.path[b, : int(accepted.count[b])].tolist() == best
        says = emission(values[b, best[-1]], temperature, noise, b, int(position[b]) + len(best) - 1)
        assert int(accepted.next[b]) == says


def emission(values: Tensor, temperature: float, noise: Noise, row: int, position: int) -> int:
    gumbel = Noise(noise.key[row : row + 1]).gumbel(torch.tensor([[position]]), torch.arange(len(values)))[0, 0]
    return int((values + temperature * gumbel.double()).argmax())


# ------------------------------------------------------------------------------------------------------- whole sessions


@lru_cache
def tiny(seed: int) -> Target:
    """A model of five tokens whose laws depend on the whole prefix and are far from flat."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.45)
    return Target(model)


@torch.no_grad()
def joint_of(target: Target, prompt: list[int], length: int) -> Tensor:
    """[V ** length]: the law of what follows the prompt, by one forward of every sequence."""
    every = torch.cartesian_prod(*[torch.arange(target.vocab)] * length)
    ids = torch.cat([torch.tensor(prompt).expand(len(every), -1), every], 1)
    logs = target.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[:, len(prompt) - 1 : -1]
    return logs.gather(-1, every[..., None]).sum((1, 2)).exp()


@pytest.mark.parametrize(
    ("rule", "name", "how"),
    [
        ("match", "draft_model", {"depth": 2, "width": 2}),
        ("rejection", "draft_model", {"depth": 2}),
        ("rejection", "draft_model", {"depth": 2, "width": 3}),
        ("rejection", "draft_model", {"depth": 3, "width": 2, "stop": 0.4}),
        ("rejection", "early_exit", {"layers": 1, "depth": 2, "width": 2}),
        ("rejection", "marginal", {"depth": 2, "most": 3, "width": 2}),
        ("rejection", "lookahead", {"window": 2, "ngram": 3, "guesses": 2}),
        ("rejection", "jacobi", {"length": 2}),
        ("block", "draft_model", {"depth": 3}),
        ("block", "early_exit", {"layers": 1, "depth": 3, "stop": 0.4}),
        ("block", "jacobi", {"length": 2}),
        ("block", "marginal", {"depth": 2}),
    ],
)
def test_sessions_have_the_models_joint_law(rule, name, how):
    """The engine and real models around the rule: two prompts, the law of the four tokens behind each."""
    target, count, length = tiny(0), 8000, 4
    drafter = make_drafter(name, target, how | ({"path": tiny(1)} if name == "draft_model" else {}))
    prompts = [[1, 2, 3, 1, 2], [4, 0]]
    sampling = Sampling(temperature=1.0, seed=5)
    requests = [Request(prompts[i % 2], sampling, i, length) for i in range(count)]
    session = Session(target, drafter, requests, rule=RULES[rule]())
    while session.running:
        session.step()
    assert sum(row.forwards for row in session.rows) < 0.95 * count * (length - 1)  # guesses are accepted
    outputs = torch.tensor([row.output for row in session.rows])
    for i, prompt in enumerate(prompts):
        assert chi_square(counts_of(outputs[i::2], target.vocab), joint_of(target, prompt, length), 5.0) > ALARM


# ---------------------------------------------------------------------------------------------------- negative controls


def keeps_q(p, q, token, u, test=rules.test):
    """Candidates are drawn without replacement and judged by the law of the first one."""
    taken, p_left, _ = test(p, q, token, u)
    return taken, p_left, q


def resamples_p(p, q, token, u, test=rules.test):
    """A rejected guess is replaced by a draw from p, not from the residual."""
    taken, _, q_left = test(p, q, token, u)
    return taken, p, q_left


def lenient(p, q, token, u, test=rules.test):
    """Guesses are accepted with probability p / (0.8 q)."""
    return test(p, q, token, 0.8 * u)


def certain(p, q, token, u, test=rules.test):
    """Sampled guesses are judged as certain ones."""
    return *test(p, None, token, u)[:2], q


WRONG_TESTS = [(keeps_q, 1, 3), (keeps_q, 2, 2), (resamples_p, 2, 1), (lenient, 2, 1)]


def strangers() -> tuple[ToyLM, ToyLM]:
    """A target and a drafter that knows nothing of it, so that errors in judging show."""
    return ToyLM(3, 6, 1), ToyLM(3, 6, 21, spread=1.5)


@pytest.mark.parametrize(("wrong", "depth", "width"), WRONG_TESTS)
def test_wrong_rejection_is_caught_by_enumeration(wrong, depth, width, monkeypatch):
    target, drafter = strangers()
    monkeypatch.setattr(rules, "test", wrong)
    assert distance(output_law(Rejection(), target, drafter, 3, depth=depth, width=width), target.joint(3)) > 0.01


@pytest.mark.parametrize(("wrong", "depth", "width"), WRONG_TESTS)
def test_wrong_rejection_is_caught_by_sampling(wrong, depth, width, monkeypatch):
    target, drafter = strangers()
    monkeypatch.setattr(rules, "test", wrong)
    assert p_value(sampled(Rejection(), target, growing(drafter, depth, width), COUNT), target) < CAUGHT


def test_judging_sampled_guesses_as_certain_is_exact_but_accepts_less(monkeypatch):
    """Not a wrong rule: it shows that the machinery does not call everything unusual wrong."""
    target, drafter = pair(3, 1)
    right = expected_count(Rejection(), guesses(target, drafter, target.prefixes(0), 2))
    monkeypatch.setattr(rules, "test", certain)
    assert distance(output_law(Rejection(), target, drafter, 3, depth=2), target.joint(3)) < 1e-12
    assert expected_count(Rejection(), guesses(target, drafter, target.prefixes(0), 2)) < right - 0.05


@pytest.mark.parametrize(
    ("rule", "in_order", "how"),
    [
        (Rejection(), True, {"depth": 1, "width": 2, "best": True}),
        (Rejection(), True, {"depth": 2, "best": True}),
        (Block(), False, {"depth": 2, "best": True}),
        (Rejection(), True, {"depth": 2, "stop": 0.45, "drop": True}),
        (Block(), False, {"depth": 2, "stop": 0.45, "drop": True}),
        (LossyTypical(), True, {"depth": 2}),
        (LossyTopK(), True, {"depth": 2}),
    ],
    ids=str,
)
def test_wrong_drafts_and_lossy_rules_are_caught_by_enumeration(rule, in_order, how):
    """The likeliest tokens with a law they were not drawn from; the guess that ended the draft dropped; lossy rules."""
    target, drafter = pair(3, 1)
    assert distance(output_law(rule, target, drafter, 3, in_order=in_order, **how), target.joint(3)) > 0.01


def choosing_best(drafter: ToyLM, depth: int):
    """The likeliest tokens, with the law as if they had been drawn."""

    def draft(feed, prefix):
        unsampled = Sampler([Sampling()], feed.sampler.noise, drafter.vocab)
        made = grown(Plan(Shape(depth)), drafter, replace(feed, sampler=unsampled, samples=False), prefix)
        return replace(made, q=drafter.law(drafter.at_draft(prefix, made)))

    return draft


def dropping_the_trigger(drafter: ToyLM, depth: int, stop: float):
    def draft(feed, prefix):
        made = grown(Plan(Shape(depth, 1, 0, stop)), drafter, feed, prefix)
        chance = made.q[:, :-1].gather(2, made.tokens[:, 1:, None]).squeeze(2)
        unlikely = torch.nn.functional.pad(chance < stop, (1, 0))
        return replace(made, parent=made.parent.masked_fill(unlikely, -1))

    return draft


@pytest.mark.parametrize("rule", [Rejection(), Block()], ids=str)
@pytest.mark.parametrize("wrong", [lambda d: choosing_best(d, 2), lambda d: dropping_the_trigger(d, 2, 0.45)])
def test_wrong_drafts_are_caught_by_sampling(rule, wrong):
    target, drafter = pair(3, 1)
    assert p_value(sampled(rule, target, wrong(drafter), COUNT), target) < CAUGHT


class SamePosition(Noise):
    """The target's noise of every position is that of position 0."""

    def log_exponential(self, position, tokens, stream=TARGET):
        return Noise.log_exponential(self, torch.zeros_like(position), tokens, stream)


class SameRequest(Noise):
    """All requests share one noise."""

    def log_exponential(self, position, tokens, stream=TARGET):
        one = Noise(self.key[:1].expand(len(self.key)))
        return one.log_exponential(position, tokens, stream)


class AcceptIsDraft(Noise):
    """The uniform of node n of a chain comes from the exponential that drew its token."""

    def uniform(self, position, index, stream=ACCEPT):
        where = ((position - 1) << 12) + index
        drawn = Noise.log_exponential(self, where, torch.arange(4), DRAFT)
        return (-drawn.exp().amin(-1)).exp().double()[:, None]


class ResidualIsDraft(Noise):
    """What replaces the first guess is drawn with the noise that drew it."""

    def log_exponential(self, position, tokens, stream=TARGET):
        if stream == RESIDUAL:
            return Noise.log_exponential(self, ((position - 1) << 12) + 1, tokens, DRAFT)
        return Noise.log_exponential(self, position, tokens, stream)


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [
        (Match(), SamePosition),
        (Match(), SameRequest),
        (Rejection(), AcceptIsDraft),
        (Rejection(), ResidualIsDraft),
        (Block(), AcceptIsDraft),
        (Block(), ResidualIsDraft),
    ],
    ids=str,
)
def test_wrong_noise_is_caught(rule, wrong):
    target, drafter = pair(4, 2)
    draft = growing(drafter, 2)
    assert p_value(sampled(rule, target, draft, COUNT), target) > ALARM
    assert p_value(sampled(rule, target, draft, COUNT, wrap=lambda noise: wrong(noise.key)), target) < CAUGHT


def test_one_token_alone_would_not_show_repeated_noise():
    """Why the joint law is tested: with one noise for all positions, the first token's law is still right."""
    target, drafter = pair(4, 2)
    samples = sampled(Match(), target, growing(drafter, 2), COUNT, wrap=lambda noise: SamePosition(noise.key))
    assert chi_square(counts_of(samples.tokens[:, :1], 4), target.joint(1)) > ALARM
    assert p_value(samples, target) < CAUGHT


def test_enumeration_covers_everything_that_can_happen():
    target, drafter = pair(3, 2)
    for how in ({"depth": 2, "width": 2}, {"depth": 3, "stop": 0.45}):
        given = guesses(target, drafter, target.prefixes(1), **how)
        for found in (branches(Rejection(), given), *([] if "width" in how else [block_branches(Block(), given)])):
            total = sum(branch.chance for branch in found)
            torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
        drafts = torch.zeros(3, dtype=torch.float64).index_add(0, given.prefix - 1, given.weight)
        torch.testing.assert_close(drafts, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_chi_square_is_uniform_on_right_laws_and_zero_on_impossible_counts():
    law = ToyLM(4, 1, 3).joint(2)
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor(
        [
            chi_square(torch.bincount(torch.multinomial(law, 5000, True, generator=generator), minlength=16), law)
            for _ in range(400)
        ]
    )
    assert chi_square(torch.bincount((p * 10).long().clamp(max=9), minlength=10), torch.ones(10)) > 1e-4
    assert chi_square(torch.tensor([5, 1]), torch.tensor([1.0, 0.0])) == 0.0
