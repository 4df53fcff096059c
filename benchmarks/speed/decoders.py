"""Who decodes in a race: this library in this process, others in their own, stopped while it is not their turn."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, Protocol

import psutil
import torch

from foretoken.bench.methods import Method
from foretoken.bench.peers import Worker, start
from foretoken.decode import Request, Session
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.target import Target

IDLE = 1.0
"""Seconds for which a peer that has nothing to do is watched."""


class Decoder(Protocol):
    """Decodes a prompt greedily. forwards, tokens: of all its laps, those of the prompts left out."""

    label: str
    forwards: int
    tokens: int

    def lap(self, prompt: list[int], new: int) -> float:
        """Seconds for each of the tokens behind the first."""
        ...

    def about(self) -> dict[str, Any]: ...


class Ours:
    """A method of this library."""

    def __init__(self, label: str, target: Target, method: Method) -> None:
        self.drafter = make_drafter(method.drafter, target, dict(method.settings))
        self.label, self.target = label, target.settled(self.drafter.needs.features)
        self.forwards = self.tokens = 0

    def lap(self, prompt: list[int], new: int) -> float:
        session = Session(self.target, self.drafter, [Request(prompt, max_new_tokens=new)])
        (row,) = session.rows
        began = perf_counter()
        while row.finish is None:
            session.step()
        seconds = perf_counter() - began
        self.forwards += row.forwards
        self.tokens += row.emitted - 1
        return seconds / (row.emitted - 1)

    def about(self) -> dict[str, Any]:
        return {}


class Theirs:
    """A method of a peer."""

    def __init__(self, name: str, model: Path, most: int) -> None:
        self.label = name
        self.worker = start(name, str(model), dtype="bfloat16", threads=torch.get_num_threads(), most=most, batch=1)
        self.forwards = self.tokens = 0
        self.run([5, 6, 7], 4)  # what is made at first is made now
        self.forwards = self.tokens = 0
        self.idle = idle(self.worker)
        signal_all(self.worker, psutil.Process.suspend)

    def lap(self, prompt: list[int], new: int) -> float:
        with awake(self.worker):
            return self.run(prompt, new)

    def run(self, prompt: list[int], new: int) -> float:
        ran = self.worker.run([prompt], max_new_tokens=new, temperature=0.0, seed=0, eos=[])
        if ran.first is None:
            raise UserError(f"{self.label} does not say when its first token came; leave it out.")
        tokens = len(ran.tokens[0]) - 1
        self.forwards += ran.forwards or 0
        self.tokens += tokens
        return (ran.seconds - ran.first) / tokens

    def about(self) -> dict[str, Any]:
        """The peer's versions and settings, and the share of a core that it used with nothing to do."""
        return {**self.worker.facts, "idle_cpu": round(self.idle, 3)}

    def close(self) -> None:
        signal_all(self.worker, psutil.Process.resume)
        self.worker.close()


def members(worker: Worker) -> list[psutil.Process]:
    """The worker's process and all that it started."""
    process = psutil.Process(worker.process.pid)
    return [process, *process.children(recursive=True)]


def signal_all(worker: Worker, what: Callable[[psutil.Process], None]) -> None:
    if worker.process.poll() is None:
        for process in members(worker):
            what(process)


@contextmanager
def awake(worker: Worker) -> Generator[None]:
    """The worker runs inside, and is stopped before and behind."""
    signal_all(worker, psutil.Process.resume)
    try:
        yield
    finally:
        signal_all(worker, psutil.Process.suspend)


def idle(worker: Worker) -> float:
    """The share of a core that the worker uses with nothing to do."""

    def used() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in members(worker))

    before = used()
    sleep(IDLE)
    return (used() - before) / IDLE


@contextmanager
def peers(names: Sequence[str], model: Path, most: int, refused: dict[str, str]) -> Generator[list[Theirs]]:
    """Those of the peers that can run here; `refused` gets the others' reasons."""
    found: list[Theirs] = []
    try:
        for name in names:
            try:
                found.append(Theirs(name, model, most))
            except UserError as error:
                refused[name] = str(error)
        yield found
    finally:
        for one in found:
            one.close()
