"""Cases timed in turns, in a new order every time, with the memory's speed measured before and behind each."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from random import Random
from statistics import median
from time import perf_counter
from typing import Generic, TypeVar

import torch
from rich.console import Console
from rich.progress import track

from foretoken.kernels import load_kernels

K = TypeVar("K", bound=Hashable)
SIZE, READS = 1 << 29, 5
"""Bytes that are read at once to measure the memory, and how often: medians count."""


class Memory:
    """Says how fast this machine reads memory just now: some move by half from one minute to the next."""

    def __init__(self) -> None:
        load_kernels()
        self.data = torch.ops.foretoken.room(torch.ones(1, dtype=torch.int64), SIZE // 8).fill_(1)

    def __call__(self) -> float:
        """Bytes per second."""
        seconds: list[float] = []
        for _ in range(READS):
            began = perf_counter()
            self.data.sum()
            seconds.append(perf_counter() - began)
        return SIZE / median(seconds)


@dataclass(frozen=True, slots=True)
class Timed(Generic[K]):
    """Per case and repeat: seconds, and bytes per second that the memory gave around it."""

    seconds: dict[K, list[float]]
    memory: dict[K, list[float]]

    def ms(self, case: K) -> float:
        return median(self.seconds[case]) * 1e3

    def over(self, case: K, other: K) -> float:
        """How many times as long as `other` the case takes, the median over repeats."""
        pairs = zip(self.seconds[case], self.seconds[other], strict=True)
        return median(a / b for a, b in pairs)

    def share(self, case: K, nbytes: float) -> float:
        """Of the memory's speed, what reading so many bytes in the case's time makes use of."""
        pairs = zip(self.seconds[case], self.memory[case], strict=True)
        return median(nbytes / seconds / speed for seconds, speed in pairs)

    @property
    def bandwidth(self) -> list[float]:
        """Least, median and most GB/s of the whole run."""
        every = [speed / 1e9 for speeds in self.memory.values() for speed in speeds]
        return [round(x, 1) for x in (min(every), median(every), max(every))]


def in_turns(cases: Mapping[K, Callable[[], float]], repeats: int, warm: int = 1) -> Timed[K]:
    """Every case once in each repeat; the first `warm` rounds do not count."""
    memory, order = Memory(), Random(0)
    timed: Timed[K] = Timed({case: [] for case in cases}, {case: [] for case in cases})
    quiet = Console(stderr=True)
    before = memory()
    for repeat in track(range(repeats + warm), "rounds", transient=True, console=quiet, auto_refresh=False):
        for case in order.sample(list(cases), len(cases)):
            seconds, after = cases[case](), memory()
            if repeat >= warm:
                timed.seconds[case].append(seconds)
                timed.memory[case].append((before + after) / 2)
            before = after
    return timed
