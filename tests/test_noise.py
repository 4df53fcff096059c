"""The keyed noise: a pure function of (seed, request, position, token), with its law and its independence."""

import math
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foretoken.noise import ACCEPT, DRAFT, HIGHEST, LOWEST, RARE, RESIDUAL, TARGET, Noise, mix64
from foretoken.rules import draw
from tests.laws import ALARM, chi_square

settings.load_profile("ci")  # the same examples every time, and no deadline on a busy machine

CPU = torch.device("cpu")
STREAMS = [TARGET, DRAFT, ACCEPT, RESIDUAL]


def noise(count: int, seed: int = 0, first: int = 0) -> Noise:
    return Noise.of([seed] * count, list(range(first, first + count)), CPU)


def places(*positions: int, rows: int = 1) -> Tensor:
    return torch.tensor(positions).expand(rows, len(positions))


# ------------------------------------------------------------------------------------------------------- pure functions


@given(st.data())
@settings(max_examples=60)
def test_a_value_depends_on_its_seed_request_position_token_and_stream_only(data):
    """One value at a time, alone in its batch, against any batch of rows, positions and tokens in any order."""
    numbers = st.integers(0, 2**40)
    seeds, requests = (data.draw(st.lists(numbers, min_size=3, max_size=3)) for _ in range(2))
    positions = data.draw(st.lists(st.integers(0, 2**30), min_size=1, max_size=3))
    tokens = data.draw(st.lists(st.integers(0, 2**18), min_size=1, max_size=4))
    stream = data.draw(st.sampled_from(STREAMS))
    together = Noise.of(seeds, requests, CPU).log_exponential(places(*positions, rows=3), torch.tensor(tokens), stream)
    for b in range(3):
        for d, position in enumerate(positions):
            for i, token in enumerate(tokens):
                alone = Noise.of([seeds[b]], [requests[b]], CPU)
                value = alone.log_exponential(places(position), torch.tensor([token]), stream)
                assert float(value) == float(together[b, d, i])


def test_values_do_not_depend_on_how_many_are_asked_for_at_once():
    """More than one tile of rows: the working set is cut by rows."""
    tokens = torch.arange(5000)
    many = noise(300).log_exponential(places(3, 9, rows=300), tokens)
    for b in (0, 25, 26, 27, 131, 299):
        assert torch.equal(noise(1, first=b).log_exponential(places(3, 9), tokens)[0], many[b])


def test_selected_and_joined_rows_keep_their_noise():
    both = noise(5).select([4, 1]).join(noise(2, seed=9))
    tokens, where = torch.arange(50), places(2, 7, rows=1)
    rows = [noise(1, first=4), noise(1, first=1), noise(1, seed=9), noise(1, seed=9, first=1)]
    expected = torch.cat([n.log_exponential(where, tokens) for n in rows])
    assert torch.equal(both.log_exponential(where.expand(4, 2), tokens), expected)


def test_uniforms_and_gumbels_are_functions_of_the_same_kind():
    n, index = noise(4), torch.tensor([3, 0, 11])
    u = n.uniform(places(5, 6, rows=4), index)
    assert torch.equal(n.uniform(places(6, 5, rows=4), index.flip(0)), u.flip(1, 2))
    g = n.gumbel(places(5, rows=4), index)
    assert torch.equal(g, -n.log_exponential(places(5, rows=4), index))


def test_seed_and_request_do_not_stand_for_each_other():
    """(seed a, request b), (b, a), (a + b, 0), (a ^ b, 0): different keys, for many small a and b."""
    pairs = [(a, b) for a in range(60) for b in range(60)]
    assert len(set(Noise.of([a for a, _ in pairs], [b for _, b in pairs], CPU).key.tolist())) == len(pairs)
    assert len({mix64(x) for x in range(10_000)}) == 10_000


# ------------------------------------------------------------------------------------------------------------------ law


def gumbel_cells(edges: list[float]) -> Tensor:
    """The mass of a standard Gumbel between the edges, and outside of them."""
    below = torch.tensor([0.0, *(math.exp(-math.exp(-x)) for x in edges), 1.0], dtype=torch.float64)
    return below.diff()


@pytest.mark.parametrize("stream", STREAMS)
def test_gumbel_values_have_their_law_out_to_one_in_a_hundred_thousand(stream):
    probabilities = [1e-5, 1e-4, 1e-3, 0.01, *(i / 20 for i in range(1, 20)), 0.99, 0.999, 1 - 1e-4, 1 - 1e-5]
    edges = [-math.log(-math.log(p)) for p in probabilities]
    values = noise(4000).gumbel(places(17, rows=4000), torch.arange(2000), stream).flatten().double()
    assert (
        chi_square(torch.bincount(torch.bucketize(values, torch.tensor(edges).double())), gumbel_cells(edges)) > ALARM
    )


