"""Every family reads trees as `check` measures it, decodes as transformers does, or is refused before weights load."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

import foretoken
from foretoken.cache import SlotCache, SlotLayer
from foretoken.check import Report, as_dict, check, render
from foretoken.errors import UserError
from foretoken.target import Target
from foretoken.tree import tree
from tests.families import GROUPED, REFUSED, SUPPORTED, VOCAB, make, page, quietly, refusal, table

FLOAT32_PARTS = ("codegen", "deepseek_v2", "deepseek_v3", "gemma2", "glm4_moe", "gptj")
"""Families that compute a softmax, a router or rotary tables in float32 whatever their dtype."""

PROMPT, TOKENS = [5, 17, 3, 42, 17, 3, 8], 24


@cache
def built(name: str) -> Target:
    return make(name)


@cache
def measured(name: str) -> Report:
    return check(built(name))


@cache
def generated(name: str) -> list[int]:
    """What transformers' own greedy `generate` emits after the prompt."""
    ids = torch.tensor([PROMPT])
    with quietly():
        out = built(name).model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS, pad_token_id=0
        )
    return out[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("name", SUPPORTED)
def test_trees_equal_plain_forwards(name: str):
    report = measured(name)
    assert report.ok, render(report)
    assert list(report.parts) == ["tree", "ragged batch", "commit", "prefill"]
    assert all(part.same_top == part.nodes for part in report.parts.values())
    assert report.difference <= (1e-5 if name in FLOAT32_PARTS else 1e-12)
    windows = [w for w in report.windows if w is not None]
    assert not windows or report.longest > max(windows) + built(name).chunk  # past the window and round the ring


@pytest.mark.parametrize("name", SUPPORTED)
def test_greedy_output_equals_transformers(name: str):
    target = built(name)
    assert len(set(generated(name))) >= 2  # a constant answer would show nothing
    for drafter, settings in (
        ("none", {}),
        ("lookahead", {"window": 3, "ngram": 3, "guesses": 3}),
        ("early_exit", {"layers": 2, "depth": 2, "width": 3}),
    ):
        out = foretoken.generate(target, PROMPT, drafter=drafter, settings=settings, max_new_tokens=TOKENS)
        assert out.token_ids == generated(name), drafter


@pytest.mark.parametrize("name", SUPPORTED)
def test_features_are_the_hidden_states(name: str):
    """At every node of a tree and every prompt token read in pieces, the features are those of a plain forward."""
    target, layers = built(name), (0, 1, -1)
    draw = torch.Generator().manual_seed(3)
    prompt = torch.randint(VOCAB, (1, target.chunk % 200 + 6), generator=draw)
    draft = tree(torch.randint(VOCAB, (1, 5), generator=draw), torch.tensor([[-1, 0, 0, 2, 1]]))
    with torch.inference_mode():
        space = target.cache(1, 256, 5)
        read = target.read(prompt, [prompt.shape[1]], space, layers).features
        judged = target.judge(draft, space, layers).features
        assert read is not None
        assert judged is not None
        for path in ([0, 2, 3], [0, 1, 4]):
            want = hidden(target, torch.cat([prompt, draft.tokens[:, path]], 1), layers)
            got = torch.cat([read, judged[:, path]], 1)
            assert (got - want).abs().max() <= 1e-5 * want.std()


def hidden(target: Target, ids: Tensor, layers: tuple[int, ...]) -> Tensor:
    """[1, T, F] by a forward without a cache."""
    states = target.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    return torch.cat([states[i] for i in layers], -1)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_from_the_configuration_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def loaded(*args: Any, **kwargs: Any):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loaded)
    sentence = refusal(name, tmp_path)
    assert "\n" not in sentence
    assert "use a" in sentence  # what to do
    assert sentence.endswith(".")


# Wrong engines, which check must catch


def blind(self: SlotCache, depth: Tensor, ancestors: Tensor | None, layer: SlotLayer, *rest: Any) -> Tensor:
    """Siblings see each other: every node sees all earlier ones."""
    if ancestors is None:
        return SEEN(self, depth, ancestors, layer, *rest)
    earlier = torch.ones_like(ancestors).tril(ancestors.shape[2] - ancestors.shape[1])
    return SEEN(self, depth, earlier, layer, *rest)


def unwindowed(self: SlotCache, depth: Tensor, ancestors: Tensor | None, layer: SlotLayer, *rest: Any) -> Tensor:
    """A sliding layer's nodes see all that the ring still holds."""
    window, layer.window = layer.window, None
    try:
        return SEEN(self, depth, ancestors, layer, *rest)
    finally:
        layer.window = window


def unmoved(self: SlotCache, path: Tensor | None, count: list[int]) -> None:
    """Counts the accepted nodes without moving them."""
    COMMIT(self, None, count)


def padded_too(self: SlotCache, path: Tensor | None, count: list[int]) -> None:
    """Counts every row as the longest."""
    COMMIT(self, path, [max(count)] * len(count))


def flat(self: Target, tokens: Tensor, depth: Tensor, *args: Any, **kwargs: Any):
    """Positions count nodes, not depth."""
    return EXTEND(self, tokens, torch.arange(depth.shape[1]).expand_as(depth), *args, **kwargs)


