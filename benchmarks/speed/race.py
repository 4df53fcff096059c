"""Decoding one prompt at a time, beside other programs: plain, and with each one's look-up."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decoders import Decoder, Ours, peers
from found import Figure, Found
from shapes import saved, some_prompts
from turns import Timed, in_turns

from foretoken.bench.engine import read_per_forward
from foretoken.bench.methods import methods
from foretoken.compiled import CompiledTarget
from foretoken.loading import load
from foretoken.target import Target

PLAIN, EAGER = "foretoken", "foretoken, eager"


@dataclass(frozen=True, slots=True)
class Race:
    """What is asked: a model, prompts of random tokens and what is emitted behind each, our methods, peers."""

    model: str
    folder: Path
    length: int
    new: int
    prompts: int
    repeats: int
    methods: Sequence[str]
    peers: Sequence[str]


def race(asked: Race) -> tuple[list[dict[str, Any]], Timed[str], dict[str, Any]]:
    """The lines of the table, the times behind them, and what is to be known about them."""
    path = saved(asked.model, asked.folder)
    eager = load(str(path), dtype="bfloat16", device="cpu")
    compiled = CompiledTarget(eager, progress=print)
    plain, *guessing = methods(asked.methods or ["none"])
    mine = [Ours(PLAIN, compiled, plain), Ours(EAGER, eager, plain)]
    mine += [Ours(f"{PLAIN}, {method.label}", compiled, method) for method in guessing]
    texts = some_prompts(eager.vocab, asked.prompts, asked.length)
    refused: dict[str, str] = {}
    with peers(asked.peers, path, asked.length + asked.new, refused) as theirs:
        everyone: list[Decoder] = [*mine, *theirs]
        cases = {one.label: (lambda one=one: mean_lap(one, texts, asked.new)) for one in everyone}
        timed = in_turns(cases, asked.repeats)
        about = {one.label: one.about() for one in theirs}
    size = read_per_forward(eager) + (asked.length + asked.new / 2) * cache_bytes(eager)
    lines = [line(one, timed, size) for one in everyone]
    notes = {
        "model": f"{asked.model}, {sum(p.numel() for p in eager.model.parameters()) / 1e6:.1f}M parameters, bfloat16",
        "prompts": f"{asked.prompts} of {asked.length} tokens, {asked.new} new ones, {asked.repeats} repeats",
        "bytes_per_forward": {"weights": read_per_forward(eager), "with_cache": round(size)},
        "bandwidth_gb_s": timed.bandwidth,
        "not_measured": refused,
    }
    return lines, timed, notes | {"peers": about, "seconds": timed.seconds, "memory": timed.memory}


def mean_lap(one: Decoder, texts: list[list[int]], new: int) -> float:
    """Seconds per token over all prompts."""
    return sum(one.lap(text, new) for text in texts) / len(texts)


def cache_bytes(target: Target) -> int:
    """Bytes of one token's keys and values."""
    config = target.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * target.dtype.itemsize


def line(one: Decoder, timed: Timed[str], size: float) -> dict[str, Any]:
    """A row of the table; the share of the bandwidth is that of forwards, whatever each yields."""
    per_forward = one.tokens / one.forwards if one.forwards else None
    return {
        "decoder": one.label,
        "ms per token": timed.ms(one.label),
        "tokens/s": 1e3 / timed.ms(one.label),
        "tokens per forward": per_forward,
        "time over ours": timed.over(one.label, PLAIN),
        "share of bandwidth": timed.share(one.label, size / (per_forward or 1.0)),
    }


def plain(asked: Race) -> Found:
    """Plain decoding where reading weights is what takes time."""
    lines, timed, about = race(asked)
    bars = {"llama_cpp": 1.0, "vllm": 1.7, "transformers": 2.5}
    figures = [Figure("share of the read bandwidth", lines[0]["share of bandwidth"], 0.85)]
    figures += [
        Figure(f"times {name}", timed.over(name, PLAIN), n) for name, n in bars.items() if name in timed.seconds
    ]
    return Found(lines, figures, about)


def small(asked: Race) -> Found:
    """A small model, where everything else is what takes time."""
    lines, timed, about = race(asked)
    figures = [Figure("plain, tokens/s", lines[0]["tokens/s"], 600.0)]
    guessing = [one for one in timed.seconds if one.startswith(f"{PLAIN}, ") and one != EAGER]
    if "vllm:ngram" in timed.seconds:
        figures += [Figure(f"{one}: times vllm:ngram", timed.over("vllm:ngram", one), 2.0) for one in guessing]
    return Found(lines, figures, about)
