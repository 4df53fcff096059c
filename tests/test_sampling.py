"""Warping and emission: against transformers' own warpers, and node by node against a slow loop over prefixes."""

import math

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from foretoken.errors import UserError
from foretoken.noise import Noise
from foretoken.sampling import Sampler, Sampling, Scores, nucleus_edge
from foretoken.tree import Draft, chain, tree

CPU = torch.device("cpu")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int) -> Noise:
    return Noise.of([0] * count, list(range(count)), CPU)


def random_logits(B: int, N: int, V: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(B, N, V, generator=generator(seed), dtype=torch.float64)


def random_tree(B: int, N: int, V: int, seed: int = 0) -> Draft:
    g = generator(seed)
    parent = torch.stack([torch.full((B,), -1), *(torch.randint(-1, n, (B,), generator=g) for n in range(1, N))], 1)
    return tree(torch.randint(0, V, (B, N), generator=g), parent)


def sampler_of(settings: list[Sampling], texts: list[list[int]], prompts: list[int], vocab: int) -> Sampler:
    """A sampler that has seen the texts, of which the first `prompts[b]` tokens are the prompt."""
    sampler = Sampler(settings, noise(len(settings)), vocab)
    longest = max(len(t) for t in texts)
    padded = torch.tensor([t + [0] * (longest - len(t)) for t in texts])
    for start in range(longest):  # token by token, as decoding does
        for output in (False, True):
            real = torch.tensor(
                [start < len(t) and (start >= n) == output for t, n in zip(texts, prompts, strict=True)]
            )
            sampler.observe(padded[:, start : start + 1], real.long(), output=output)
    return sampler


def slow(settings: Sampling, logits: Tensor, text: list[int], prompt: int) -> Tensor:
    """[V]: the scores after `text`, warped by transformers, divided by the temperature that it warps with."""
    scores, ids = logits[None].clone(), torch.tensor([text])
    for token, bias in settings.logit_bias.items():
        scores[0, token] += bias
    scores = RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)(ids, scores)
    output = text[prompt:]
    for token in set(output):
        scores[0, token] -= settings.presence_penalty
        for _ in range(output.count(token)):
            scores[0, token] -= settings.frequency_penalty
    for processor in settings.processors:
        scores = processor(ids, scores)
    scores = TemperatureLogitsWarper(settings.temperature)(ids, scores)
    if settings.top_k:
        scores = TopKLogitsWarper(settings.top_k)(ids, scores)
    if settings.top_p < 1:
        scores = TopPLogitsWarper(settings.top_p)(ids, scores)
    if settings.min_p > 0:
        scores = MinPLogitsWarper(settings.min_p)(ids, scores)
    return scores[0]


SETTINGS = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.7),
    Sampling(temperature=1.0, top_k=5),
    Sampling(temperature=0.8, top_k=1),
    Sampling(temperature=1.0, top_k=10_000),
    Sampling(temperature=1.3, top_p=0.8),
    Sampling(temperature=0.6, top_p=0.05),
    Sampling(temperature=1.0, top_p=0.999),
    Sampling(temperature=1.0, min_p=0.1),
    Sampling(temperature=0.9, top_k=12, top_p=0.7, min_p=0.05),
    Sampling(temperature=1.0, repetition_penalty=1.4),
    Sampling(temperature=1.0, repetition_penalty=0.7),
    Sampling(temperature=1.0, presence_penalty=0.9),
    Sampling(temperature=1.0, frequency_penalty=0.4),
    Sampling(temperature=1.0, repetition_penalty=1.2, presence_penalty=-0.5, frequency_penalty=0.3, top_p=0.9),
    Sampling(temperature=1.0, logit_bias={3: 2.0, 0: -math.inf, 7: -1.5}, top_k=6),
]


def node_texts(draft: Draft, texts: list[list[int]], b: int) -> list[list[int]]:
    """The prefix of every node of row b: the text, root included, then the nodes on its path, found by its parents."""

    def path(n: int) -> list[int]:
        parent = int(draft.parent[b, n])
        return [*(path(parent) if parent > 0 else []), int(draft.tokens[b, n])] if n > 0 else []

    return [texts[b] + path(n) for n in range(draft.width)]


