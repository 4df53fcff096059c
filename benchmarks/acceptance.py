"""Tokens per forward of any drafters: chains, trees, temperatures, tasks, with the target's noise or not.

    python benchmarks/acceptance.py MODEL NAME:PATH[,key=value...] ... [--tasks T,T] [--prompts N] [--out FILE]

Three ways to choose guesses at temperatures above 0: ranked under the target's noise, the drafter's likeliest tokens
(both judged by `match`, every output compared with plain decoding of the same seed), and drawn without replacement for
the rule `rejection`, whose output has the same law and is another sample. Acceptance does not depend on the machine.
"""

import argparse
import copy
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from foretoken.bench.tasks import prompts
from foretoken.decode import Request, Row
from foretoken.drafter import Feed
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.generation import decode_all
from foretoken.loading import load
from foretoken.machine import Machine
from foretoken.rules import Match, Rejection, Rule
from foretoken.sampling import Sampling
from foretoken.target import Target


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
    """One drafter on one task at one temperature.

    way          noise, top or rejection
    accepted     per depth, the share of forwards in which the guess of that depth survived
    same         whether every output is that of plain decoding; None for rejection, which says something else
    """

    drafter: str
    task: str
    temperature: float
    way: str
    width: int
    tokens_per_forward: float
    accepted: list[float]
    same: bool | None


def decode(target: Target, drafter: Any, rule: Rule, asked: list[list[int]], temperature: float, new: int) -> list[Row]:
    sampling = Sampling(temperature=temperature, seed=5)
    requests = [Request(p, sampling, i, new) for i, p in enumerate(asked)]
    return decode_all(target, drafter, requests, rule, batch_size=8)


def ways(drafter: Any, temperature: float) -> list[tuple[str, Any, Rule]]:
    if temperature == 0:
        return [("noise", drafter, Match())]
    return [("noise", drafter, Match()), ("top", Blind(drafter), Match()), ("rejection", drafter, Rejection())]


def outcome(rows: list[Row]) -> tuple[float, list[float]]:
    """Tokens per forward, and the shares accepted by depth."""
    forwards = sum(r.forwards for r in rows)
    emitted = sum(r.emitted - 1 for r in rows)  # the first token is the prompt's forward's
    depths = max((len(r.accepted) for r in rows), default=0)
    accepted = [sum(r.accepted[d] for r in rows if d < len(r.accepted)) / forwards for d in range(depths)]
    return round(emitted / forwards, 4), [round(a, 4) for a in accepted]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("drafters", nargs="+")
    parser.add_argument("--tasks", default="code")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--ways", default="noise,top,rejection")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    target = load(asked.model, dtype="float32")
    found: list[Result] = []
    for task in asked.tasks.split(","):
        texts = [p.ids for p in prompts(target, task, limit=asked.prompts, length=asked.length, new=asked.new)]
        for temperature in (float(t) for t in asked.temperatures.split(",")):
            plain = decode(target, make_drafter("none", target), Match(), texts, temperature, asked.new)
            for given in asked.drafters:
                name, *settings = given.split(",")
                drafter = make_drafter(name, target, dict(s.split("=", 1) for s in settings))
                for way, seen, rule in ways(drafter, temperature):
                    if way not in asked.ways.split(","):
                        continue
                    rows = decode(target, seen, rule, texts, temperature, asked.new)
                    same = None if way == "rejection" else [r.output for r in rows] == [r.output for r in plain]
                    found.append(Result(given, task, temperature, way, drafter.needs.width, *outcome(rows), same))
                    show(found[-1])
    if asked.out is not None:
        head = {"command": " ".join(sys.argv), "machine": Machine.here().as_dict()}
        head |= {"prompts": asked.prompts, "new": asked.new}
        asked.out.write_text(json.dumps(head | {"results": [asdict(r) for r in found]}, indent=1) + "\n")


def show(r: Result) -> None:
    same = {True: "same", False: "DIFFERENT", None: "another sample"}[r.same]
    print(
        f"{r.drafter:60} {r.task:12} T={r.temperature:g} {r.way:9} {r.tokens_per_forward:.3f} tokens/forward "
        f"{r.accepted} {same}",
        flush=True,
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
