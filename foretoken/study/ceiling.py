"""`foretoken analyze ceiling`: what a drafter could gain on a text, from the model alone, before any is trained."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from foretoken.analysis.speedup import Ratio, at_width, best_length, between, speedup
from foretoken.analysis.summary import Floats, chains
from foretoken.costs import Costs, finish
from foretoken.costs import measure as forwards
from foretoken.generation import Output, generate
from foretoken.loading import load, read_config
from foretoken.page import write_file
from foretoken.progress import Update, progress
from foretoken.study import marginal
from foretoken.study.marginal import Settings
from foretoken.study.rows import Row, file_of, read
from foretoken.study.windows import length_for, windows
from foretoken.target import Target, layer_windows, model_class_of
from foretoken.training.encode import Encoder

PROMPTS, PROMPT, NEW = 8, 128, 64
"""Pieces of the text that a look-up continues, their tokens at most, and those of an answer."""
LOOKUP = "prompt_lookup"
TURNS = 9
"""Of each timing, the first of which warms up."""
PAYS = 1.1
"""Speed-up from which something is worth its trouble."""
KINDS = {
    "independent": "independent heads that know the marginal law",
    "sequential": "a drafter that knows the model's law behind its own guesses",
    "lookup": "prompt lookup",
}


@dataclass(frozen=True, slots=True)
class Times:
    """Over the time of a forward over one token, on this machine.

    v      of a forward, by width
    head   the output head over all guesses of a draft at once: the least that independent heads take
    layer  one layer and the output head: one guess of a sequential drafter
    own    everything else of a plain step
    """

    v: Mapping[int, float]
    head: float
    layer: float
    own: float


def run(
    models: Sequence[str], data: str, folder: Path, settings: Settings, memory: float | None, device: str | None
) -> list[str]:
    """Write the rows of `analyze marginal` and what follows from them; notes on what was done differently."""
    for model in models:  # look-ups are decoded, so what cannot branch is refused before the work
        config = read_config(model)
        layer_windows(config.get_text_config(decoder=True), model_class_of(config))
    notes = marginal.run(models, data, folder, settings, memory, device)
    with progress() as update:
        for model in models:
            write(load(model, dtype=settings.dtype, device=device), model, data, folder, settings, update)
    return notes


def write(target: Target, model: str, data: str, folder: Path, settings: Settings, update: Update) -> None:
    """The file of one model, whose rows are in the folder."""
    settings = replace(settings, length=length_for(target.context, settings.length))
    head = marginal.head_of(target.model, model, data, settings, "tree")
    found = read(file_of(folder, head))
    update(f"{head.label}: look-ups", 0, 2)
    prompts = pieces(target, data, settings)
    answers = {t: continued(target, prompts, LOOKUP, settings, t) for t in (0.0, 1.0)}
    update(f"{head.label}: timing", 1, 2)
    times = timed(target, settings.horizon - 1, continued(target, prompts, "none", settings, 0.0))
    temperatures = {f"{t:g}": survivals(found.rows, t) | {"lookup": said(answers[t])} for t in answers}
    predicted = {t: foretold(some, times) for t, some in temperatures.items()}
    record = {
        "head": asdict(replace(head, kind="ceiling")),
        "depths": list(range(1, settings.horizon)),
        "temperatures": temperatures,
        "times": asdict(times),
        "predicted": predicted,
        "verdict": verdict(predicted),
    }
    name = file_of(folder, head).name.removeprefix("marginal-").removesuffix(".jsonl")
    write_file(folder / f"ceiling-{name}.json", json.dumps(record, indent=1) + "\n")


def survivals(rows: Sequence[Row], temperature: float) -> dict[str, list[float]]:
    """P(the first i guesses are accepted) of ideal drafters, by guess.

    At temperature 0 a head is right where the marginal's likeliest token is what the model itself says; a sequential
    drafter always. At 1 guesses are drawn from the ideal law, or are its likeliest token.
    """

    def column(name: str) -> Floats:
        return np.array([row[name] for row in rows], dtype=np.float64)

    if temperature == 0:
        right = np.cumprod(column("greedy")[:, 1:] == 0, axis=1).mean(0)
        return {"independent": plain(right), "sequential": [1.0] * len(right)}
    drawn = chains(column("ratio"), column("overlap")).mean(0)
    return {
        "independent": plain(drawn),
        "independent_likeliest": plain(chains(column("hit"), column("top")).mean(0)),
        "sequential": [1.0] * len(drawn),
        "sequential_likeliest": plain(chains(column("sure"), column("peak")).mean(0)),
    }


def plain(values: Floats) -> list[float]:
    return [round(float(x), 6) for x in values]


def pieces(target: Target, data: str, settings: Settings) -> list[list[int]]:
    """Tokens of pieces of the text."""
    assert target.tokenizer is not None
    found = windows(Encoder(target.tokenizer), data, settings.length, settings.limit, settings.horizon + 1)
    return [w.tokens[: min(PROMPT, max(1, len(w.tokens) // 2))] for w in islice(found, PROMPTS)]


def continued(
    target: Target, prompts: Sequence[list[int]], drafter: str, settings: Settings, temperature: float
) -> list[Output]:
    """The pieces as the model goes on with them, one at a time."""
    how: dict[str, Any] = {"temperature": temperature, "seed": settings.seed, "max_new_tokens": NEW}
    return generate(target, prompts, drafter=drafter, batch_size=1, **how)


def said(answers: Sequence[Output]) -> dict[str, Any]:
    """What look-ups brought: tokens per forward, and the share of forwards that accepted i guesses or more."""
    forwards_of = [a.forwards for a in answers]
    depth = max((len(a.accepted_per_depth) for a in answers), default=0)
    shares = [[*a.accepted_per_depth, *[0.0] * (depth - len(a.accepted_per_depth))] for a in answers]
    total = max(1, sum(forwards_of))
    reached = [sum(s[i] * n for s, n in zip(shares, forwards_of, strict=True)) / total for i in range(depth)]
    tokens = sum(a.tokens_per_forward * n for a, n in zip(answers, forwards_of, strict=True)) / total
    return {"tokens_per_forward": round(tokens, 4), "survival": plain(np.array(reached))}


def timed(target: Target, guesses: int, plainly: Sequence[Output]) -> Times:
    """The parts of a step on this machine; `plainly` are answers of plain decoding."""
    costs: Costs = forwards(target)
    forward = costs.forward[0]
    states = torch.zeros(1, guesses, target.config.hidden_size, dtype=target.dtype, device=target.device)
    head = seconds_of(lambda: target.unembed(states), target)
    layer = forwards(target.shallow(1), widths=(1, 2)).forward[0] if len(target.windows) > 1 else forward
    step = median(a.seconds / (a.forwards + 1) for a in plainly)  # the prompt's forward is one more
    v = {width: round(t / forward, 4) for width, t in zip(costs.widths, costs.forward, strict=True)}
    return Times(v, round(head / forward, 4), round(layer / forward, 4), round(max(0.0, step / forward - 1), 4))


@torch.inference_mode()
def seconds_of(work: Any, target: Target) -> float:
    """The median time of a call."""
    found: list[float] = []
    for _ in range(TURNS):
        began = perf_counter()
        work()
        finish(target)
        found.append(perf_counter() - began)
    return median(found[1:])


def foretold(temperature: Mapping[str, Any], times: Times) -> dict[str, dict[str, float]]:
    """Tokens per forward, speed-up and length of the best chain of each kind; of look-ups those that were measured."""
    v, whole = over_plain(times)
    found: dict[str, dict[str, float]] = {}
    for kind, survival in temperature.items():
        if kind == "lookup":
            tokens, length = survival["tokens_per_forward"], max(1, len(survival["survival"]))
            fast = speedup(tokens, at_width(v, min(1 + length, max(times.v))), 0.0)
            found[kind] = {"tokens_per_forward": tokens, "speedup": round(fast, 4), "length": length}
            continue
        each, once = (times.layer, 0.0) if kind.startswith("sequential") else (0.0, times.head)
        best = best_length(survival, each / whole, v, once / whole)
        found[kind] = {
            "tokens_per_forward": round(best.tokens, 4),
            "speedup": round(best.speedup, 4),
            "length": best.guesses,
        }
    return found


def over_plain(times: Times) -> tuple[Ratio, float]:
    """v over the time of a plain step, which has work of its own besides its forward, and that time."""
    whole = 1 + times.own
    return between({width: (t + times.own) / whole for width, t in times.v.items()}), whole


def verdict(predicted: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """What the predictions say, in a few sentences."""
    said: list[str] = []
    for temperature, kinds in predicted.items():
        parts = [
            f"{name} {kinds[kind]['tokens_per_forward']:.2f} tokens per forward "
            f"({kinds[kind]['speedup']:.2f} times as fast)"
            for kind, name in KINDS.items()
            if kind in kinds
        ]
        said.append(f"At temperature {temperature}: {', '.join(parts)}.")
    heads = [kinds["independent"]["speedup"] for kinds in predicted.values()]
    free = [kinds["lookup"]["speedup"] for kinds in predicted.values()]
    chain = [kinds["sequential"]["speedup"] for kinds in predicted.values()]
    return " ".join([*said, advice(fmean(heads), fmean(chain), fmean(free))])


def advice(heads: float, chain: float, lookup: float) -> str:
    """Whether to train anything, from predicted speed-ups, each the mean over temperatures."""
    if max(heads, chain, lookup) < PAYS:
        return "On this machine and text no drafter pays."
    if lookup >= max(heads, PAYS):
        return "Prompt lookup, which needs no training, gains at least as much here as independent heads could."
    if heads >= PAYS:
        return "Independent heads can pay here; how near training brings them to this is another question."
    return "Independent heads cannot pay here; drafters that are told their own guesses might."