def acceptable(draft: Draft, b: int, n: int) -> bool:
    while n > 0 and int(draft.parent[b, n]) >= 0:
        n = int(draft.parent[b, n])
    return n == 0


def check_nodes(settings: list[Sampling], scores: Scores, draft: Draft, logits: Tensor, texts, prompts) -> None:
    """Every acceptable node's law is the one that transformers makes of its own prefix."""
    law = scores.law()
    for b, setting in enumerate(settings):
        for n, text in enumerate(node_texts(draft, texts, b)):
            if acceptable(draft, b, n):
                expected = slow(setting, logits[b, n], text, prompts[b]).softmax(-1)
                torch.testing.assert_close(
                    law[b, n], expected, rtol=0, atol=1e-6, msg=lambda m, b=b: f"{settings[b]}: {m}"
                )
                assert torch.equal(law[b, n] > 0, expected > 0)


def history(B: int, V: int, seed: int) -> tuple[list[list[int]], list[int]]:
    g = generator(seed)
    texts = [torch.randint(0, V, (5 + 3 * b % 11,), generator=g).tolist() for b in range(B)]
    return texts, [2 + b % 3 for b in range(B)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_each_node_is_warped_as_transformers_warps_its_own_prefix(settings):
    V, B = 40, 3
    draft, logits = random_tree(B, 7, V, seed=1), random_logits(B, 7, V, seed=2)
    texts, prompts = history(B, V, 3)
    for b in range(B):
        draft.tokens[b, 0] = texts[b][-1]
        draft.tokens[b, 2:4] = texts[b][-2]  # a guess that repeats the text, and one that repeats a guess
    sampler = sampler_of([settings] * B, texts, prompts, V)
    check_nodes(
        [settings] * B, sampler.scores(logits, draft, torch.tensor([9] * B), texts), draft, logits, texts, prompts
    )


def test_rows_with_different_settings_are_warped_as_each_would_be_alone():
    V, B = 40, len(SETTINGS)
    draft, logits = random_tree(B, 6, V, seed=4), random_logits(B, 6, V, seed=5)
    texts, prompts = history(B, V, 6)
    position = torch.arange(B) + 3
    together = sampler_of(SETTINGS, texts, prompts, V).scores(logits, draft, position, texts)
    check_nodes(SETTINGS, together, draft, logits, texts, prompts)
    for b in range(B):
        sampler = sampler_of([SETTINGS[b]], [texts[b]], [prompts[b]], V)
        sampler.noise = noise(B).select([b])
        part = Draft(
            draft.tokens[b : b + 1], draft.parent[b : b + 1], draft.ancestors[b : b + 1], draft.height, draft.chained
        )
        alone = sampler.scores(logits[b : b + 1], part, position[b : b + 1], [texts[b]])
        assert torch.equal(alone.values[0], together.values[b])
        assert torch.equal(alone.emitted[0], together.emitted[b])
        assert torch.equal(alone.law()[0], together.law()[b])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_node_of_a_tree_is_scored_as_a_single_node_behind_its_prefix(settings):
    """Every node again, as the root of a draft of one node whose text is the node's whole prefix."""
    V, N = 40, 7
    draft, logits = random_tree(1, N, V, seed=7), random_logits(1, N, V, seed=8)
    texts, prompts = history(1, V, 9)
    draft.tokens[0, 0] = texts[0][-1]
    length = len(texts[0])
    scores = sampler_of([settings], texts, prompts, V).scores(logits, draft, torch.tensor([length]), texts)
    for n, text in enumerate(node_texts(draft, texts, 0)):
        if acceptable(draft, 0, n):
            one = sampler_of([settings], [text], prompts, V)
            single = one.scores(
                logits[:, n : n + 1], chain(torch.tensor([[text[-1]]])), torch.tensor([len(text)]), [text]
            )
            torch.testing.assert_close(single.values[0, 0], scores.values[0, n], rtol=0, atol=1e-6)
            assert int(single.emitted[0, 0]) == int(scores.emitted[0, n])


# ------------------------------------------------------------------------------------------------------------- emission


@pytest.mark.parametrize("V", [30, 3000])
def test_emitted_is_the_argmax_of_every_score_plus_noise(V):
    """Against the whole vocabulary and each node's own position; few, many and all tokens can still win."""
    B, N = 8, 6
    mixed = [0.0, 0.05, 0.3, 0.8, 1.0, 1.5, 4.0, 0.0]
    for draft in (random_tree(B, N, V, seed=10), chain(random_tree(B, N, V, seed=10).tokens)):
        for spread, top_p, temperatures in (
            (0.1, 1.0, mixed),
            (3.0, 1.0, mixed),
            (30.0, 1.0, mixed),
            (3.0, 0.9, mixed),
            (3.0, 1.0, [0.05] * B),
            (3.0, 1.0, [0.1] * B),
        ):
            logits, position = random_logits(B, N, V, 11, spread), torch.arange(B) * 7
            sampler = Sampler([Sampling(temperature=t, top_p=top_p) for t in temperatures], noise(B), V)
            scores = sampler.scores(logits, draft, position, [[]] * B)
            for b in range(B):
                where = (position[b] + draft.depth[b])[None]
                gumbel = Noise(sampler.noise.key[b : b + 1]).gumbel(where, torch.arange(V))[0].double()
                full = scores.values[b] + torch.tensor(temperatures[b]).double() * gumbel
                assert scores.emitted[b].tolist() == full.argmax(-1).tolist()


def test_few_tokens_are_left_to_contend_where_the_law_is_peaked():
    """The fast path is taken, so that the test above covers it, and it leaves what it must."""
    B, N, V = 8, 6, 3000
    for temperature, spread in ((0.05, 3.0), (0.1, 3.0), (1.0, 30.0)):
        sampler = Sampler([Sampling(temperature=temperature)] * B, noise(B), V)
        logits = random_logits(B, N, V, 11, spread)
        scores = sampler.scores(logits, random_tree(B, N, V), torch.arange(B), [[]] * B)
        left = scores.contenders()
        assert len(left) < V / 2
        assert set(scores.emitted.flatten().tolist()) <= set(left.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tree_emits_what_its_paths_emit_as_chains(dtype):
    """Same logits, same positions, same noise: no branch changes another."""
    B, N, V = 4, 8, 50
    draft = random_tree(B, N, V, seed=13)
    logits = random_logits(B, N, V, 14).to(dtype)
    sampler = Sampler([Sampling(temperature=0.9, top_k=20)] * B, noise(B), V)
    emitted = sampler.scores(logits, draft, torch.arange(B), [[]] * B).emitted
    for b in range(B):
        for n in range(N):
            if acceptable(draft, b, n):
                path = draft.ancestors[b, n].nonzero().flatten()
                one = Sampler([Sampling(temperature=0.9, top_k=20)], noise(B).select([b]), V)
                line = one.scores(logits[b, path][None], chain(draft.tokens[b, path][None]), torch.tensor([b]), [[]])
                assert line.emitted[0].tolist() == emitted[b, path].tolist()


def test_greedy_takes_the_first_of_equal_scores():
    logits = torch.tensor([[[1.0, 3.0, 3.0, 2.0]]])
    for settings in ([Sampling()], [Sampling(), Sampling(temperature=1.0)]):
        B = len(settings)
        scores = Sampler(settings, noise(B), 4).scores(
            logits.expand(B, 1, 4), chain(torch.zeros(B, 1, dtype=torch.int64)), torch.zeros(B).long(), [[]] * B
        )
        assert int(scores.emitted[0, 0]) == 1
        assert scores.law()[0, 0].tolist() == [0, 1, 0, 0]


# ----------------------------------------------------------------------------------------------------------- edge cases


def obvious_nucleus(scores: list[float], top_p: float) -> float:
    """The score of the last token of the smallest most likely set whose mass reaches top_p."""
    total = sum(math.exp(s) for s in scores)
    mass = 0.0
    for s in sorted(scores, reverse=True):
        mass += math.exp(s) / total
        if mass >= top_p:
            return s
    return min(scores)


@pytest.mark.parametrize("V", [1, 2, 100, 127, 128, 129, 2000])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 5.0])
def test_the_nucleus_ends_where_the_mass_is_reached(V, spread):
    """Flat laws need more tokens than are sorted at first (128, then 1,024, then all)."""
    scores = spread * torch.randn(1, 1, V, generator=generator(15), dtype=torch.float64)
    for top_p in (1e-6, 0.0301, 0.0633, 0.0651, 0.301, 0.511, 0.5133, 0.9003, 0.9994):  # no multiple of 1 / V
        edge = nucleus_edge(scores, torch.tensor([[[top_p]]], dtype=torch.float64))
        assert float(edge) == obvious_nucleus(scores[0, 0].tolist(), top_p)


