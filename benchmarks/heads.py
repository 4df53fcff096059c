"""Tokens per forward of trained heads on held-out code: chains, trees, temperatures, with the target's noise or not.

    python benchmarks/heads.py MODEL NAME:PATH[,key=value...] ... [--prompts N] [--new N] [--out FILE]

Every output is compared with plain decoding of the same seed. Acceptance does not depend on the machine.
"""

import argparse
import copy
import json
import sys
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from foretoken.bench.machine import Machine
from foretoken.decode import Request, Row
from foretoken.drafter import Feed
from foretoken.drafters import make_drafter
from foretoken.generation import decode_all
from foretoken.loading import load
from foretoken.rules import Match
from foretoken.sampling import Sampling
from foretoken.target import Target
from foretoken.training.prompts import ids_of, prompts_of
from foretoken.training.sources import documents


class Blind:
    """A drafter that does not look at the target's noise: its candidates are the likeliest ones (plain top-k)."""

    def __init__(self, drafter: Any) -> None:
        self.drafter, self.needs, self.start = drafter, drafter.needs, drafter.start

    def propose(self, feed: Feed, state: Any) -> Any:
        quiet = copy.copy(feed.sampler)
        quiet.sampled = False
        return self.drafter.propose(replace(feed, sampler=quiet), state)


@dataclass(frozen=True, slots=True)
class Result:
    """One drafter at one temperature.

    accepted     per depth, the share of forwards in which the guess of that depth survived
    same         whether every output is that of plain decoding
    """

    drafter: str
    temperature: float
    noise: bool
    nodes: int
    tokens_per_forward: float
    accepted: list[float]
    same: bool


def prompts(target: Target, count: int, length: int) -> list[list[int]]:
    """Pieces of held-out documents, the same for every drafter."""
    found = list(islice(prompts_of(documents("stdlib", split="held_out"), target, length=length, cuts=4, seed=1), 2000))
    return [ids_of(target, p) for p in Random(0).sample(found, min(count, len(found)))]


def decode(target: Target, drafter: Any, asked: list[list[int]], temperature: float, new: int) -> list[Row]:
    sampling = Sampling(temperature=temperature, seed=5)
    return decode_all(
        target, drafter, [Request(p, sampling, i, new) for i, p in enumerate(asked)], Match(), batch_size=8
    )


def result(name: str, temperature: float, noise: bool, drafter: Any, rows: list[Row], plain: list[Row]) -> Result:
    forwards = sum(r.forwards for r in rows)
    emitted = sum(r.emitted - 1 for r in rows)  # the first token is the prompt's forward's
    depths = max((len(r.accepted) for r in rows), default=0)
    accepted = [sum(r.accepted[d] for r in rows if d < len(r.accepted)) / forwards for d in range(depths)]
    same = [r.output for r in rows] == [r.output for r in plain]
    shares = [round(a, 4) for a in accepted]
    return Result(name, temperature, noise, drafter.needs.width - 1, round(emitted / forwards, 4), shares, same)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("drafters", nargs="+")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    target = load(asked.model, dtype="float32")
    texts = prompts(target, asked.prompts, asked.length)
    found: list[Result] = []
    for temperature in (float(t) for t in asked.temperatures.split(",")):
        plain = decode(target, make_drafter("none", target), texts, temperature, asked.new)
        for given in asked.drafters:
            name, *settings = given.split(",")
            drafter = make_drafter(name, target, dict(s.split("=") for s in settings))
            for noise in (True, False) if temperature > 0 else (True,):
                rows = decode(target, drafter if noise else Blind(drafter), texts, temperature, asked.new)
                found.append(result(given, temperature, noise, drafter, rows, plain))
                r = found[-1]
                print(
                    f"{r.drafter:60} T={r.temperature:g} {'noise' if noise else 'plain':6} {r.nodes:3} nodes "
                    f"{r.tokens_per_forward:.3f} tokens/forward {r.accepted} {'same' if r.same else 'DIFFERENT'}"
                )
    if asked.out is not None:
        head = {
            "command": " ".join(sys.argv),
            "machine": Machine.here().as_dict(),
            "prompts": len(texts),
            "new": asked.new,
        }
        asked.out.write_text(json.dumps(head | {"results": [asdict(r) for r in found]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
