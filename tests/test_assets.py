"""The models and heads that travel with the package: small, loadable by anybody, and better than chance."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import foretoken
from foretoken.demo import ASSETS, MODEL, pieces
from foretoken.drafters import make_drafter
from foretoken.saved import DESCRIPTION, read
from tests.models import asset

HEADS = sorted(path.parent for path in ASSETS.glob(f"*/{DESCRIPTION}"))


def test_they_are_small():
    assert sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()) <= 40e6


@pytest.mark.parametrize("folder", HEADS, ids=lambda p: p.name)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trained_heads_guess_and_change_nothing(folder: Path, temperature: float):
    """With their calibrated trees, on code that they were not trained on."""
    target = asset(str(MODEL), torch.float32)
    method = read(folder).method
    prompts = pieces(target)[:3]
    settings = {"max_new_tokens": 48, "temperature": temperature, "seed": 2}
    plain = foretoken.generate(target, prompts, drafter="none", **settings)
    outputs = foretoken.generate(target, prompts, drafter=make_drafter(f"{method}:{folder}", target), **settings)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
    assert sum(len(o.token_ids) - 1 for o in outputs) / sum(o.forwards for o in outputs) > 1.5
    assert set(read(folder).trees) == {"0", "1"}


def test_the_code_model_is_an_ordinary_one():
    """transformers loads it as it is, and its tokenizer spells any text."""
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(tokenizer)
    text = "def f(x: int) -> str:\n\treturn 'ä'  # ☃\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
