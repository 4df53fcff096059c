"""`foretoken bench-step`: what a forward costs at each width, beside transformers, and the engine's own work.

Everything is measured in one process, interleaved: each repeat times every case once in a new order, so that a change
of the machine's speed meets all of them. Medians are reported.
"""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from foretoken.attention import NAME, adopt
from foretoken.cache import SlotCache
from foretoken.decode import Request, Session
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.loading import DTYPES, load
from foretoken.machine import Machine, read_bandwidth, synchronise
from foretoken.sampling import Sampling
from foretoken.target import Target
from foretoken.tree import Draft, chain

SYNTHETIC = {
    "synthetic-134m": LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=32000,
        max_position_embeddings=4096,
    )
}
"""Random weights of real shapes: time does not depend on what the weights say."""


SPAN = 32
"""Consecutive tokens of plain decoding that are timed together."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds per forward, a list of repeats for each width, and per token of plain decoding, ours and `generate`'s."""

    ours: dict[int, list[float]]
    theirs: dict[int, list[float]]
    plain_step: list[float]
    generate_step: list[float]


def target_for(model: str, dtype: str | None) -> Target:
    """The model at a path, or one of SYNTHETIC with random weights (bfloat16 unless `dtype` says otherwise)."""
    if model not in SYNTHETIC:
        return load(model, dtype=dtype)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    built: Any = LlamaForCausalLM(SYNTHETIC[model])
    built.generation_config.eos_token_id = None
    built.generation_config.pad_token_id = 0
    adopt(built)
    return Target(built.to(device, DTYPES[dtype or "bfloat16"]))


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `work` takes."""
    synchronise(device)
    began = perf_counter()
    work()
    synchronise(device)
    return perf_counter() - began


def draft_of(width: int, vocab: int, device: torch.device) -> Draft:
    """A chain of random tokens; its cost is that of any draft as wide."""
    return chain(torch.randint(vocab, (1, width), device=device))


def forward_times(target: Target, widths: list[int], context: int, repeats: int) -> Times:
    """Interleaved forwards behind `context` tokens; the first two rounds warm up."""
    device, vocab = target.device, target.vocab
    prompt = torch.randint(vocab, (1, context), device=device)
    cache = target.cache(1, context + 64 + max(widths), max(widths))
    dynamic = DynamicCache(config=target.config)
    target.read(prompt, [context], cache)
    target.model(input_ids=prompt, past_key_values=dynamic, use_cache=True, logits_to_keep=1)
    drafter = make_drafter("none", target)
    steps = generate_steps(target, prompt, repeats + 2)
    times = Times({w: [] for w in widths}, {w: [] for w in widths}, [], [])

    def one(kind: str, width: int) -> float:
        draft = draft_of(width, vocab, device)
        if kind == "ours":
            return timed(lambda: target.judge(draft, cache), device)
        if kind == "step":
            session = Session(target, drafter, [Request(prompt[0].tolist(), max_new_tokens=SPAN + 1)])
            return timed(lambda: [session.step() for _ in range(SPAN)], device) / SPAN
        if kind == "generate":
            with unmodified(target):
                return next(steps)
        with unmodified(target):
            seconds = timed(lambda: theirs_forward(target, draft, dynamic), device)
        dynamic.crop(-width)
        return seconds

    work = [(kind, w) for kind in ("ours", "theirs") for w in widths] + [("step", 1), ("generate", 1)]
    order, kept = Random(0), {"step": times.plain_step, "generate": times.generate_step}
    for repeat in track(
        range(repeats + 2), "forwards", transient=True, console=Console(stderr=True), auto_refresh=False
    ):
        order.shuffle(work)  # what runs before leaves its traces in the caches
        for kind, w in work:
            seconds = one(kind, w)
            if repeat >= 2:
                kept.get(kind, (times.ours if kind == "ours" else times.theirs)[w]).append(seconds)
    return times


@contextmanager
def unmodified(target: Target) -> Generator[None]:
    """The model with transformers' own attention in place of ours."""
    ours: Any = target.model.config._attn_implementation  # pyright: ignore[reportPrivateUsage]
    target.model.set_attn_implementation("sdpa" if ours == NAME else ours)
    try:
        yield
    finally:
        target.model.set_attn_implementation(ours)


