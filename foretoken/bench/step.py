"""`foretoken bench-step`: what a forward costs at each width, beside transformers, and the engine's own work.

Everything is measured in one process, interleaved: each repeat times every case once in a new order, so that a change
of the machine's speed meets all of them. Medians are reported.
"""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from foretoken.attention import NAME, adopt
from foretoken.bench.engine import read_per_forward
from foretoken.bench.own import cache_ratio, engine_times
from foretoken.compiled import CompiledTarget
from foretoken.decode import Request, Session
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.loading import DTYPES, load
from foretoken.machine import Machine, read_bandwidth, synchronise
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
EAGER, COMPILED, THEIRS = "eager", "compiled", "transformers"
"""Who reads: our target as it is, the same compiled, the model with transformers' own cache and attention."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds, a list of repeats for each (who, width) of a forward, and per token of plain decoding for each who."""

    forward: dict[tuple[str, int], list[float]] = field(default_factory=dict[tuple[str, int], list[float]])
    token: dict[str, list[float]] = field(default_factory=dict[str, list[float]])


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


def step_times(targets: dict[str, Target], widths: list[int], context: int, repeats: int) -> Times:
    """Interleaved forwards and plain decoding behind `context` tokens; the first two rounds warm up.

    targets: ours by who; all read with one model.
    """
    target = targets[EAGER]
    prompt = torch.randint(target.vocab, (1, context), device=target.device)
    forwards = Forwards(targets, prompt, max(widths))
    drafter = make_drafter("none", target)
    steps = generate_steps(target, prompt, repeats + 2)

    def token(who: str) -> float:
        if who == THEIRS:
            with unmodified(target):
                return next(steps)
        session = Session(targets[who], drafter, [Request(prompt[0].tolist(), max_new_tokens=SPAN + 1)])
        return timed(session.run, target.device) / SPAN

    everyone = [*targets, THEIRS]
    work = [(who, width) for who in everyone for width in (*widths, 0)]  # 0: a token of plain decoding
    times = Times({(who, w): [] for who in everyone for w in widths}, {who: [] for who in everyone})
    order = Random(0)
    for repeat in track(
        range(repeats + 2), "forwards", transient=True, console=Console(stderr=True), auto_refresh=False
    ):
        order.shuffle(work)  # what runs before leaves its traces in the caches
        for who, width in work:
            seconds = forwards(who, width) if width else token(who)
            if repeat >= 2:
                (times.forward[who, width] if width else times.token[who]).append(seconds)
    return times


class Forwards:
    """Times a forward of any width behind a prompt [1, n] that was read before."""

    def __init__(self, targets: dict[str, Target], prompt: torch.Tensor, widest: int) -> None:
        self.targets, self.target = targets, targets[EAGER]
        context = prompt.shape[1]
        self.cache = self.target.cache(1, context + 64 + widest, widest)
        self.dynamic = DynamicCache(config=self.target.config)
        self.target.read(prompt, [context], self.cache)
        self.target.model(input_ids=prompt, past_key_values=self.dynamic, use_cache=True, logits_to_keep=1)

    def __call__(self, who: str, width: int) -> float:
        """Seconds of one forward; nothing of it is kept."""
        draft = draft_of(width, self.target.vocab, self.target.device)
        if who != THEIRS:
            return timed(lambda: self.targets[who].judge(draft, self.cache), self.target.device)
        with unmodified(self.target):
            seconds = timed(lambda: theirs_forward(self.target, draft, self.dynamic), self.target.device)
        self.dynamic.crop(-width)
        return seconds


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


