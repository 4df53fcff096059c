"""Weights of 8 bits: another model, which decodes exactly and says what it is."""

from importlib.util import find_spec

import pytest
import torch

import foretoken
from foretoken import quantize
from foretoken.check import check
from foretoken.compiled import CompiledTarget
from foretoken.errors import UserError
from tests.models import STORIES

MARKS = [
    pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed"),
    pytest.mark.filterwarnings("ignore"),  # torchao's own
]


def test_what_cannot_be_is_refused_before_weights_load(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="'int4' is no way to round weights; there are int8"):
        foretoken.load(STORIES, quantize="int4")
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^Rounding weights to int8 needs torchao; install it with pip install "):
        foretoken.load(STORIES, quantize="int8")
    monkeypatch.setattr(quantize, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=r"^A step over int8 weights is not compiled; "):
        foretoken.load(STORIES, quantize="int8", compile=True)


class TestRounded:
    pytestmark = MARKS

    def test_it_is_another_model_by_name_and_by_law(self):
        plain = foretoken.load(STORIES, dtype="float32", device="cpu")
        rounded = foretoken.load(STORIES, dtype="float32", device="cpu", quantize="int8")
        assert rounded.name == f"{STORIES} (int8)"
        ids = torch.tensor([[1, 5, 9, 40]])
        with torch.inference_mode():
            want, got = (t.model(input_ids=ids).logits for t in (plain, rounded))
        assert 1e-4 < (got - want).abs().max() / want.std() < 0.3

    def test_it_decodes_exactly(self):
        rounded = foretoken.load(STORIES, dtype="float32", device="cpu", quantize="int8")
        assert check(rounded).ok
        outputs = [
            foretoken.generate(rounded, "Once upon a time", drafter=drafter, max_new_tokens=40).token_ids
            for drafter in ("none", "lookahead", "suffix")
        ]
        assert outputs[0] == outputs[1] == outputs[2]

    def test_its_step_is_not_compiled(self):
        rounded = foretoken.load(STORIES, dtype="float32", device="cpu", quantize="int8")
        with pytest.raises(UserError, match="weights are quantized, which is not compiled"):
            CompiledTarget(rounded)
