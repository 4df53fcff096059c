"""Heads that guess every depth from one state: their trees, and that decoding sees what training trained."""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretoken.branch import Branch, last_layers
from foretoken.decode import Request, Session
from foretoken.drafters import make_drafter, module_of
from foretoken.drafters.blockwise import Blockwise
from foretoken.errors import UserError
from foretoken.generation import decode_all
from foretoken.grow import Shape
from foretoken.heads import Config, known
from foretoken.objective import Batch, Stage, predictions
from foretoken.paths import best_paths, expected, layout, planted
from foretoken.plan import Plan, planned
from foretoken.rules import Match
from foretoken.sampling import Sampling
from foretoken.target import norm_of
from foretoken.tree import closure
from tests.families import SUPPORTED, make

HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "mtp parallel": ("mtp", {"heads": 4}),
    "mtp own": ("mtp", {"heads": 3, "unembedding": "own"}),
    "mtp causal": ("mtp", {"heads": 4, "kind": "causal"}),
    "mtp anticausal": ("mtp", {"heads": 3, "kind": "anticausal"}),
    "mtp linear": ("mtp", {"heads": 3, "kind": "linear", "unembedding": "own"}),
    "medusa": ("medusa", {"heads": 3, "layers": 2}),
    "medusa shared": ("medusa", {"heads": 2, "unembedding": "shared"}),
    "blockwise": ("blockwise", {"heads": 4, "hidden": 24}),
    "weighted": ("weighted_heads", {"heads": 3}),
    "final": ("weighted_heads", {"heads": 3, "states": "final"}),
}
ADDS_POSITIONS = ("gpt2", "gpt_bigcode", "opt")
"""Families whose decoder adds positions to whatever it reads, so that no layer can stand beside the last."""
MEDUSA_CHILDREN = {
    (): 10,
    (0,): 10,
    (1,): 7,
    (2,): 3,
    (3,): 2,
    **{(i,): 1 for i in range(4, 10)},
    (0, 0): 10,
    (0, 1): 3,
    (0, 2): 2,
    **{(0, i): 1 for i in range(3, 8)},
    (1, 0): 2,
    (2, 0): 1,
    (0, 0, 0): 2,
}
"""How many children each path has in mc_sim_7b_63, the tree of Medusa's published heads."""
MEDUSA_PATHS = [(*path, i) for path, n in MEDUSA_CHILDREN.items() for i in range(n)]


def heads_of(key: str, target: Any, seed: int = 3, noise: float = 0.05) -> Any:
    """Untrained heads with some noise on every weight, so that no two of them agree."""
    name, architecture = HEADS[key]
    module = module_of(name)
    torch.manual_seed(seed)
    heads = module.fresh(target, module.Architecture(**architecture))
    for parameter in heads.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return heads


def drafter_of(key: str, target: Any, heads: Any = None, **config: Any) -> Any:
    heads = heads if heads is not None else heads_of(key, target)
    return module_of(HEADS[key][0]).build(target, Config(path=heads, **config))


def batch_of(tokens: torch.Tensor) -> Batch:
    return Batch(tokens, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool))


def hiddens(forest: list[Stage], features: torch.Tensor) -> dict[int, torch.Tensor]:
    """Offset -> logits [B, T, V] of every prediction, run as training runs it."""
    found: dict[int, torch.Tensor] = {}
    for stage in forest:
        output = stage.run(features)
        if stage.unembed is not None:
            found[stage.offset] = stage.unembed(output if stage.ready is None else stage.ready(output))
        found |= hiddens(list(stage.then), output)
    return found


class Watched:
    """A drafter that keeps the logits of every proposal, with the text that stood before it."""

    def __init__(self, drafter: Any) -> None:
        self.drafter, self.needs, self.seen = drafter, drafter.needs, []

    def start(self, batch: int, capacity: int) -> Any:
        return self.drafter.start(batch, capacity)

    def propose(self, feed: Any, state: Any) -> Any:
        logits = self.drafter.logits(feed, state)
        for text, row, count in zip(feed.texts, logits, feed.count, strict=True):
            if count:  # a finished row commits nothing
                self.seen.append((list(text), row))
        return self.drafter.plan.draft(feed, *known(logits))


