"""The tuner against an exhaustive sweep: every draft that it computed is decoded, and so is its choice.

    python benchmarks/sweep.py MODEL DRAFTER[,KEY=VALUE] ... [--batch N] [--temperature T] [--limit N] [--new N]

First every candidate is decoded in turn, paired with plain decoding, twice. The best five of those and the tuner's
choice are then raced in a new order every time: the best of hundreds of single measurements is mostly luck.
"""

import argparse
import json
import sys
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from foretoken.bench.shapes import Candidate
from foretoken.bench.tasks import prompts
from foretoken.bench.tune import Tuner, tune
from foretoken.drafter import Drafter
from foretoken.loading import load
from foretoken.machine import Machine

RACED, TURNS = 5, 15


def seconds(tuner: Tuner, drafter: Drafter) -> float:
    """Of decoding all texts behind their prompts."""
    return sum(watch.seconds - watch.first for watch in tuner.watch(drafter))


def sweep(tuner: Tuner, found: list[Candidate], turns: int) -> list[float]:
    """Each candidate's speed over plain decoding's, measured right before it."""
    ratios: list[list[float]] = [[] for _ in found]
    order = Random(0)
    for _ in range(turns):
        for i in order.sample(range(len(found)), len(found)):
            ratios[i].append(seconds(tuner, tuner.plain) / seconds(tuner, found[i].make()))
    return [median(r) for r in ratios]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("drafters", nargs="+")
    parser.add_argument("--prompts", default="code")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    target = load(asked.model, dtype=asked.dtype)
    texts = prompts(target, asked.prompts, limit=asked.limit, new=asked.new)
    how: dict[str, Any] = {"batch": asked.batch, "temperature": asked.temperature, "new": asked.new}
    tuning = tune(target, asked.drafters, texts, **how)
    tuner = Tuner(target, texts, seed=0, **how)
    found = [s.candidate for s in tuning.scored]
    measured = sweep(tuner, found, 2)
    best = sorted(range(len(found)), key=lambda i: -measured[i])[:RACED]
    choice = None if tuning.best is None else found.index(tuning.best.candidate)
    finalists = list(dict.fromkeys([*best, *([] if choice is None else [choice])]))
    raced = dict(zip(finalists, sweep(tuner, [found[i] for i in finalists], TURNS), strict=True))
    top = max(raced.values())
    chosen = 1.0 if choice is None else raced[choice]
    rows = [
        {
            "draft": s.candidate.label,
            "tokens_per_forward": round(s.candidate.tokens_per_forward, 3),
            "predicted": round(s.predicted, 3),
            "swept": round(measured[i], 3),
            "raced": round(raced[i], 3) if i in raced else None,
        }
        for i, s in enumerate(tuning.scored)
    ]
    within = sum(abs(r["predicted"] / r["swept"] - 1) <= 0.1 for r in rows)
    print(f"{len(rows)} drafts decoded; best {top:.3f}, the tuner's {chosen:.3f}: {chosen / max(top, 1.0):.1%} of it")
    print(f"{within} of {len(rows)} predictions within 10 % of the sweep")
    for i in finalists:
        print(rows[i])
    if asked.out is not None:
        head = {"command": " ".join(["python", *sys.argv]), "machine": Machine.here().as_dict()}
        choice_row = "plain decoding" if choice is None else found[choice].label
        figures = {"choice": choice_row, "chosen": round(chosen, 3), "best": round(top, 3), "within_10_percent": within}
        asked.out.write_text(json.dumps(head | figures | {"drafts": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