def test_the_largest_distance_to_the_gumbel_law_is_what_chance_allows():
    """Kolmogorov and Smirnov, over positions of one request and over tokens."""
    for values in (
        noise(1).gumbel(torch.arange(300_000)[None], torch.tensor([5])),
        noise(1).gumbel(places(8), torch.arange(300_000)),
    ):
        x = values.flatten().double().sort().values
        n = len(x)
        law = (-(-x).exp()).exp()
        gap = max(float((law - torch.arange(n) / n).max()), float((torch.arange(1, n + 1) / n - law).max()))
        assert 2 * math.exp(-2 * n * gap * gap) > ALARM


@pytest.mark.parametrize("stream", STREAMS)
def test_uniforms_are_uniform(stream):
    u = noise(200).uniform(torch.arange(500).expand(200, 500), torch.arange(8), stream).flatten()
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    assert chi_square(torch.bincount((u * 1000).long(), minlength=1000), torch.ones(1000)) > ALARM
    assert chi_square(torch.bincount((u[u < 1e-3] * 1e5).long(), minlength=100), torch.ones(100)) > ALARM


def test_every_bit_is_fair():
    bits = noise(100).bits(torch.arange(100).expand(100, 100), TARGET, torch.arange(40, dtype=torch.int32)).flatten()
    assert int(bits.min()) >= 0
    ones = torch.stack([(bits >> i & 1).sum() for i in range(31)]).double()
    z = (ones - len(bits) / 2) / math.sqrt(len(bits) / 4)
    assert float(z.abs().max()) < 6


class Extreme(Noise):
    """Noise whose bits are all the least or the greatest that there are."""

    def bits(self, position, stream, index):
        ends = torch.tensor([0, 1, 2**31 - 2, 2**31 - 1], dtype=torch.int32)
        return ends.expand(*position.shape, 4)


def test_no_value_lies_outside_the_bounds(monkeypatch):
    """The least and greatest bits map to values inside [LOWEST, HIGHEST], close to both ends, in order."""
    monkeypatch.setattr(Noise, "bits", Extreme.bits)
    values = noise(1).gumbel(places(0), torch.arange(4))[0, 0]
    assert HIGHEST - 0.1 < float(values[0]) <= HIGHEST
    assert LOWEST <= float(values[3]) < LOWEST + 0.1
    assert values.tolist() == sorted(values.tolist(), reverse=True)
    assert float(values[0]) == pytest.approx(32 * math.log(2), abs=1e-5)  # the smallest exponential is 2^-32
    u = noise(1).uniform(places(0), torch.arange(4))[0, 0]
    assert u.tolist() == [0.5 / 2**31, 1.5 / 2**31, 1 - 1.5 / 2**31, 1 - 0.5 / 2**31]


def test_rare_tokens_are_all_those_above_the_bound_and_hardly_any_others():
    tokens = torch.arange(300_000)
    n, where = noise(2), torch.tensor([[4, 5], [90, 91]])
    highest = n.gumbel(where, tokens).flatten(0, 1).amax(0)
    found = n.rare(where, tokens)
    assert bool(found[highest > RARE].all())
    assert float(highest[found].min()) > RARE - 1e-4
    assert int((highest > RARE).sum()) > 100


# --------------------------------------------------------------------------------------------------------- independence


def normal_scores(values: Tensor) -> Tensor:
    """[n, ...] Gumbel values as standard normal ones."""
    law = (-(-values.double()).exp()).exp()
    return math.sqrt(2) * torch.erfinv((2 * law - 1).clamp(-1 + 1e-12, 1 - 1e-12))


@lru_cache
def sides() -> dict[str, Tensor]:
    """What -> [n, k] values whose columns should be independent: near and far from each other in one coordinate."""
    n = 40_000
    steps = [0, 1, 2, 3, 4, 7, 8, 16, 64, 256, 1024, 4096, 65536]
    requests = noise(n)
    token, place = torch.tensor([11]), places(6, rows=n)
    return {
        "positions": requests.gumbel(places(*steps, rows=n), token)[..., 0],
        "tokens": requests.gumbel(place, torch.tensor(steps))[:, 0],
        "positions of one request": noise(1)
        .gumbel((torch.arange(n)[:, None] * 5 + torch.tensor(steps)).view(1, -1), token)
        .view(n, -1),
        "tokens of one position": noise(1)
        .gumbel(places(6), (torch.arange(n)[:, None] + torch.tensor(steps)).view(-1))
        .view(n, -1),
        "requests": torch.stack([noise(n, first=s).gumbel(place, token)[:, 0, 0] for s in steps], 1),
        "seeds": torch.stack([noise(n, seed=s).gumbel(place, token)[:, 0, 0] for s in steps], 1),
        "streams": torch.stack([requests.gumbel(place, token, s)[:, 0, 0] for s in STREAMS], 1),
        "position and stream": torch.stack(
            [requests.gumbel(places(p, rows=n), token, s)[:, 0, 0] for p in (5, 6) for s in STREAMS], 1
        ),
        "position and token": torch.stack(
            [
                requests.gumbel(places(p, rows=n), torch.tensor([t]))[:, 0, 0]
                for p, t in ((5, 6), (6, 5), (5, 5), (6, 6))
            ],
            1,
        ),
        "draft levels": requests.gumbel((places(6, rows=n) << 12) + torch.arange(4), token, DRAFT)[..., 0],
    }