@pytest.mark.parametrize("key", HEADS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2_mixed", "gpt_neox", "deepseek_v3", "granite", "cohere"])
def test_decoding_sees_what_training_trains(name: str, key: str):
    """At every step of a ragged, sampled batch the heads' logits are those of the training forward on that text: the
    head that guesses depth d is the stage whose label lies d + 1 behind the last token that the target has read."""
    target = make(name)
    drafter = drafter_of(key, target, width=2)
    watched = Watched(drafter)
    prompts = [[5, 9, 12, 5, 9, 12, 5], [7, 3], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40]]
    requests = [Request(p, Sampling(temperature=0.7, seed=4), i, 12) for i, p in enumerate(prompts)]
    session = Session(target, watched, requests)
    while session.running:
        session.step()
    assert len(watched.seen) > 3
    for text, logits in watched.seen:
        tokens = torch.tensor([text[:-1]])  # the target has read all but the root
        with torch.no_grad():
            states = target.decoder(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
            features = torch.cat([states[i] for i in drafter.needs.features], -1)
            stages = hiddens(drafter.stages(batch_of(tokens)), features)
        for depth, row in enumerate(logits, 1):
            torch.testing.assert_close(row, stages[depth + 1][0, -1], rtol=1e-4, atol=1e-5)  # norms in float32


@pytest.mark.parametrize("key", HEADS)
def test_label_offsets_of_table_0_3(key: str):
    """On the counting sequence x_t = t the label that a prediction sees at row t is t + its offset, else none."""
    target = make("llama")
    tokens = torch.arange(9)[None]
    stages = predictions(drafter_of(key, target).stages(batch_of(tokens)))
    shift = 1 if HEADS[key][0] == "medusa" else 0
    assert [s.offset for s in stages] == [int(s.name.split()[1]) + shift for s in stages]
    assert [s.offset for s in stages] == list(range(2, 2 + len(stages)))
    for stage in stages:
        labels = batch_of(tokens).labels(stage.offset)[0].tolist()
        assert labels == [t + stage.offset if t + stage.offset < 9 else -100 for t in range(9)]


@pytest.mark.parametrize("key", ["mtp linear", "medusa", "medusa shared", "blockwise", "final"])
def test_untrained_heads_say_what_the_target_says(key: str):
    target = make("llama")
    drafter = drafter_of(key, target, heads_of(key, target, noise=0.0))
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        out = target.model(input_ids=tokens, output_hidden_states=True)
        stages = hiddens(drafter.stages(batch_of(tokens)), out.hidden_states[-1])
    for logits in stages.values():
        torch.testing.assert_close(logits, out.logits, rtol=0, atol=1e-12)


def test_untrained_weighted_heads_lean_on_the_final_state():
    """softmax(0, ..., 0, 4): most of the weight, and the mixture's size is the final state's."""
    target = make("llama")
    heads = heads_of("weighted", target, noise=0.0)
    share = heads.heads[0].mixture.softmax(0)
    assert share[-1] > 0.9
    states = torch.randn(1, 4, len(share), target.config.hidden_size, dtype=torch.float64)
    rms = states.square().mean(-1, keepdim=True).sqrt()
    want = sum(share[i] * states[:, :, i] / rms[:, :, i] for i in range(len(share))) * rms[:, :, -1]
    torch.testing.assert_close(heads.heads[0](states.flatten(2)), want)


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_branch_computes_what_the_last_layer_does(name: str):
    """Every family lends its layers, read whole or in pieces with a cache; those that cannot say so."""
    target = make(name)
    if name in ADDS_POSITIONS:
        with pytest.raises(UserError, match="does more to its input"):
            last_layers(target, 1)
        return
    branch, norm = Branch(target, last_layers(target, 1)), norm_of(target)[1]
    tokens = torch.randint(0, target.vocab, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = target.decoder(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
        torch.testing.assert_close(norm(branch(states[-2])), states[-1], rtol=1e-8, atol=1e-8)
        cache = branch.cache(2, 64)
        first = branch.read(states[-2][:, :23], [23, 11], cache)
        second = branch.read(states[-2][:, 23:30], [7, 0], cache)
    torch.testing.assert_close(norm(first)[0], states[-1][0, :23], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(norm(first)[1, :11], states[-1][1, :11], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(norm(second)[0], states[-1][0, 23:30], rtol=1e-8, atol=1e-8)
    assert cache.lengths == [30, 11]


def test_medusas_tree_of_63_paths():
    """The buffers of methods 11.4 for mc_sim_7b_63: 64 rows, 42 leaves, depths that sum to 143."""
    assert len(MEDUSA_PATHS) == 63
    plot = layout(tuple(MEDUSA_PATHS), torch.device("cpu"))
    assert [len(level.ranks) for level in plot.levels] == [10, 28, 23, 2]
    ranks, parent = torch.cat([level.ranks for level in plot.levels]).tolist(), plot.parent.tolist()
    assert torch.equal(plot.ancestors, closure(plot.parent[None]))
    assert int((plot.ancestors.sum(-1) - 1).sum()) == 143
    assert len(set(range(64)) - set(parent)) == 42
    assert sorted(set(parent) - {-1}) == plot.inner.tolist()
    assert sorted(path_of(n, ranks, parent) for n in range(1, 64)) == sorted(MEDUSA_PATHS)


def path_of(node: int, ranks: list[int], parent: list[int]) -> tuple[int, ...]:
    return () if node == 0 else (*path_of(parent[node], ranks, parent), ranks[node - 1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_planted_trees_follow_their_paths(temperature: float):
    """Each node's token is its head's choice of that rank, under the target's noise if sampled."""
    target = make("llama")
    drafter = drafter_of("medusa", target)
    request = Request([5, 6, 7], Sampling(temperature=temperature, seed=1), 0, 20)
    session = Session(target, drafter, [request, request])
    feed = session.feed()
    logits = torch.randn(2, 3, target.vocab, dtype=torch.float64)
    paths = [(0,), (1,), (0, 2), (1, 0), (1, 0, 1)]
    draft = planted(paths, feed, *known(logits))
    values = [feed.values(logits[:, d : d + 1]) for d in range(3)]
    order = [feed.rank(v, d)[:, 0].argsort(descending=True) for d, v in enumerate(values, 1)]
    for row in range(2):
        ancestors, tokens = draft.ancestors[row], draft.tokens[row].tolist()
        nodes = {tuple(tokens[m] for m in range(1, draft.width) if ancestors[n, m]): n for n in range(1, draft.width)}
        assert set(nodes) == {tuple(int(order[d][row, r]) for d, r in enumerate(path)) for path in paths}
    assert draft.height == 3
    assert not draft.chained


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 20), min_size=3, max_size=3), min_size=2, max_size=3), st.integers(1, 6))
def test_best_paths_are_the_best(counts: list[list[int]], nodes: int):
    """No connected set of as many paths yields more (by trying them all)."""
    table = torch.tensor([sorted(row, reverse=True) for row in counts], dtype=torch.float64) / 70
    found = [tuple(p) for p in best_paths(table, nodes)]
    depth = len(table)
    every = [p for d in range(1, depth + 1) for p in product(range(3), repeat=d)]
    value = {p: float(torch.stack([table[d, r] for d, r in enumerate(p)]).prod()) for p in every}
    assert expected(table, found) == pytest.approx(1 + sum(value[p] for p in found))
    assert all(p[:-1] in found or len(p) == 1 for p in found)
    top = sorted(value.values(), reverse=True)[:nodes]  # values fall down paths, so this bound is reached
    assert sum(value[p] for p in found) == pytest.approx(sum(top))


@pytest.mark.parametrize(
    ("conditional", "tokens"),
    [
        ((0.94, 0.894, 0.857), 3.50),  # Meta's 7B with four heads: code, Wikipedia, books (arXiv:2404.19737, table S2)
        ((0.88, 0.784, 0.797), 3.12),
        ((0.87, 0.793, 0.768), 3.09),
        ((0.81, 0.56 / 0.81, 0.36 / 0.56), 2.73),  # FastMTP (arXiv:2509.18362)
        ((0.7, 0.7, 0.7, 0.7), 1 + 1.7731),  # E[A] = a (1 - a^k) / (1 - a)
    ],
)
def test_published_acceptances_give_the_published_tokens_per_forward(conditional: tuple[float, ...], tokens: float):
    accuracy = torch.tensor(conditional, dtype=torch.float64)[:, None]
    chain = [(0,) * d for d in range(1, len(conditional) + 1)]
    assert expected(accuracy, chain) == pytest.approx(tokens, abs=0.006)


def test_heads_have_the_published_sizes():
    """At hidden size 4,096 and 32,000 tokens: 147.85M for a Medusa head, 393,216,000 for three output heads."""
    with torch.device("meta"):
        output = torch.empty(32000, 4096)
        medusa = module_of("medusa").Heads(module_of("medusa").Architecture(heads=1), 4096, [output])
        mtp = module_of("mtp").Heads(
            module_of("mtp").Architecture(unembedding="own"), torch.nn.ModuleList(), [output] * 3
        )
    assert sum(p.numel() for p in medusa.parameters()) == 4096**2 + 4096 + 4096 * 32000 == 147_853_312
    assert sum(p.numel() for p in mtp.parameters()) == 393_216_000


def test_a_tree_without_a_parent_is_an_error():
    with pytest.raises(UserError, match=r"\[1, 0\] without its parent"):
        layout(((0,), (1, 0)), torch.device("cpu"))


def test_plans():
    """Calibrated trees are the default, depth and nodes cut them, the nearest temperature picks; width overrules."""
    trees = {"0": [[0], [0, 0], [1], [0, 0, 0]], "1": [[0], [1]]}
    assert planned(Config(), 3) == Plan(Shape(3))
    assert planned(Config(width=2), 3, trees) == Plan(Shape(3, 2))
    assert planned(Config(depth=9), 3) == Plan(Shape(3))
    assert planned(Config(), 3, usual="dynamic") == planned(Config(tree="dynamic"), 3) == Plan(Shape(3, 5, 16))
    drawn = planned(Config(), 3, trees, usual="dynamic")  # by value, but for drawn guesses
    assert drawn == Plan(Shape(3, 5, 16), {0.0: trees["0"], 1.0: trees["1"]})
    assert planned(Config(tree="beam"), 3, trees) == Plan(Shape(3, 4))
    with pytest.raises(UserError, match="none is calibrated; run `foretoken calibrate`"):
        planned(Config(tree="static"), 3)
    plan = planned(Config(depth=2), 3, trees)
    assert [plan.paths(t) for t in (0, 0.4, 0.6, 1.5)] == [trees["0"][:3]] * 2 + [trees["1"]] * 2
    assert plan.nodes == 4
    assert planned(Config(nodes=1), 3, trees).paths(0) == [[0]]


@pytest.mark.parametrize(("heads", "tokens", "calls"), [(4, 100, 26), (2, 100, 51), (5, 200, 41)])
def test_blockwise_calls(heads: int, tokens: int, calls: int):
    """m tokens by k perfect heads take m / k + 1 calls, the prompt's included, since one call verifies and predicts."""
    target = make("llama", torch.float32)
    prompt = [5, 6, 7]
    said = generate_plainly(target, prompt, tokens)
    drafter = Blockwise(target, heads_of("blockwise", target), Plan(Shape(heads - 1)))

    def perfect(feed: Any, state: Any) -> torch.Tensor:
        ahead = (said + said)[feed.length.item() - len(prompt) + 1 :][: heads - 1]
        return torch.nn.functional.one_hot(torch.tensor([ahead]), target.vocab).float()

    drafter.logits = perfect
    row = decode_all(target, drafter, [Request(prompt, max_new_tokens=tokens)], Match())[0]
    assert row.output == said
    assert row.forwards + 1 == calls


def generate_plainly(target: Any, prompt: list[int], tokens: int) -> list[int]:
    return decode_all(target, make_drafter("none", target), [Request(prompt, max_new_tokens=tokens)], Match())[0].output


def test_untrained_names_need_a_path():
    with pytest.raises(UserError, match="medusa needs trained heads"):
        make_drafter("medusa", make("llama"))
