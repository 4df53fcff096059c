"""Memory: of loading a model against its weights, and of a session over 10,000 steps.

    python benchmarks/memory.py [--steps N] [--out benchmarks/memory.json]

loading  the most that a process held while it loaded a Llama of random bfloat16 weights and read 8 tokens, beyond what
         it held before, over the bytes of the weights; and what it held then without the pages of files, which the
         system can drop. From one file and from shards, in the dtype saved and in others; with a compiled step, whose
         weights are packed beside the model's (run twice: the first run may compile); transformers' own loading.
steps    what a process held while requests were decoded three at a time, and others took the place of those that ended:
         after a tenth of the steps, and the most and the last after them.

Every line is measured in a process of its own. Linux only.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from subprocess import run
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from foretoken.decode import Request, Session
from foretoken.drafters import make_drafter
from foretoken.generation import decode_all
from foretoken.loading import load
from foretoken.machine import Machine
from foretoken.rules import Match

ASSETS = Path(__file__).parent.parent / "foretoken" / "assets"
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 18, "num_attention_heads": 16}
LOADERS, DTYPES = ("foretoken", "compiled", "transformers"), ("bfloat16", "float32", "float16")
UNCOMPILED = ("compiled", "float16")
"""What is not measured: steps are not compiled in float16."""
DRAFTERS = {
    "none": "stories260K",
    "suffix": "stories260K",
    "draft_model": "stories260K",
    "medusa": "stdlib5M",
    "compiled none": "stories260K",
    "compiled medusa": "stdlib5M",
}
"""Drafter, compiled or not -> the model that it was measured on."""
ROWS, ROUND = 3, 10
"""Requests decoded together, and of a call."""


def held(what: str) -> int:
    """Bytes, as Linux counts them for this process: VmRSS now, VmHWM at most, RssAnon without pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) << 10


def checkpoints(folder: Path) -> dict[str, Path]:
    """One model, saved as one file and as shards."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **SIZES))  # pyright: ignore[reportArgumentType]
    model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    found = {"one file": folder / "one", "shards": folder / "shards"}
    model.save_pretrained(found["one file"])
    model.save_pretrained(found["shards"], max_shard_size="100MB")
    return found


def loading(path: str, loader: str, dtype: str) -> dict[str, Any]:
    """Of this process: memory over weights, at most while loading, after it, and after the first forward."""

    def read(source: str | Path) -> tuple[Any, torch.nn.Module]:
        """What holds the weights, and the model."""
        if loader == "transformers":
            model = LlamaForCausalLM.from_pretrained(source, dtype=dtype)
            return model, model
        target = load(source, dtype=dtype, device="cpu", compile=loader == "compiled").settled()
        return target, target.model

    read(ASSETS / "stories260K")[1](torch.arange(8)[None])  # libraries are loaded
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = {what: held(what) for what in ("VmRSS", "RssAnon")}
    _holder, model = read(path)
    weights = sum(p.nbytes for p in model.parameters())
    found = {
        "weights": weights,
        "peak": (held("VmHWM") - before["VmRSS"]) / weights,
        "anonymous": (held("RssAnon") - before["RssAnon"]) / weights,
    }
    with torch.inference_mode():
        model(torch.arange(8)[None])
    return found | {"peak_after_forward": (held("VmHWM") - before["VmRSS"]) / weights}


def requests(numbers: Iterator[int]) -> list[Request]:
    """`ROUND` requests of different prompts and lengths."""
    return [Request([1, 5 + i % 400, 9], number=i, max_new_tokens=100 + 37 * i % 200) for i in islice(numbers, ROUND)]


def growth(case: str, asked: int) -> dict[str, Any]:
    """Of this process: bytes held while `asked` steps were made."""
    compiled, _, name = case.rpartition(" ")
    target = load(ASSETS / DRAFTERS[case], dtype="float32", device="cpu", compile=bool(compiled))
    settings = {
        "draft_model": {"path": target},
        "medusa": {"path": str(ASSETS / "stdlib5M-medusa")},
    }
    drafter = make_drafter(name, target, settings.get(name, {}))
    steps, most, last = 0, [0, 0], [0, 0]  # of the first tenth and of the rest; a list of all steps would be growth

    def on_step(_: Session) -> None:
        nonlocal steps
        part = steps >= asked // 10
        last[part] = held("VmRSS")
        most[part] = max(most[part], last[part])
        steps += 1

    numbers = count()
    while steps < asked:
        decode_all(target, drafter, requests(numbers), Match(), batch_size=ROWS, on_step=on_step)
    return {
        "steps": steps,
        "requests": next(numbers),
        "held": last[0],
        "growth": last[1] - last[0],
        "most_growth": most[1] - most[0],
    }


def apart(*command: str) -> dict[str, Any]:
    """One line, measured in a process of its own."""
    done = run([sys.executable, __file__, "--one", *command], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def loaded(*asked: str) -> dict[str, Any]:
    """A line of loading; a step that is to be compiled was compiled before."""
    if "compiled" in asked:
        apart("loading", *asked)
    return apart("loading", *asked)


def measured(steps: int) -> dict[str, list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        loads = [
            {"from": kind, "loader": loader, "dtype": dtype} | loaded(str(path), loader, dtype)
            for kind, path in checkpoints(Path(folder)).items()
            for loader in LOADERS
            for dtype in DTYPES
            if (loader, dtype) != UNCOMPILED
        ]
    return {"loading": loads, "steps": [{"drafter": name} | apart("growth", name, str(steps)) for name in DRAFTERS]}


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    """Print a table for each part."""
    for part, lines in found.items():
        table = Table(*lines[0], title=part)
        for line in lines:
            cells = {k: f"{v:.3f}" if isinstance(v, float) else str(v) for k, v in line.items()}
            cells |= {
                k: f"{line[k] / 2**20:.2f} MiB" for k in ("weights", "held", "growth", "most_growth") if k in line
            }
            table.add_row(*cells.values())
        Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        part, *rest = asked.one
        print(json.dumps(loading(*rest) if part == "loading" else growth(rest[0], int(rest[1]))))
        return
    found = measured(asked.steps)
    show(found)
    record = {
        "command": " ".join(["benchmarks/memory.py", *sys.argv[1:]]),
        "machine": Machine.here().as_dict(),
        **found,
    }
    if asked.out:
        asked.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
