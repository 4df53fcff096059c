"""What a worker says to the process that started it: JSON lines, undisturbed by what libraries print.

The first line in says what to load and is answered with facts; each further line is one group of prompts and is
answered with what was decoded. The end of the input ends the worker. It imports the standard library alone.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

SIZES = {"float32": 4, "bfloat16": 2}
"""Bytes of a number."""


class Refusal(Exception):  # noqa: N818 - nothing went wrong in the program
    """What was asked for cannot run here; the message is the sentence that the user reads."""


@dataclass(frozen=True)
class Load:
    """What to load: see `foretoken.bench.peers.start`.

    files, draft_files  folders for what is made once of the model and of the draft model
    """

    method: str
    model: str
    dtype: str
    threads: int
    most: int
    batch: int
    draft: str | None
    eagle: str | None
    settings: dict[str, int]
    files: str
    draft_files: str | None


@dataclass(frozen=True)
class Group:
    """Prompts to decode together; an empty `eos` decodes exactly `max_new_tokens` of each."""

    prompts: list[list[int]]
    max_new_tokens: int
    temperature: float
    seed: int
    eos: list[int]


@dataclass(frozen=True)
class Answer:
    """See `foretoken.bench.peers.Ran`."""

    tokens: list[list[int]]
    seconds: float
    first: float | None = None
    forwards: int | None = None
    accepted: list[int] | None = None


class Decoder(Protocol):
    """A loaded model."""

    facts: dict[str, Any]

    def run(self, group: Group) -> Answer: ...


def serve(load: Callable[[Load], Decoder]) -> None:
    """Load what the first line says and decode every group that follows, until the input ends."""
    lines, answers = private()
    try:
        decoder = load(Load(**json.loads(lines.readline())))
        say(answers, decoder.facts)
        for line in lines:
            say(answers, asdict(decoder.run(Group(**json.loads(line)))))
    except Refusal as refusal:
        say(answers, {"refused": str(refusal)})
    except Exception as error:
        traceback.print_exc()
        first = str(error).strip().split("\n", 1)[0]
        say(answers, {"failed": f"{type(error).__name__}: {first}".removesuffix(": ")})
    sys.stderr.flush()
    os._exit(0)  # libraries with threads of their own may hang or crash as they leave; nothing is left to save


def private() -> tuple[Any, Any]:
    """The pipes from and to the parent, taken away from everyone else: prints go to stderr, reads find nothing."""
    lines, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return lines, answers


def say(answers: Any, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def config_of(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "config.json").read_text())


def head_size(config: dict[str, Any]) -> int:
    """Numbers of one attention head; 0 where the configuration does not say."""
    heads = config.get("num_attention_heads") or 0
    return config.get("head_dim") or (config.get("hidden_size", 0) // heads if heads else 0)


def parameters(folder: str) -> int:
    """How many numbers the model in a folder has; tied weights are stored once."""
    count = 0
    for path in Path(folder).glob("model*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                count += product(tensor["shape"])
    return count


def product(numbers: list[int]) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total


@dataclass
class Tally:
    """Accepted guesses at each depth, from how many tokens each forward yielded."""

    accepted: list[int] = field(default_factory=list)

    def add(self, tokens: int) -> None:
        """One forward emitted `tokens`, the last of them its own."""
        guesses = tokens - 1
        self.accepted += [0] * (guesses - len(self.accepted))
        for depth in range(guesses):
            self.accepted[depth] += 1