def test_top_p_of_a_flat_law_keeps_every_tie():
    """All tokens tie with the last one of the nucleus; dropping some of them would choose by number."""
    sampler = Sampler([Sampling(temperature=1.0, top_p=0.3)], noise(1), 2000)
    scores = sampler.scores(torch.zeros(1, 1, 2000), chain(torch.tensor([[0]])), torch.tensor([0]), [[]])
    assert torch.equal(scores.values, torch.zeros(1, 1, 2000))


def test_top_k_keeps_ties_with_the_last_token():
    sampler = Sampler([Sampling(temperature=1.0, top_k=2)], noise(1), 5)
    logits = torch.tensor([[[1.0, 5.0, 3.0, 3.0, 2.0]]])
    scores = sampler.scores(logits, chain(torch.tensor([[0]])), torch.tensor([0]), [[]])
    assert (scores.values > -math.inf).tolist() == [[[False, True, True, True, False]]]
    assert torch.equal(
        TopKLogitsWarper(2)(torch.zeros(1, 1).long(), logits[0]) > -math.inf, scores.values[0] > -math.inf
    )


def test_top_p_rows_that_are_off_beside_rows_that_are_on():
    logits = random_logits(3, 2, 500, 16)
    settings = [Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.5), Sampling()]
    scores = Sampler(settings, noise(3), 500).scores(
        logits, chain(torch.zeros(3, 2).long()), torch.zeros(3).long(), [[]] * 3
    )
    assert torch.equal(scores.values[0], logits[0])
    assert torch.equal(scores.values[2], logits[2])
    for n in range(2):
        kept = TopPLogitsWarper(0.5)(torch.zeros(1, 1).long(), logits[1, n : n + 1])[0]
        assert torch.equal(scores.values[1, n], kept)


