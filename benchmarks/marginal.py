"""Marginalising by tree attention: against sequential forwards, and its memory against the size of the nuclei.

    python benchmarks/marginal.py [--out benchmarks/marginal.json]

speed   the laws behind 256 next tokens of one position of a text: the text and one forward over 256 leaves; the text
        and a forward for each leaf, behind its keys and values; a forward over text and leaf for each, one after the
        other and in batches. Each again and again in turn, medians; the largest difference between first and third.
memory  the most that a process held while it marginalised, beyond what it held before, for nuclei of different mass and
        parts of different size; each in a process of its own.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foretoken.attention import adopt
from foretoken.loading import load
from foretoken.machine import Machine
from foretoken.marginal import law_of
from foretoken.study.futures import Cut, Size, futures
from foretoken.study.reading import Reader, SequenceReader, TreeReader
from foretoken.target import Target

MODEL = Path(__file__).parent.parent / "foretoken" / "assets" / "stdlib5M"
LEAVES, TURNS = 256, 5
CONTEXTS = (32, 128)


class One(TreeReader):
    """Every leaf in a forward of its own, the text's keys and values kept."""

    def read(self, tokens: torch.Tensor, depth: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
        parts = [
            super(One, self).read(tokens[i : i + 1], depth[i : i + 1], sees[i : i + 1]) for i in range(len(tokens))
        ]
        return torch.cat(parts)


def laws(reader: Reader, text: list[int], leaves: torch.Tensor) -> torch.Tensor:
    """[n, V]: behind the text and each of the leaves [n]."""
    reader.open(len(text), len(text) + len(leaves))
    reader.chain(torch.tensor(text))
    sees = torch.ones(len(leaves), len(text), dtype=torch.bool)
    return law_of(reader.read(leaves, torch.full_like(leaves, len(text)), sees))


@torch.inference_mode()
def speed() -> list[dict[str, Any]]:
    """One line for each context length."""
    target = load(MODEL, dtype="float32", device="cpu")
    readers = {
        "tree": TreeReader(target),
        "one by one, cached": One(target),
        "one by one": SequenceReader(target.model, None, tokens=0),
        "in batches": SequenceReader(target.model, None),
    }
    found: list[dict[str, Any]] = []
    leaves = torch.arange(LEAVES)
    for context in CONTEXTS:
        text = [(7 * i) % target.vocab for i in range(context)]
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        law: dict[str, torch.Tensor] = {}
        for _ in range(TURNS):
            for name, reader in readers.items():
                began = perf_counter()
                law[name] = laws(reader, text, leaves)
                seconds[name].append(perf_counter() - began)
        medians = {name: median(some[1:]) for name, some in seconds.items()}
        found.append(
            {
                "context": context,
                "leaves": LEAVES,
                "seconds": medians,
                "times": {name: medians[name] / medians["tree"] for name in readers if name != "tree"},
                "largest_difference": float((law["tree"] - law["one by one"]).abs().max()),
            }
        )
    return found


def memory(vocab: int, mass: float, part: int) -> dict[str, Any]:
    """Of this process: bytes at most beyond what it held before, and leaves per position."""
    torch.manual_seed(0)
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=512, **size))  # pyright: ignore[reportArgumentType]
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    adopt(model)
    reader = TreeReader(Target(model))
    text = [(7 * i) % vocab for i in range(48)]
    list(futures(reader, text[:4], [2], Cut(2, 0.05), Size(2, 8)))  # libraries are loaded
    before = psutil.Process().memory_info().rss
    leaves = [int(f.leaves.sum()) for f in futures(reader, text, [40], Cut(2, mass), Size(4, part))]
    peak = int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x).split()[1]) << 10
    return {"vocab": vocab, "mass": mass, "part": part, "leaves": sum(leaves), "bytes": peak - before}


def apart(vocab: int, mass: float, part: int) -> dict[str, Any]:
    """`memory` in a process of its own."""
    command = [sys.executable, __file__, "--memory", str(vocab), str(mass), str(part)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", nargs=3)
    asked = parser.parse_args()
    if asked.memory:
        vocab, mass, part = asked.memory
        print(json.dumps(memory(int(vocab), float(mass), int(part))))
        return
    cases = [(32_000, mass, part) for part in (64, 256) for mass in (0.5, 0.9, 0.99, 1.0)]
    record = {
        "command": " ".join(["benchmarks/marginal.py", *sys.argv[1:]]),
        "machine": Machine.here().as_dict(),
        "speed": speed(),
        "memory": [apart(*case) for case in cases],
    }
    text = json.dumps(record, indent=1) + "\n"
    print(text, end="")
    if asked.out:
        asked.out.write_text(text)


if __name__ == "__main__":
    main()
