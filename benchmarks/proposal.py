"""Seconds of a drafter's whole chain against seconds of one forward of its target, compiled and eager, batch 1.

    python benchmarks/proposal.py MODEL NAME:PATH ... [--depth N] [--slots N] [--repeats N] [--out FILE]

A proposal is one call: the rows of two committed tokens, then `depth` guesses, each read back, the likeliest token
taken. The target's forward reads one token. Both attend to `slots` slots of a cache that they write in place, and both
are compiled by inductor in the same way, or not at all. Calls are interleaved; medians.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from foretoken.drafters import make_drafter
from foretoken.feedback import Recurrent
from foretoken.loading import load
from foretoken.machine import Machine
from foretoken.target import Target

COMMITTED = 2
"""Rows that a step commits on average, rounded."""


class Buffers(Cache):
    """Keys and values of `slots` slots per layer; those of the tokens being read are written at `at` [n]."""

    def __init__(self, layers: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        super().__init__(layers=[])
        heads, slots, size = shape
        self.keys = [torch.randn(1, heads, slots, size, dtype=dtype) for _ in range(layers)]
        self.values = [torch.randn(1, heads, slots, size, dtype=dtype) for _ in range(layers)]
        self.at = torch.zeros(1, dtype=torch.int64)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys.index_copy_(2, self.at, key_states)
        values.index_copy_(2, self.at, value_states)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def shape_of(target: Target, slots: int) -> tuple[int, int, int]:
    config = target.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, slots, size


def forward_of(target: Target, slots: int) -> Callable[[], Tensor]:
    """One forward of the target over one token."""
    cache = Buffers(len(target.windows), shape_of(target, slots), target.dtype)
    token, position = torch.tensor([[5]]), torch.tensor([[slots - 1]])
    mask = torch.zeros(1, 1, 1, slots, dtype=target.dtype)

    def forward() -> Tensor:
        cache.at = position[0]
        out = target.model(
            input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        )
        return out.logits.argmax(-1)

    return forward


def proposal_of(target: Target, drafter: Any, slots: int, depth: int) -> Callable[[], Tensor]:
    """A chain of `depth` guesses of a drafter whose network is `Recurrent`."""
    network: Recurrent = drafter.network
    cell, unembed = network.cell, network.cell.unembed()
    enter = getattr(drafter, "enter", torch.nn.Identity())
    cache = Buffers(1, shape_of(target, slots), target.dtype)
    width = len(drafter.needs.features) * target.config.hidden_size
    features, tokens = torch.randn(1, COMMITTED, width, dtype=target.dtype), torch.full((1, COMMITTED), 5)
    first = slots - COMMITTED - depth
    mask = torch.zeros(1, 1, 1, slots, dtype=target.dtype)

    def read(state: Tensor, token: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        cache.at = place
        joined = cell.join(state, network.embedding(token, place[None]))
        output = cell.layers.run(joined, mask.expand(-1, -1, len(place), -1), place[None], cache)[:, -1:]
        guess = unembed(cell.ready(output)).argmax(-1)
        return cell.onward(output), guess if unembed.tokens is None else unembed.tokens[guess]

    def propose() -> Tensor:
        state, guess = read(enter(features), tokens, torch.arange(first, first + COMMITTED))
        guesses = [guess]
        for step in range(depth - 1):
            state, guess = read(state, guess, torch.tensor([first + COMMITTED + step]))
            guesses.append(guess)
        return torch.cat(guesses, 1)

    return propose


def timed(calls: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, all interleaved in a new order every time."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    order, draw = list(calls), Random(0)
    with torch.inference_mode():
        for call in calls.values():
            for _ in range(5):
                call()
        for _ in range(repeats):
            draw.shuffle(order)
            for name in order:
                began = perf_counter()
                calls[name]()
                found[name].append(perf_counter() - began)
    return {name: median(seconds) for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("drafters", nargs="+")
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    target = load(asked.model, dtype="float32", attention="sdpa")
    calls = {"target": forward_of(target, asked.slots)}
    for name in asked.drafters:
        calls[name] = proposal_of(target, make_drafter(name, target), asked.slots, asked.depth)
    rows: list[dict[str, Any]] = []
    for how in ("eager", "compiled"):
        made = calls if how == "eager" else {name: torch.compile(call, dynamic=False) for name, call in calls.items()}
        seconds = timed(made, asked.repeats)
        for name in asked.drafters:
            share = seconds[name] / asked.depth / seconds["target"]
            rows.append(
                {
                    "how": how,
                    "drafter": name,
                    "target_ms": round(1e3 * seconds["target"], 4),
                    "proposal_ms": round(1e3 * seconds[name], 4),
                    "per_level": round(share, 4),
                }
            )
            print(rows[-1], flush=True)
    if asked.out is not None:
        head = {"command": " ".join(sys.argv), "machine": Machine.here().as_dict(), "depth": asked.depth}
        asked.out.write_text(json.dumps(head | {"slots": asked.slots, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