def test_the_peak_always_stays():
    settings = [
        Sampling(temperature=t, top_k=k, top_p=1e-9, min_p=0.99) for t in (0.0, 1e-3, 1.0, 50.0) for k in (0, 1)
    ]
    logits = random_logits(8, 3, 300, 17)
    scores = Sampler(settings, noise(8), 300).scores(
        logits, chain(torch.zeros(8, 3).long()), torch.zeros(8).long(), [[]] * 8
    )
    assert torch.equal(scores.emitted, logits.argmax(-1))
    assert ((scores.values > -math.inf).sum(-1) == 1).all()


def test_the_drafters_law_is_truncated_as_the_targets():
    logits = random_logits(2, 4, 60, 18).float()
    settings = [
        Sampling(temperature=0.7, top_k=7, top_p=0.9, logit_bias={5: 3.0}),
        Sampling(temperature=1.2, min_p=0.1),
    ]
    sampler = Sampler(settings, noise(2), 60)
    target = sampler.scores(logits, chain(torch.zeros(2, 4).long()), torch.zeros(2).long(), [[]] * 2)
    assert torch.equal(sampler.shape(logits), target.values)


# ------------------------------------------------------------------------------------------------------ user processors


class Recorder:
    """A processor that writes down what it was called with, and makes a token's score depend on the whole prefix."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += input_ids.tolist()
        number = (input_ids * torch.arange(1, input_ids.shape[1] + 1)).sum(-1)
        return scores.scatter_add(1, (number % scores.shape[1])[:, None], torch.full_like(scores[:, :1], 9.0))


def test_processors_see_each_nodes_own_prefix():
    V, B, N = 30, 3, 7
    draft, logits = random_tree(B, N, V, seed=19), random_logits(B, N, V, seed=20)
    texts, prompts = history(B, V, 21)
    for b in range(B):
        draft.tokens[b, 0] = texts[b][-1]
    recorder = Recorder()
    shared = [recorder]
    settings = [Sampling(temperature=1.0, processors=shared), Sampling(temperature=1.0), Sampling(processors=shared)]
    before = logits.clone()
    scores = sampler_of(settings, texts, prompts, V).scores(logits, draft, torch.tensor([5] * B), texts)
    assert torch.equal(logits, before)
    expected = [text for b in (0, 2) for text in node_texts(draft, texts, b)]
    assert sorted(recorder.calls) == sorted(expected)
    assert torch.equal(scores.values[1], logits[1])
    for b in (0, 2):
        for n, text in enumerate(node_texts(draft, texts, b)):
            alone = Recorder()(torch.tensor([text]), logits[b, n : n + 1])
            assert torch.equal(scores.values[b, n], alone[0])


def test_processors_of_different_requests_do_not_mix():
    V = 20
    draft, logits = chain(torch.tensor([[3, 4], [3, 4]])), random_logits(2, 2, V, 22)
    banning = [[NoBadWordsLogitsProcessor([[3, t]])] for t in (int(logits[b, 0].argmax()) for b in range(2))]
    settings = [Sampling(processors=p) for p in banning]
    scores = Sampler(settings, noise(2), V).scores(logits, draft, torch.tensor([1, 1]), [[3], [3]])
    for b in range(2):
        for n, text in enumerate([[3], [3, 4]]):
            expected = LogitsProcessorList(banning[b])(torch.tensor([text]), logits[b, n : n + 1])
            assert torch.equal(scores.values[b, n], expected[0])
        assert int(scores.emitted[b, 0]) != int(logits[b, 0].argmax())


# --------------------------------------------------------------------------------------------------------- select, join


def test_rows_selected_and_joined_are_scored_as_before():
    """Settings, counts, bias and noise travel with their rows."""
    V, B, N = 40, len(SETTINGS), 4
    draft, logits = random_tree(B, N, V, seed=23), random_logits(B, N, V, seed=24)
    texts, prompts = history(B, V, 25)
    position = torch.arange(B)
    whole = sampler_of(SETTINGS, texts, prompts, V).scores(logits, draft, position, texts)
    left, right = [10, 2, 15], [14, 0]

    def chosen(rows: list[int]) -> Sampler:
        sampler = sampler_of(SETTINGS, texts, prompts, V)
        sampler.select(rows)
        return sampler

    sampler = chosen(left)
    sampler.join(chosen(right))
    check_same(sampler, left + right, whole, draft, logits, position, texts)
    plain = chosen([1, 2])  # no row is penalised: nothing is counted
    assert not plain.penalised
    plain.join(chosen([12]))
    check_same(plain, [1, 2, 12], whole, draft, logits, position, texts)


def check_same(sampler: Sampler, rows: list[int], whole: Scores, draft: Draft, logits, position, texts) -> None:
    part = Draft(draft.tokens[rows], draft.parent[rows], draft.ancestors[rows], draft.height, draft.chained)
    scores = sampler.scores(logits[rows], part, position[rows], [texts[b] for b in rows])
    assert torch.equal(scores.values, whole.values[rows])
    assert torch.equal(scores.emitted, whole.emitted[rows])


def test_rows_without_penalties_that_join_penalised_ones_stay_without():
    """And those that come from a sampler that counted nothing are penalised from their own start."""
    V = 20
    penalised = sampler_of([Sampling(presence_penalty=2.0)], [[1, 2, 3]], [1], V)
    plain = sampler_of([Sampling()], [[4, 5, 6]], [1], V)
    assert plain.counts is None
    plain.join(penalised)
    logits = random_logits(2, 1, V, 26)
    scores = plain.scores(logits, chain(torch.tensor([[6], [3]])), torch.tensor([3, 3]), [[4, 5, 6], [1, 2, 3]])
    assert torch.equal(scores.values[0], logits[0])
    expected = logits[1, 0].clone()
    expected[[2, 3]] -= 2.0
    torch.testing.assert_close(scores.values[1, 0], expected, rtol=0, atol=1e-12)


def test_settings_out_of_range_say_so():
    for wrong, name in (
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 1.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": math.inf}, "presence_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
    ):
        with pytest.raises(UserError, match=f"^{name} is "):
            Sampling(**wrong)
    with pytest.raises(UserError, match="logit_bias names token 9"):
        Sampler([Sampling(logit_bias={9: 1.0})], noise(1), 9)