SIDES = [
    "positions",
    "tokens",
    "positions of one request",
    "tokens of one position",
    "requests",
    "seeds",
    "streams",
    "position and stream",
    "position and token",
    "draft levels",
]


@pytest.mark.parametrize("what", SIDES)
def test_pairs_are_independent(what):
    """Correlations of normal scores and of their squares, and a chi-square test on 8 x 8 cells, for every pair."""
    values = sides()[what]
    n, k = values.shape
    z = normal_scores(values)
    off = ~torch.eye(k, dtype=torch.bool)
    for x in (z, z * z):
        x = (x - x.mean(0)) / x.std(0)
        assert float(((x.T @ x / n)[off] * math.sqrt(n)).abs().max()) < 6.5
    cell = (0.5 * (1 + torch.erf(z / math.sqrt(2))) * 8).long().clamp(max=7)
    overlapping = " of one " in what  # the columns are one long sequence, shifted
    for i in range(k):
        for j in range(i):
            pair = torch.bincount(cell[:, i] * 8 + cell[:, j], minlength=64)
            assert chi_square(pair, torch.ones(64)) > (ALARM / 100 if overlapping else ALARM)


@pytest.mark.parametrize("what", ["positions", "tokens", "requests", "streams"])
def test_triples_and_extremes_are_independent(what):
    """The largest values, which decide who wins, come together no more often than chance says."""
    values = sides()[what]
    top = values > -math.log(-math.log(0.99))  # one in a hundred
    n, k = values.shape
    together = sum(int((top[:, i] & top[:, j]).sum()) for i in range(k) for j in range(i))
    expected = n * 1e-4 * k * (k - 1) / 2
    assert abs(together - expected) < 6.5 * math.sqrt(expected)
    eighth = (values > -math.log(-math.log(0.5))).long()
    triples = torch.bincount(eighth[:, 0] * 4 + eighth[:, 1] * 2 + eighth[:, 2], minlength=8)
    assert chi_square(triples, torch.ones(8)) > ALARM


# -------------------------------------------------------------------------------------------------------------- winners


def test_the_winner_has_the_law_of_a_skewed_softmax_rare_tokens_too():
    """1,000 tokens from 0.6 down to 6e-7; those rarer than 1e-4 together, as often as they should be."""
    V, count = 1000, 300_000
    logits = -2.0 * torch.arange(1, V + 1, dtype=torch.float64).log()
    logits = logits[torch.randperm(V, generator=torch.Generator().manual_seed(0))]
    law = logits.softmax(-1)
    winners = torch.cat(
        [
            (logits.float() + noise(2000, first=start).gumbel(places(3, rows=2000), torch.arange(V))[:, 0]).argmax(-1)
            for start in range(0, count, 2000)
        ]
    )
    seen = torch.bincount(winners, minlength=V)
    assert chi_square(seen, law) > ALARM
    rare = law < 1e-4
    mass = float(law[rare].sum())
    assert abs(int(seen[rare].sum()) - count * mass) < 6 * math.sqrt(count * mass)


def test_winners_over_positions_of_one_request_have_the_law_too():
    law = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01])
    winners = (law.log() + noise(1).gumbel(torch.arange(200_000)[None], torch.arange(5))[0]).argmax(-1)
    assert chi_square(torch.bincount(winners, minlength=5), law) > ALARM
    pairs = torch.bincount(winners[:-1:2] * 5 + winners[1::2], minlength=25)
    assert chi_square(pairs, (law[:, None] * law).flatten()) > ALARM


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draw_has_the_law_it_is_given_and_never_takes_what_has_no_mass(dtype):
    law = torch.tensor([0.0, 0.6, 0.0, 0.3, 0.09, 0.01], dtype=dtype)
    n = 200_000
    drawn = draw(law.expand(n, 6), noise(n), torch.full((n,), 4))[:, 0]
    assert chi_square(torch.bincount(drawn, minlength=6), law.double()) > ALARM