SEEN, COMMIT, EXTEND = SlotCache.seen, SlotCache.commit, Target.extend
WRONG = {
    "siblings": (SlotCache, "seen", blind, "llama", {"tree", "ragged batch", "commit"}),
    "window": (SlotCache, "seen", unwindowed, "mistral", {"tree", "ragged batch", "commit", "prefill"}),
    "one window of two": (SlotCache, "seen", unwindowed, "gemma3", {"tree", "ragged batch", "commit", "prefill"}),
    "commit": (SlotCache, "commit", unmoved, "llama", {"commit"}),
    "lengths": (SlotCache, "commit", padded_too, "llama", {"ragged batch", "commit"}),
    "positions": (Target, "extend", flat, "llama", {"tree", "ragged batch", "commit"}),
    "learned positions": (Target, "extend", flat, "gpt2", {"tree", "ragged batch", "commit"}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_engine_is_caught(fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    owner, attribute, wrong, name, parts = WRONG[fault]
    target = make(name, dtype)
    assert check(target).ok
    monkeypatch.setattr(owner, attribute, wrong)
    report = check(target)
    assert not report.ok
    assert report.verdict.startswith("wrong: ")
    assert {part for part, found in report.parts.items() if not found.agrees} == parts
    assert "differ" in render(report)


def test_a_forward_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch):
    target = make("llama")
    monkeypatch.setattr(target, "windows", [None])  # a cache of one layer for a model of three
    report = check(target)
    assert not report.ok
    assert report.verdict.startswith("wrong: the forward failed with ")
    assert report.parts == {}
    assert "verdict       wrong" in render(report)


def test_experts_in_half_precision_are_unclear(monkeypatch: pytest.MonkeyPatch):
    """A few nodes beyond the tolerance are a finding that the report does not call right or wrong."""
    target = make("mixtral", torch.bfloat16)
    monkeypatch.setattr("foretoken.check.TOLERANCE", {torch.bfloat16: 0.0, torch.float32: 0.0})
    differing = check(target)
    assert differing.verdict.startswith("wrong: ")  # most nodes, so not the experts alone
    found = sorted(p.difference for p in differing.parts.values())
    monkeypatch.setattr("foretoken.check.TOLERANCE", {torch.bfloat16: found[-1] * 0.99, torch.float32: 0.0})
    report = check(target)
    assert not report.ok
    assert report.verdict.startswith("unclear: ")
    assert "float32" in report.verdict


def test_too_short_a_context_is_refused():
    target = make("llama")
    target.config.max_position_embeddings = 32
    report = check(target)
    assert report.verdict == "refused: The model's context is 32 tokens; checking it needs 40 or more."


def test_report_as_text_and_as_data():
    report = measured("gemma2")
    lines = render(report).splitlines()
    assert lines[0] == "model         gemma2, Gemma2ForCausalLM, float64, attention eager"
    assert lines[1] == "layers        3: 1 full, 2 sliding 16"
    assert lines[-1] == "verdict       trees"
    data = as_dict(report)
    assert data["ok"] is True
    assert data["windows"] == [16, None, 16]
    assert data["parts"]["commit"]["agrees"] is True
    assert data["parts"]["commit"]["difference"] == report.parts["commit"].difference


def test_scalings_that_change_with_length_end_the_context():
    assert make("phi3_longrope").context == 128
    for kind in ("dynamic", "longrope"):
        rope = {
            "rope_type": kind,
            "rope_theta": 1e4,
            "factor": 2.0,
            "short_factor": [1.0] * 6,
            "long_factor": [2.0] * 6,
        }
        with quietly():
            config = LlamaConfig(**GROUPED | {"rope_parameters": rope | {"original_max_position_embeddings": 64}})
        assert foretoken.target.constant_rope_length(config) == 64
    assert built("llama").context == 256


def test_at_the_end_of_a_constant_scaling_the_output_is_plain():
    target = built("phi3_longrope")
    prompt = (PROMPT * 20)[:110]
    plain = foretoken.generate(target, prompt, drafter="none", max_new_tokens=50)
    drafted = foretoken.generate(target, prompt, drafter="lookahead", max_new_tokens=50)
    with torch.no_grad():
        whole = target.model(input_ids=torch.tensor([prompt + plain.token_ids]), use_cache=False).logits[0]
    assert len(plain.token_ids) == 128 - 110
    assert drafted.token_ids == plain.token_ids == whole.argmax(-1)[109:-1].tolist()


def test_experts_load_in_float64(tmp_path: Path):
    make("mixtral").model.save_pretrained(tmp_path)
    target = foretoken.load(tmp_path, dtype="float64", device="cpu")
    assert foretoken.generate(target, PROMPT, drafter="none", max_new_tokens=TOKENS).token_ids == generated("mixtral")


def test_attention_without_tree_masks_is_refused():
    model = make("llama").model
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="'flex_attention' attention, which takes no tree masks"):
        Target(model)


def test_the_page_is_up_to_date():
    """docs/models.md without its last, numeric column is what the command in it writes."""
    written = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    fresh = page({name: measured(name) for name in SUPPORTED})
    assert without_numbers(fresh) == without_numbers(written), "run python -m tests.families docs/models.md"


def without_numbers(text: str) -> list[str]:
    return [line.rsplit("|", 2)[0] if line.count("|") == 8 else line for line in text.splitlines()]


def test_table():
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    with tempfile.TemporaryDirectory() as folder:
        assert refusal("bloom", Path(folder)).startswith("A model of type 'bloom'")
