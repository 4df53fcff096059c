"""EAGLE's layers against the papers' formulas written out: one head at a time, complex rotations, plain softmax."""

from typing import Any

import pytest
import torch
from torch import Tensor

from foretoken.block import Size, size_like
from foretoken.drafters import module_of
from foretoken.errors import UserError
from foretoken.target import Target
from tests.families import make
from tests.test_feedback import drafter_of, features_of, network_of
from tests.test_heads import batch_of, hiddens


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x: Tensor, size: Size, position: int) -> Tensor:
    """x [D] as D/2 complex numbers, number i turned by position * theta^(-2i/D)."""
    half = size.head // 2
    angle = position * size.theta ** (-torch.arange(half, dtype=torch.float64) * 2 / size.head)
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag])


def attended(w: dict[str, Tensor], size: Size, read: Tensor, queries: list[tuple[int, int]]) -> Tensor:
    """[Q, H] attention of the rows `read` [T, F] for queries (row, position); keys are all rows up to the row."""
    outputs = []
    for row, position in queries:
        heads = []
        for h in range(size.heads):
            g = h // (size.heads // size.groups)

            def part(name: str, n: int, at: int) -> Tensor:
                return w[f"self_attn.{name}.weight"][n * size.head : (n + 1) * size.head] @ read[at]

            query = turned(part("q_proj", h, row), size, position)
            scores = torch.stack(
                [query @ turned(part("k_proj", g, t), size, t) / size.head**0.5 for t in range(row + 1)]
            )
            values = torch.stack([part("v_proj", g, t) for t in range(row + 1)])
            heads.append(scores.softmax(0) @ values)
        outputs.append(w["self_attn.o_proj.weight"] @ torch.cat(heads))
    return torch.stack(outputs)


def mlp(w: dict[str, Tensor], x: Tensor) -> Tensor:
    gate, up, down = (w[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def case(key: str) -> tuple[Target, Any, Tensor, Tensor, Tensor]:
    """(target, drafter, logits of the first guess [T, V'], features [T, F], embeddings [T, H] of the next tokens)."""
    target = make("llama")
    drafter = drafter_of(key, target)
    tokens = torch.randint(0, target.vocab, (1, 9), generator=torch.Generator().manual_seed(2))
    features = features_of(target, tokens, drafter.needs.features)
    with torch.no_grad():
        logits = hiddens(drafter.stages(batch_of(tokens)), features)[2][0]
        embedded = target.model.get_input_embeddings()(tokens)[0]
    return target, drafter, logits[:-1], features[0], embedded[1:]


@torch.no_grad()
def test_the_layer_of_eagle_1():
    """f' = x + attention(x), out = f' + MLP(norm(f')), x = fc[embedding; feature]; the target's output head."""
    target, drafter, logits, features, embedded = case("eagle 1")
    w, size = drafter.heads.layer.state_dict(), drafter.heads.size
    x = torch.cat([embedded, features[:-1]], -1) @ w["fc.weight"].T + w["fc.bias"]
    state = x + attended(w, size, x, [(t, t) for t in range(8)])
    state = state + mlp(w, norm(state, w["post_attention_layernorm.weight"], size.eps))
    torch.testing.assert_close(target.unembed(state), logits, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("key", ["eagle 3", "eagle 3, normed residual", "eagle 3.1"])
def test_the_layer_of_eagle_3(key: str):
    """Features fused, attention on [norm embedding; norm state], the residual the state itself or its norm."""
    _, drafter, logits, features, embedded = case(key)
    a, heads = drafter.architecture, drafter.heads
    w, size = heads.layer.state_dict(), heads.size
    parts = features.split(size.hidden, -1)
    if a.norm_features:
        parts = [norm(p, n.weight, size.eps) for p, n in zip(parts, heads.fc_norms, strict=True)]
    state = (torch.cat(list(parts), -1) @ heads.fc.weight.T)[:-1]
    normed = norm(state, w["hidden_norm.weight"], size.eps)
    read = torch.cat([norm(embedded, w["input_layernorm.weight"], size.eps), normed], -1)
    state = (normed if a.norm_before_residual else state) + attended(w, size, read, [(t, t) for t in range(8)])
    state = state + mlp(w, norm(state, w["post_attention_layernorm.weight"], size.eps))
    found = norm(state, heads.norm.weight, size.eps) @ heads.lm_head.weight.T
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-6)


def test_an_untrained_network_says_what_the_highest_features_say():
    """The output head and the final norm are the target's, and the fusion passes the highest layer's features."""
    target = make("llama")
    heads = network_of("eagle 3, normed residual", target, noise=0.0)
    features = torch.randn(1, 3, len(heads.architecture.features) * target.config.hidden_size, dtype=torch.float64)
    assert torch.equal(heads.fused(features), features[..., -target.config.hidden_size :])
    assert torch.equal(heads.lm_head.weight, target.unembed.weight)


def test_the_features_are_low_middle_and_high():
    """The inputs of layers 2, L / 2 and L - 3, as in EAGLE-3's code; spread wider over few layers."""
    module = module_of("eagle")
    for layers, want in ((32, (2, 16, 29)), (8, (2, 4, 5)), (6, (2, 4, 6)), (3, (1, 2, 3)), (1, (0, 1))):
        assert module.usual_features(layers) == want
    assert module.fresh(make("llama"), module.Architecture()).architecture.features == (1, 2, 3)


def test_sizes_are_the_targets():
    assert size_like(make("llama")) == Size(48, 4, 2, 12, 64)
    assert size_like(make("gpt2"), 100) == Size(48, 4, 4, 12, 100)
    target = make("llama")
    target.config.num_attention_heads = 5
    with pytest.raises(UserError, match="no number of heads that divides 48"):
        size_like(target)
