"""What a step costs outside the model's forward, and what its cache holds: seconds and bytes of the engine's own."""

from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, StaticCache

from foretoken.cache import SlotCache
from foretoken.decode import Request, Session
from foretoken.drafters import make_drafter
from foretoken.sampling import Sampling
from foretoken.target import Target


def engine_times(vocab: int, batch: int, temperature: float, repeats: int, width: int = 8) -> list[float]:
    """Seconds of everything in a step outside the model's forward: prompt lookup at `width`, emitting, text included.

    A model of one narrow layer carries the session; its forward's time is measured inside each step and taken off. The
    logits are replaced by ones under which the copied tokens are accepted, as on repetitive text.
    """
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=vocab,
        max_position_embeddings=8192,
    )
    target = Clocked(LlamaForCausalLM(config))
    drafter = make_drafter("prompt_lookup", target, {"length": width - 1})
    target.tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "assets" / "stories260K")
    prompts = [[(7 * i + b) % 97 + 3 for i in range(97)] * 3 for b in range(batch)]
    sampling = Sampling(temperature=temperature)
    tokens = (repeats + 8) * width
    session = Session(target, drafter, [Request(p, sampling, i, tokens, stream=True) for i, p in enumerate(prompts)])
    seconds: list[float] = []
    for _ in range(repeats + 3):
        target.forward_seconds = 0.0
        began = perf_counter()
        session.step()
        seconds.append(perf_counter() - began - target.forward_seconds)
    return seconds[3:]


class Clocked(Target):
    """A target that says how long its forwards took. Its logits spread as a language model's do (standard deviation
    2.5), and the copied continuation has 97 % of the probability."""

    forward_seconds = 0.0

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__(model)
        self.spread = 2.5 * torch.randn(self.vocab, generator=torch.Generator().manual_seed(0))

    def extend(self, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        began = perf_counter()
        read = super().extend(tokens, *args, **kwargs)
        follower = (tokens - 3 + 7) % 97 + 3
        if kwargs.get("at") is not None:
            follower = follower[:, kwargs["at"]]
        read.logits.copy_(self.spread.expand_as(read.logits)).scatter_(-1, follower[..., None], 17.0)
        self.forward_seconds += perf_counter() - began
        return read


def cache_ratio(target: Target, tokens: int, width: int = 8) -> float:
    """Bytes of our cache over those of transformers' static cache, both for `tokens` tokens of one row."""
    heads = getattr(target.config, "num_key_value_heads", target.config.num_attention_heads)
    size = getattr(target.config, "head_dim", None) or target.config.hidden_size // target.config.num_attention_heads
    static = StaticCache(config=target.config, max_cache_len=tokens)
    static.early_initialization(1, heads, size, target.dtype, target.device)
    theirs = sum(x.nbytes for layer in static.layers for x in (layer.keys, layer.values))  # pyright: ignore
    ours: SlotCache = target.cache(1, tokens + width, width)
    target.read(torch.zeros(1, 4, dtype=torch.int64, device=target.device), [4], ours)
    return ours.nbytes / theirs
