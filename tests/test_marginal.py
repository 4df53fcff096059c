"""The drafter that sums over the tokens between: its laws by enumeration."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import foretoken
from foretoken.decode import Request, Session
from foretoken.drafter import Feed, Stateless
from foretoken.drafters import make_drafter
from foretoken.drafters.marginal import Marginal
from foretoken.errors import UserError
from foretoken.marginal import nucleus
from foretoken.rules import Match
from foretoken.sampling import Sampling
from foretoken.target import Target
from tests.families import make
from tests.test_study_marginal import laws_behind

V = 6


def small() -> Target:
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, max_position_embeddings=64, **size)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return Target(model)


@torch.no_grad()
def law(target: Target, ids: list[int]) -> Tensor:
    return target.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].softmax(-1)


class Kept(Marginal):
    """Remembers what it was fed and what it said."""

    def logits(self, feed: Feed, state: Stateless) -> Tensor:
        found = super().logits(feed, state)
        self.said.append(([t[:-1] for t in feed.texts], found))
        return found


def kept(target: Target, **settings: Any) -> Kept:
    made = make_drafter("marginal", target, settings)
    assert isinstance(made, Marginal)
    found = Kept(target, made.config, made.plan)
    found.said = []
    return found


def decoded(target: Target, drafter: Marginal, tokens: int = 10) -> None:
    prompts = [[1, 2, 3, 1, 2], [4, 0]]
    sampling = Sampling(temperature=1.0, seed=3)
    requests = [Request(p, sampling, i, tokens) for i, p in enumerate(prompts)]
    session = Session(target, drafter, requests, rule=Match())
    while session.running:
        session.step()


def test_laws_are_the_enumerated_marginals():
    """In a ragged batch, at every step: sums over all paths behind the committed text, the root not among it."""
    target = small()
    drafter = kept(target, depth=3, mass=1.0, most=V**3, width=2)
    decoded(target, drafter)
    assert len(drafter.said) > 2
    for texts, logits in drafter.said:
        for row, text in enumerate(texts):
            behind = [laws_behind(target, text, depth) for depth in range(logits.shape[1] + 1)]
            for depth in range(logits.shape[1]):
                exact = torch.zeros(V, dtype=torch.float64)
                for path in itertools.product(range(V), repeat=depth + 1):
                    chance = math.prod(float(behind[i][path[: i + 1]]) for i in range(depth + 1))
                    exact += chance * behind[depth + 1][path]
                assert torch.allclose(logits[row, depth].exp(), exact, atol=1e-9)


def test_cut_laws_are_sums_over_the_likeliest_paths():
    target = small()
    drafter = kept(target, depth=2, mass=0.9, most=4)
    decoded(target, drafter)
    for texts, logits in drafter.said:
        for row, text in enumerate(texts):
            paths: dict[tuple[int, ...], float] = {(): 1.0}
            for depth in range(logits.shape[1]):
                longer = {
                    (*path, int(token)): chance * float(p)
                    for path, chance in paths.items()
                    for n in [nucleus(law(target, [*text, *path]), 0.9, 4)]
                    for token, p in zip(n.tokens[: int(n.count)], n.chance, strict=False)
                }
                paths = dict(sorted(longer.items(), key=lambda item: -item[1])[:4])
                total = sum(c * law(target, [*text, *path]) for path, c in paths.items())
                expected = total / sum(paths.values())
                assert torch.allclose(logits[row, depth].exp(), expected, atol=1e-9)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt2"])
def test_windows_and_long_texts(family: str):
    """Past the window and round the ring, where paths that were read lie in slots that are read again."""
    target = make(family, torch.float64)
    prompt = torch.randint(3, 80, (37,), generator=torch.Generator().manual_seed(2)).tolist()
    how: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0}
    plain = foretoken.generate(target, [prompt, prompt[:5]], drafter="none", **how)
    found = foretoken.generate(
        target, [prompt, prompt[:5]], drafter="marginal", settings={"depth": 3, "most": 30, "width": 4}, **how
    )
    assert [o.token_ids for o in found] == [o.token_ids for o in plain]
    assert sum(o.forwards for o in found) < sum(o.forwards for o in plain)


@pytest.mark.parametrize(
    ("settings", "said"), [({"mass": 0}, "mass is 0"), ({"most": 0}, "most is 0"), ({"depth": 0}, "depth is 0")]
)
def test_settings_that_cannot_work(settings: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        make_drafter("marginal", small(), settings)
