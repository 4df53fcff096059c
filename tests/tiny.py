"""Tiny targets, texts and recipes that training tests share."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from foretoken.training.loop import train
from foretoken.training.recipe import Recipe, filled

NUMBERS = 16
"""Tokens "0" to "15"; one more ends a text."""
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per number."""
    names = [*map(str, range(NUMBERS)), "<end>"]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", clean_up_tokenization_spaces=False)


def save(folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A random target and its tokenizer in a folder."""
    tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    settings = {k: v for k, v in LLAMA.items() if k != "model_type"} | {"vocab_size": NUMBERS + 1} | fields
    config = LlamaConfig(**settings, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return folder


def counting(path: Path, documents: int = 40, length: int = 48) -> Path:
    """Texts in which every number is one more than the one before it."""
    texts = (" ".join(str((start + t) % NUMBERS) for t in range(length)) for start in range(documents))
    path.write_text("<|endoftext|>".join(texts))
    return path


def walking(path: Path, documents: int = 40) -> Path:
    """Texts of different lengths in which numbers rise by 1 or 2, as if by chance."""
    draw = random.Random(0)
    lines: list[str] = []
    for _ in range(documents):
        here, words = draw.randrange(NUMBERS), list[str]()
        for _ in range(draw.randrange(5, 60)):
            words.append(str(here))
            here = (here + draw.choice((1, 1, 2))) % NUMBERS
        lines.append(" ".join(words))
    path.write_text("<|endoftext|>".join(lines))
    return path


def recipe(folder: Path, **settings: Any) -> Recipe:
    """A short run; a setting of a part is written part__setting."""
    given: dict[str, Any] = {"out": str(folder / "out"), "steps": 6, "rows": 4, "evaluate": 8, "tensorboard": False}
    given |= {"precision": "float64", "save_every": 1000, "log_every": 1000, "save_dtype": "float64"}
    given |= {"data": {"length": 24, "cache": str(folder / "cache"), "held_out": 0.2}}
    given |= {"optimizer": {"lr": 3e-3, "warmup": 2}}
    for key, value in settings.items():
        part, _, name = key.rpartition("__")
        value = str(value) if isinstance(value, Path) else value
        if part:
            given[part] = given.get(part, {}) | {name: value}
        else:
            given[key] = value
    return filled(Recipe, given)


def scratch(folder: Path, **settings: Any) -> Recipe:
    """The same for a target from scratch."""
    tokenizer().save_pretrained(folder / "words")
    base: dict[str, Any] = {"mode": "scratch", "model": LLAMA, "tokenizer": folder / "words"}
    return recipe(folder, **base | settings)


def rows(folder: Path) -> list[dict[str, float]]:
    """The metrics of a run, without how long each step took."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens/s"} for row in found]


def trained(settings: Recipe) -> tuple[Path, dict[str, float]]:
    """The folder of a finished run, and what it measured."""
    found = train(settings)
    return Path(settings.out), found