@torch.inference_mode()
def run(
    model: str, dtype: str | None, widths: list[int], context: int, repeats: int, out: str | None, compiled: bool
) -> None:
    """Measure, print the tables, and write them as JSON to `out` if given."""
    if any(w < 1 for w in widths) or repeats < 1 or context < 8:
        raise UserError(
            f"Widths {widths}, {repeats} repeats, context {context}: widths and repeats start at 1, the context at 8."
        )
    target, console = target_for(model, dtype), Console()
    targets = {EAGER: target}
    if compiled:
        targets[COMPILED] = CompiledTarget(target).settled()
    result: dict[str, Any] = {
        "model": model,
        "parameters": sum(p.numel() for p in target.model.parameters()),
        "dtype": str(target.dtype).removeprefix("torch."),
        "context": context,
        "repeats": repeats,
        "machine": Machine.here().as_dict(),
        "bandwidth_gb_s": read_bandwidth(target.device),
    }
    result["floor_ms"] = read_per_forward(target) / result["bandwidth_gb_s"] / 1e6
    result |= found(step_times(targets, sorted({1, *widths}), context, repeats))
    result["engine_ms"] = {
        f"batch {b}, temperature {t:g}": median(engine_times(32000, b, t, repeats)) * 1e3
        for t in (0.0, 1.0)
        for b in (1, 8)
    }
    result["cache_over_static"] = {n: cache_ratio(target, n) for n in (512, 2048)}
    show(result, console)
    if out:
        Path(out).write_text(json.dumps(result, indent=1) + "\n")


def found(times: Times) -> dict[str, Any]:
    """What the times say, for the record; that of a compiled target if there is one."""
    token, widths = times.token, sorted({w for _, w in times.forward})
    record: dict[str, Any] = {"widths": {}}
    for w in widths:
        eager, theirs = times.forward[EAGER, w], times.forward[THEIRS, w]
        row = {"ms": median(eager) * 1e3, "transformers_ms": median(theirs) * 1e3}
        row["v"] = paired(eager, times.forward[EAGER, 1])
        if COMPILED in token:
            mine = times.forward[COMPILED, w]
            row |= {"compiled_ms": median(mine) * 1e3, "compiled_v": paired(mine, times.forward[COMPILED, 1])}
        record["widths"][w] = row
    record |= {"step_ms": median(token[EAGER]) * 1e3, "generate_ms": median(token[THEIRS]) * 1e3}
    record["generate_over_step"] = paired(token[THEIRS], token[EAGER])
    if COMPILED in token:
        record["compiled_step_ms"] = median(token[COMPILED]) * 1e3
        record["generate_over_compiled_step"] = paired(token[THEIRS], token[COMPILED])
    return record


def paired(a: list[float], b: list[float]) -> float:
    """The median of the ratios a/b, repeat by repeat."""
    return median(x / y for x, y in zip(a, b, strict=True))


def show(result: dict[str, Any], console: Console) -> None:
    """Print the measurement as tables."""
    console.print(
        f"{result['model']}: {result['parameters'] / 1e6:.1f}M parameters, {result['dtype']}, {result['context']} "
        f"tokens committed; read bandwidth {result['bandwidth_gb_s']:.1f} GB/s, so {result['floor_ms']:.1f} ms at least"
    )
    compiled = "compiled_step_ms" in result
    more = ("compiled ms", "v(width)") if compiled else ()
    table = Table(
        *("width", "ms", "v(width)", *more, "transformers ms", "ratio"), title="One forward", title_justify="left"
    )
    for w, row in result["widths"].items():
        best = row["compiled_ms"] if compiled else row["ms"]
        cells = [row["ms"], row["v"], *([row["compiled_ms"], row["compiled_v"]] if compiled else [])]
        cells += [row["transformers_ms"], best / row["transformers_ms"]]
        table.add_row(str(w), *(f"{cell:.2f}" for cell in cells))
    console.print(table)
    console.print(
        f"One token: {result['step_ms']:.2f} ms with Session.step, {result['generate_ms']:.2f} ms with transformers' "
        f"generate (paired ratio {result['generate_over_step']:.2f})"
    )
    if compiled:
        console.print(
            f"Compiled: {result['compiled_step_ms']:.2f} ms with Session.step (paired ratio "
            f"{result['generate_over_compiled_step']:.2f})"
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
