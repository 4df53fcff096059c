"""Guesses that build on guesses: decoding sees what training trains, and caches hold rows of committed tokens alone."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from foretoken.branch import Branch, last_layers, unrolled_mask
from foretoken.decode import Request, Session
from foretoken.drafters import module_of
from foretoken.errors import UserError
from foretoken.grow import Growth
from foretoken.heads import Config
from foretoken.objective import IGNORED, predictions
from foretoken.sampling import Sampling
from foretoken.target import UNNORMED, Target
from foretoken.unembed import Unembedding
from tests.families import make
from tests.test_heads import batch_of, hiddens

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "three modules": ("deepseek_mtp", {"modules": 3, "guesses": 3}),
    "two modules in turn": ("deepseek_mtp", {"modules": 2, "guesses": 4, "onward": "normed", "first": "state"}),
    "one module, own rows": ("deepseek_mtp", {"guesses": 3, "enters": "raw"}),
    "one module, shared rows": ("deepseek_mtp", {"guesses": 3, "attention": "shared"}),
    "blank start": ("deepseek_mtp", {"guesses": 3, "attention": "shared", "start": "blank", "onward": "normed"}),
    "blank start, own rows": ("deepseek_mtp", {"guesses": 3, "start": "blank"}),
    "draft vocabulary": ("deepseek_mtp", {"guesses": 2, "vocabulary": 20}),
    "eagle 1": ("eagle", {"version": 1, "steps": 3}),
    "eagle 3": ("eagle", {"steps": 4, "vocabulary": 30}),
    "eagle 3, normed residual": ("eagle", {"steps": 3, "norm_before_residual": True}),
    "eagle 3.1": ("eagle", {"steps": 4, "norm_features": True, "norm_output": True, "features": [0, 2]}),
}
PROMPTS = [[5, 9, 12, 5, 9, 12, 5], [7], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40]]


def network_of(key: str, target: Target, noise: float = 0.05) -> Any:
    """An untrained network with some noise on every weight and, if it has one, a draft vocabulary with gaps."""
    name, architecture = NETWORKS[key]
    module = module_of(name)
    torch.manual_seed(3)
    network = module.fresh(target, module.Architecture(**architecture))
    if size := architecture.get("vocabulary"):
        network.choose(torch.randperm(target.vocab)[:size].sort().values, target)
    for parameter in network.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return network


def drafter_of(key: str, target: Target, network: Any = None, **config: Any) -> Any:
    name, architecture = NETWORKS[key]
    settings = {"tree": "beam", "width": 2, "depth": architecture.get("guesses", architecture.get("steps"))} | config
    return module_of(name).build(target, Config(path=network or network_of(key, target), **settings))


class Watched:
    """A drafter that keeps, for every node that it read, the text before it, the path to it and the logits after it."""

    def __init__(self, drafter: Any) -> None:
        self.drafter, self.needs = drafter, drafter.needs
        self.seen: list[tuple[list[int], list[int], Tensor]] = []

    def start(self, batch: int, capacity: int) -> Any:
        return self.drafter.start(batch, capacity)

    def propose(self, feed: Any, state: Any) -> Any:
        logits, extend = self.drafter.begin(feed, state)
        rows = [b for b, count in enumerate(feed.count) if count]  # a finished row commits nothing
        self.seen += [(list(feed.texts[b]), [], logits[b, 0]) for b in rows]

        def watched(growth: Growth) -> Tensor:
            found = extend(growth)
            for b in rows:
                for i, node in enumerate(range(growth.first, growth.tokens.shape[1])):
                    path = [int(growth.tokens[b, n]) for n in range(1, node + 1) if growth.ancestors[b, node, n]]
                    self.seen.append((list(feed.texts[b]), path, found[b, i]))
            return found

        return self.drafter.plan.draft(feed, logits, watched)


def features_of(target: Target, tokens: Tensor, layers: Any) -> Tensor:
    with torch.no_grad(), target.watched(layers) as unnormed:
        states = target.decoder(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    return torch.cat([*unnormed, *(states[i] for i in layers if i != UNNORMED)], -1)


def trained(drafter: Any, text: list[int], path: list[int]) -> Tensor:
    """[V'] logits behind `path`, guessed behind `text`, as training computes them on both."""
    tokens = torch.tensor([text + path])
    with torch.no_grad():
        stages = hiddens(drafter.stages(batch_of(tokens)), features_of(drafter.target, tokens, drafter.needs.features))
    return stages[len(path) + 2][0, len(text) - 2]  # the last token that the target has read is text[-2]


def steps_of(watched: Watched, target: Target, temperature: float = 0.7) -> Session:
    requests = [Request(p, Sampling(temperature=temperature, seed=4), i, 12) for i, p in enumerate(PROMPTS)]
    session = Session(target, watched, requests)
    while session.running:
        session.step()
    return session


@pytest.mark.parametrize("key", NETWORKS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2_mixed", "deepseek_v3"])
def test_decoding_sees_what_training_trains(name: str, key: str):
    """At every node of every tree of a ragged, sampled batch, one prompt of a single token included."""
    target = make(name)
    drafter = drafter_of(key, target)
    watched = Watched(drafter)
    steps_of(watched, target)
    assert {len(path) for _, path, _ in watched.seen} == set(range(drafter.plan.shape.depth))
    for text, path, logits in watched.seen[:: max(1, len(watched.seen) // 24)]:
        scored = logits if (tokens := drafter.unembed().tokens) is None else logits[tokens]
        torch.testing.assert_close(scored, trained(drafter, text, path), rtol=1e-4, atol=1e-5)  # norms in float32
        if tokens is not None:
            assert int((logits > -torch.inf).sum()) == len(tokens)


@torch.inference_mode()
@pytest.mark.parametrize("key", NETWORKS)
def test_caches_hold_rows_of_committed_tokens_alone(key: str):
    """After guesses, rejections and commits each cache is that of a fresh run over the text, entry for entry."""
    target = make("llama")
    drafter = drafter_of(key, target)
    session = steps_of(Watched(drafter), target)
    session.drafter.propose(session.feed(), session.state)  # rows that the last step committed
    for b, row in enumerate(session.rows):
        read = session.cache.lengths[b]
        alone = Session(target, drafter, [Request(row.text[:read], Sampling(), 0, 1)])
        feed = replace(alone.feed(), root=torch.tensor([row.text[read]]), texts=[row.text[: read + 1]])
        drafter.begin(feed, alone.state)
        for mine, theirs in zip(session.state.caches, alone.state.caches, strict=True):
            assert mine.lengths[b] == theirs.lengths[0]
            for slots, others in zip(mine.slots, theirs.slots, strict=True):
                n = mine.lengths[b]
                if n and others.keys is not None:
                    torch.testing.assert_close(slots.rows(slots.keys)[b, :, :n], others.rows(others.keys)[0, :, :n])
                    torch.testing.assert_close(slots.rows(slots.values)[b, :, :n], others.rows(others.values)[0, :, :n])


@pytest.mark.parametrize("key", NETWORKS)
def test_label_offsets_of_table_0_3(key: str):
    """On the counting sequence x_t = t guess k at row t is to say t + k + 1; a draft vocabulary knows some of them."""
    drafter = drafter_of(key, make("llama"))
    tokens = torch.arange(9)[None]
    stages = predictions(drafter.stages(batch_of(tokens)))
    assert [(s.name, s.offset) for s in stages] == [(f"guess {k}", k + 1) for k in range(1, len(stages) + 1)]
    for stage in stages:
        said = stage.labels(batch_of(tokens))[0]
        known = range(80) if stage.unembed.tokens is None else stage.unembed.tokens.tolist()
        ahead = [t + stage.offset for t in range(9)]
        want = [known.index(x) if x < 9 and x in known else IGNORED for x in ahead]
        assert said.tolist() == want


@cache
def attention(window: int | None) -> Branch:
    target = make("llama" if window is None else "mistral")
    branch = Branch(target, last_layers(target, 1))
    assert branch.windows == [window]
    return branch


@pytest.mark.parametrize("window", [None, 16])
def test_unrolled_steps_attend_as_decoding_does(window: int | None):
    """Step j at row t sees the first step's rows up to t and later ones at t alone, at position t + j."""
    branch = attention(window)
    T, size = 24, branch.target.config.hidden_size
    torch.manual_seed(0)
    inputs = [torch.randn(1, T, size, dtype=torch.float64) for _ in range(3)]
    memory, outputs = None, []
    with torch.no_grad():
        for step, states in enumerate(inputs):
            output, memory = branch.unrolled(states, memory, step)
            outputs.append(output)
        for t in (0, 5, 23):
            cache = branch.cache(1, T + 8)
            first = branch.read(inputs[0][:, : t + 1], [t + 1], cache)
            torch.testing.assert_close(first[:, t], outputs[0][:, t])
            for step in (1, 2):
                one, place = torch.ones(1, 1, step, dtype=torch.bool), torch.tensor([[step - 1]])
                found = branch.extend(inputs[step][:, t : t + 1], place, one, cache, offset=step - 1)
                torch.testing.assert_close(found[:, 0], outputs[step][:, t])


def test_the_mask_of_unrolled_steps():
    seen = unrolled_mask(3, 2, None, torch.float32, torch.device("cpu"))[0, 0] == 0
    want = [[1, 0, 0, 1, 0, 0, 1, 0, 0], [1, 1, 0, 0, 1, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 1]]
    assert seen.int().tolist() == want


@pytest.mark.parametrize("key", ["three modules", "eagle 1", "eagle 3"])
def test_a_trained_chain_of_counting_guesses_right(key: str):
    """A network trained for a moment on counting sequences has every guess accepted."""
    target, drafter = counting(key)
    watched = Watched(drafter)
    session = Session(target, watched, [Request([7, 8, 9], Sampling(), 0, 17), Request([20, 21], Sampling(), 0, 17)])
    while session.running:
        session.step()
    assert [row.output for row in session.rows] == [list(range(10, 27)), list(range(22, 39))]
    depth = drafter.plan.shape.depth
    assert [row.forwards for row in session.rows] == [-(-16 // (depth + 1))] * 2


def counting(key: str) -> tuple[Target, Any]:
    """A target that counts, and a network that learnt to count from its states."""
    target = make("llama", torch.float32)
    tokens = torch.stack([torch.arange(s, s + 40) for s in range(0, 40)])
    learn(target.model.parameters(), lambda: target.model(input_ids=tokens, labels=tokens).loss, 0.005, 60)
    drafter = drafter_of(key, target, network_of(key, target, noise=0.0), tree="chain", width=1)
    if drafter.unembed().tokens is not None:
        drafter.heads.choose(torch.arange(10, 40), target)
    batch = batch_of(tokens)
    features = features_of(target, tokens, drafter.needs.features)

    def loss() -> Tensor:
        found = hiddens(drafter.stages(batch), features)
        labels = {s.offset: s.labels(batch) for s in predictions(drafter.stages(batch))}
        return torch.stack(
            [torch.nn.functional.cross_entropy(found[o].flatten(0, 1), labels[o].flatten()) for o in labels]
        ).sum()

    learn(drafter.heads.parameters(), loss, 0.003, 80)
    return target, drafter


def learn(parameters: Any, loss: Any, rate: float, steps: int) -> None:
    optimizer = torch.optim.Adam(list(parameters), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("deepseek_mtp", {"modules": 2, "guesses": 1}, "guesses is 1; it must be 2 or more"),
        ("deepseek_mtp", {"modules": 2, "guesses": 2, "attention": "shared"}, "one module that serves every guess"),
        ("deepseek_mtp", {"first": "stat"}, "did you mean 'state'"),
        ("deepseek_mtp", {"vocabulary": 99}, "99 was asked for and the target has 80 tokens"),
        ("eagle", {"version": 2}, "EAGLE-2 is 1 with tree=dynamic"),
        ("eagle", {"version": 1, "norm_output": True}, "norm_output belongs to version 3"),
        ("eagle", {"features": [7]}, "features name state 7 and the target has 0 to 3"),
        ("eagle", {"vocabulary": 99}, "99 was asked for and the target has 80 tokens"),
    ],
)
def test_settings_that_cannot_be(name: str, settings: dict[str, Any], said: str):
    module = module_of(name)
    with pytest.raises(UserError, match=said):
        module.fresh(make("llama"), module.Architecture(**settings))


def test_an_output_head_over_some_tokens():
    """Logits stand at their tokens, labels at their rows."""
    whole = Unembedding(torch.randn(9, 4), torch.randn(9), scale=0.5, softcap=3.0)
    tokens, hidden = torch.tensor([1, 4, 8]), torch.randn(2, 4)
    some = whole.limited(tokens)
    found = some.over(9, hidden)
    torch.testing.assert_close(found[:, tokens], whole(hidden)[:, tokens])
    assert found.isneginf().nonzero()[:, 1].unique().tolist() == [0, 2, 3, 5, 6, 7]
    assert torch.equal(whole.over(9, hidden), whole(hidden))
    labels = torch.tensor([[4, IGNORED, 0, 8], [5, 1, 7, -1]])
    assert some.rows_of(labels, -7).tolist() == [[1, IGNORED, -7, 2], [-7, 0, -7, -1]]
    assert torch.equal(whole.rows_of(labels, -7), labels)