def theirs_forward(target: Target, draft: Draft, cache: DynamicCache) -> None:
    """Unmodified transformers reads the same tokens as a chain behind its own growing cache."""
    target.model(input_ids=draft.tokens, past_key_values=cache, use_cache=True)


def generate_steps(target: Target, prompt: torch.Tensor, repeats: int) -> Any:
    """Yields the seconds of one token of transformers' `generate`, from the difference of two lengths."""

    def run(tokens: int) -> float:
        options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        mask = torch.ones_like(prompt)
        model: Any = target.model
        return timed(lambda: model.generate(prompt, attention_mask=mask, **options), target.device)

    for _ in range(repeats):
        yield (run(1 + SPAN) - run(1)) / SPAN


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


@torch.inference_mode()
def run(model: str, dtype: str | None, widths: list[int], context: int, repeats: int, out: str | None) -> None:
    """Measure, print the tables, and write them as JSON to `out` if given."""
    if any(w < 1 for w in widths) or repeats < 1 or context < 8:
        raise UserError(
            f"Widths {widths}, {repeats} repeats, context {context}: widths and repeats start at 1, the context at 8."
        )
    target, console = target_for(model, dtype), Console()
    weights = sum(p.nbytes for p in target.model.parameters())
    result: dict[str, Any] = {
        "model": model,
        "parameters": sum(p.numel() for p in target.model.parameters()),
        "dtype": str(target.dtype).removeprefix("torch."),
        "context": context,
        "repeats": repeats,
        "machine": Machine.here().as_dict(),
        "bandwidth_gb_s": read_bandwidth(target.device),
    }
    times = forward_times(target, sorted({1, *widths}), context, repeats)
    result["widths"] = {
        w: {"ms": median(t) * 1e3, "transformers_ms": median(times.theirs[w]) * 1e3, "v": paired(t, times.ours[1])}
        for w, t in times.ours.items()
    }
    result["step_ms"], result["generate_ms"] = median(times.plain_step) * 1e3, median(times.generate_step) * 1e3
    result["generate_over_step"] = paired(times.generate_step, times.plain_step)
    result["floor_ms"] = weights / result["bandwidth_gb_s"] / 1e6
    result["engine_ms"] = {
        f"batch {b}, temperature {t:g}": median(engine_times(32000, b, t, repeats)) * 1e3
        for t in (0.0, 1.0)
        for b in (1, 8)
    }
    result["cache_over_static"] = {n: cache_ratio(target, n) for n in (512, 2048)}
    show(result, console)
    if out:
        Path(out).write_text(json.dumps(result, indent=1) + "\n")


def paired(a: list[float], b: list[float]) -> float:
    """The median of the ratios a/b, repeat by repeat."""
    return median(x / y for x, y in zip(a, b, strict=True))


def show(result: dict[str, Any], console: Console) -> None:
    """Print the measurement as tables."""
    console.print(
        f"{result['model']}: {result['parameters'] / 1e6:.1f}M parameters, {result['dtype']}, {result['context']} "
        f"tokens committed; read bandwidth {result['bandwidth_gb_s']:.1f} GB/s, so {result['floor_ms']:.1f} ms at least"
    )
    table = Table("width", "ms", "v(width)", "transformers ms", "ratio", title="One forward", title_justify="left")
    for w, row in result["widths"].items():
        ratio = row["ms"] / row["transformers_ms"]
        table.add_row(str(w), f"{row['ms']:.2f}", f"{row['v']:.2f}", f"{row['transformers_ms']:.2f}", f"{ratio:.2f}")
    console.print(table)
    console.print(
        f"One token: {result['step_ms']:.2f} ms with Session.step, {result['generate_ms']:.2f} ms with transformers' "
        f"generate (paired ratio {result['generate_over_step']:.2f})"
    )
    table = Table(
        "case", "ms per step", title="The engine's own work, width 8, vocabulary 32,000", title_justify="left"
    )
    for case, ms in result["engine_ms"].items():
        table.add_row(case, f"{ms:.2f}")
    console.print(table)
    for tokens, ratio in result["cache_over_static"].items():
        console.print(f"Cache for {tokens} tokens: {ratio:.3f} times transformers' static cache")
    console.print(Machine(**result["machine"]).line(), style="dim", highlight=False)
