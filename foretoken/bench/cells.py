"""What is asked of a comparison, and the groups of prompts that follow from it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foretoken.bench.tasks import Prompt
from foretoken.errors import UserError


@dataclass(frozen=True, slots=True)
class Ask:
    """What to compare; the fields are the options of the command."""

    model: str
    drafters: Sequence[str]
    tasks: str
    out: Path
    peers: Sequence[str] = ()
    limit: int = 8
    length: int = 96
    new: int = 128
    batches: Sequence[int] = (1,)
    temperatures: Sequence[float] = (0.0,)
    repeats: int = 3
    seed: int = 0
    ignore_eos: bool = False
    dtype: str | None = None
    device: str | None = None
    attention: str | None = None
    resume: bool = False
    compile: bool = False

    def same(self) -> dict[str, Any]:
        """What later calls into the same folder must share."""
        asked: dict[str, Any] = {
            "max_new_tokens": self.new,
            "limit": self.limit,
            "length": self.length,
            "seed": self.seed,
            "ignore_eos": self.ignore_eos,
        }
        return asked | {"compile": True} if self.compile else asked  # results of before there was a choice are eager


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts of one task that are decoded together, at one temperature; `numbers` name their noise."""

    task: str
    temperature: float
    batch: int
    number: int
    prompts: Sequence[Prompt]
    numbers: Sequence[int]


def too_few(ask: Ask, found: Sequence[Prompt]) -> dict[tuple[str, int], int]:
    """(task, batch size) -> its prompts, where they fill no group; `UserError` where no task's do."""
    count = {task: min(n, ask.limit) for task, n in Counter(p.task for p in found).items()}
    batch, most = max(ask.batches), max(count.values(), default=0)
    if most < batch:
        raise UserError(
            f"A batch of {batch} needs {batch} prompts of a task, and no task has more than {most} (--limit is "
            f"{ask.limit}); give a smaller --batch, a greater --limit or more prompts."
        )
    return {(task, batch): n for batch in ask.batches for task, n in count.items() if n < batch}


def groups(ask: Ask, found: Sequence[Prompt]) -> Iterator[Group]:
    """The groups of every cell, in order; prompts that fill no group are left out."""
    for temperature in ask.temperatures:
        for batch in ask.batches:
            for task in dict.fromkeys(p.task for p in found):
                mine = [p for p in found if p.task == task][: ask.limit]
                for number, start in enumerate(range(0, len(mine) - batch + 1, batch)):
                    numbers = range(start, start + batch)
                    yield Group(task, temperature, batch, number, mine[start : start + batch], numbers)


def other(ask: Ask, group: Group, found: Sequence[Prompt]) -> Group:
    """A group of the same cell with prompts that are not measured, where there are enough."""
    mine = [p for p in found if p.task == group.task]
    spare = mine[ask.limit :] or mine
    spare = (spare * group.batch)[: group.batch]
    return replace(group, prompts=spare, numbers=range(1000, 1000 + group.batch))
