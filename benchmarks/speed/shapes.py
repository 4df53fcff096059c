"""Models of real shapes with random weights, saved so that every program loads the same ones."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from foretoken.bench.step import SYNTHETIC

ASSETS = Path(__file__).parents[2] / "foretoken" / "assets"
CONTEXT = 8448
"""Positions of the models: the longest context that is measured, and room behind it."""
COMMON = 512
"""Tokens that the small model says, of all that it knows."""
LOUDER = {"embed": 4.0, "down_proj": 12.0, "o_proj": 0.0}
"""What those tokens' embeddings and each layer's projections are multiplied by; see `qwen3_11m`."""


def llama_134m() -> PreTrainedModel:
    """The shape of `foretoken bench-step synthetic-134m` with a longer context."""
    config = copy.deepcopy(SYNTHETIC["synthetic-134m"])
    config.max_position_embeddings = CONTEXT
    return LlamaForCausalLM(config)


def qwen3_11m() -> PreTrainedModel:
    """A Qwen3 of 11.0M parameters whose greedy text goes round in circles of a few to some dozen tokens.

    With weights as they are initialised it would say one token for ever, and with louder layers nothing twice; neither
    says much about a look-up. Here the next token depends on the last one alone (attention is computed, and multiplied
    by zeros), so that every program says the same.
    """
    config = Qwen3Config(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        vocab_size=12288,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )
    model: Any = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[:COMMON] *= LOUDER["embed"]
        for name, weight in model.named_parameters():
            weight.mul_(LOUDER.get(name.split(".")[-2], 1.0))
    return model


MODELS = {"llama-134m": llama_134m, "qwen3-11m": qwen3_11m}


def saved(name: str, folder: Path) -> Path:
    """The model of that name in bfloat16, in a folder of `folder`, made the first time; a folder's own name is kept."""
    if name not in MODELS:
        return Path(name)
    path = folder / name
    if not (path / "tokenizer_config.json").exists():
        torch.manual_seed(0)
        model: Any = MODELS[name]()
        model.to(torch.bfloat16)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        model.save_pretrained(path)
        AutoTokenizer.from_pretrained(ASSETS / "stdlib5M").save_pretrained(path)  # some programs load none without one
    return path


def some_prompts(vocab: int, count: int, length: int) -> list[list[int]]:
    """Prompts of random tokens, the second half of each the first again."""
    source = torch.Generator().manual_seed(0)
    halves = torch.randint(3, vocab, (count, -(-length // 2)), generator=source).tolist()
    return [(half + half)[:length] for half in halves]
