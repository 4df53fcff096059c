"""One forward of the compiled target: over drafts of any width, and behind any context."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from found import Figure, Found
from race import cache_bytes
from shapes import saved
from turns import in_turns

from foretoken.bench.engine import read_per_forward
from foretoken.cache import SlotCache
from foretoken.compiled import CompiledTarget
from foretoken.costs import some_draft, some_tokens
from foretoken.loading import load
from foretoken.target import Target
from foretoken.tree import chain

SPAN = 4
"""Forwards that are timed together."""
BARS = {8: 1.5, 16: 2.0}
"""How many times as long as one node's a forward over so many is to take at most."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A model, widths of drafts, committed tokens before them, repeats."""

    model: str
    folder: Path
    widths: Sequence[int]
    contexts: Sequence[int]
    repeats: int


def compiled(asked: Asked) -> Target:
    path = saved(asked.model, asked.folder)
    return CompiledTarget(load(str(path), dtype="bfloat16", device="cpu"), progress=print).settled()


def filled(target: Target, context: int, widest: int) -> SlotCache:
    """A cache that holds `context` tokens and has room for a draft."""
    cache = target.cache(1, context + widest, widest)
    target.read(some_tokens(target, 1, context), [context], cache)
    return cache


def forward(target: Target, cache: SlotCache, shape: str, width: int) -> float:
    """Seconds of one forward over a draft, nothing of which is kept. shape: chain, or tree of two nodes behind each."""
    draft = chain(some_tokens(target, 1, width)) if shape == "chain" else some_draft(target, 1, width)
    began = perf_counter()
    for _ in range(SPAN):
        target.judge(draft, cache)
    return (perf_counter() - began) / SPAN


def about(asked: Asked, target: Target, bandwidth: list[float]) -> dict[str, Any]:
    number = sum(p.numel() for p in target.model.parameters()) / 1e6
    return {
        "model": f"{asked.model}, {number:.1f}M parameters, bfloat16, compiled",
        "repeats": f"{asked.repeats} of {SPAN} forwards",
        "bandwidth_gb_s": bandwidth,
    }


@torch.inference_mode()
def widths(asked: Asked) -> Found:
    """Drafts of each width behind one context, chains and trees."""
    target, (context, *_) = compiled(asked), asked.contexts
    cache = filled(target, context, max(asked.widths))
    shapes = [("chain", w) for w in asked.widths] + [("tree", w) for w in asked.widths if w > 2]
    cases = {(shape, w): (lambda shape=shape, w=w: forward(target, cache, shape, w)) for shape, w in shapes}
    timed = in_turns(cases, asked.repeats, warm=2)
    size = read_per_forward(target) + context * cache_bytes(target)
    lines = [
        {
            "draft": shape,
            "width": w,
            "ms": timed.ms((shape, w)),
            "v(width)": timed.over((shape, w), ("chain", 1)),
            "share of bandwidth": timed.share((shape, w), size),
        }
        for shape, w in shapes
    ]
    figures = [
        Figure(f"{shape}, width {w} over 1", timed.over((shape, w), ("chain", 1)), BARS[w], most=True)
        for shape, w in shapes
        if w in BARS
    ]
    notes = about(asked, target, timed.bandwidth) | {"context": context}
    return Found(lines, figures, notes)


@torch.inference_mode()
def contexts(asked: Asked) -> Found:
    """Forwards behind each context: how their time grows, and how the bytes that they read."""
    target = compiled(asked)
    caches = {context: filled(target, context, max(asked.widths)) for context in asked.contexts}
    pairs = [(context, w) for w in asked.widths for context in asked.contexts]
    cases = {(c, w): (lambda c=c, w=w: forward(target, caches[c], "chain", w)) for c, w in pairs}
    timed = in_turns(cases, asked.repeats, warm=2)
    weights, least = read_per_forward(target), min(asked.contexts)
    size = {context: weights + context * cache_bytes(target) for context in asked.contexts}
    lines = [
        {
            "width": w,
            "context": c,
            "ms": timed.ms((c, w)),
            f"time over {least}": timed.over((c, w), (least, w)),
            f"bytes over {least}": size[c] / size[least],
            "share of bandwidth": timed.share((c, w), size[c]),
        }
        for c, w in pairs
    ]
    figures = [
        Figure(
            f"width {x['width']}, context {x['context']}: time", x[f"time over {least}"], x[f"bytes over {least}"], True
        )
        for x in lines
        if x["context"] != least
    ]
    return Found(lines, figures, about(asked, target, timed.bandwidth) | {"weights": weights})
