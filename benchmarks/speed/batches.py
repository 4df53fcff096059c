"""Throughput of 1 to 64 prompts decoded together, with guessing off, on, and on where it pays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from found import Figure, Found
from shapes import saved
from turns import Timed, in_turns

from foretoken.bench.engine import decode
from foretoken.bench.methods import methods
from foretoken.bench.rows import PLAIN
from foretoken.bench.tasks import prompts
from foretoken.compiled import CompiledTarget
from foretoken.decode import Request
from foretoken.drafter import Drafter
from foretoken.drafters import make_drafter
from foretoken.loading import load
from foretoken.rules import Match
from foretoken.sampling import Sampling
from foretoken.target import Target

WARM = 2
"""Rounds before those that count: an adaptive method learns what pays."""
AGAIN = f"{PLAIN} again"
"""Plain decoding once more: how far its figure is from 1 says what a difference from 1 means."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A model, methods beside plain decoding, prompts decoded together, tasks, new tokens behind each, repeats."""

    model: str
    folder: Path
    dtype: str
    methods: Sequence[str]
    batches: Sequence[int]
    tasks: str
    temperature: float
    new: int
    repeats: int


def batches(asked: Asked) -> Found:
    """Every method at every batch size, paired with plain decoding."""
    path = saved(asked.model, asked.folder)
    target = CompiledTarget(load(str(path), dtype=asked.dtype, device="cpu"), progress=print)
    drafters = {m.label: make_drafter(m.drafter, target, dict(m.settings)) for m in methods(asked.methods)}
    drafters[AGAIN] = drafters[PLAIN]
    for drafter in drafters.values():
        target.settled(drafter.needs.features)
    lines: list[dict[str, Any]] = []
    bandwidth: list[list[float]] = []
    for task in asked.tasks.split(","):
        texts = [p.ids for p in prompts(target, task, limit=max(asked.batches), new=asked.new)]
        for batch in asked.batches:
            cases = {label: timer(target, drafter, asked, texts[:batch]) for label, drafter in drafters.items()}
            timed = in_turns(cases, asked.repeats, WARM)
            bandwidth.append(timed.bandwidth)
            lines += [line(task, batch, label, timed) for label in drafters]
    figures = [
        Figure(f"{x['task']}, batch {x['batch']}: {x['method']}, times plain", x["times plain"], 1.0)
        for x in lines
        if "adaptive=true" in x["method"]
    ]
    about = {
        "model": f"{path.name}, {sum(p.numel() for p in target.model.parameters()) / 1e6:.1f}M parameters, compiled",
        "dtype": asked.dtype,
        "decoded": f"{asked.new} new tokens, temperature {asked.temperature:g}, {asked.repeats} repeats behind {WARM}",
        "bandwidth_gb_s": bandwidth,
    }
    return Found(lines, figures, about)


def timer(target: Target, drafter: Drafter, asked: Asked, texts: list[list[int]]) -> Callable[[], float]:
    """What decodes the texts together, and says how many seconds a token behind the first ones took."""

    def lap() -> float:
        sampling = Sampling(temperature=asked.temperature)
        requests = [Request(text, sampling, i, asked.new) for i, text in enumerate(texts)]
        watch = decode(target, drafter, Match(), requests)
        return (watch.seconds - watch.first) / sum(row.emitted - 1 for row in watch.rows)

    return lap


def line(task: str, batch: int, method: str, timed: Timed[str]) -> dict[str, Any]:
    return {
        "task": task,
        "batch": batch,
        "method": method,
        "tokens/s": 1e3 / timed.ms(method),
        "times plain": timed.over(PLAIN, method),
    }
