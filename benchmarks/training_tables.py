"""What training choices give at one small budget: tables of held-out loss, accuracy and tokens per forward.

    python benchmarks/training_tables.py scratch|adapt [--out FILE] [--only TEXT] [--steps N]

scratch  one head or four, on code and on stories; and where parameters go: into heads or into a larger trunk
adapt    heads for a model that was trained without them: frozen, joint, LoRA, on its final state or on all layers (WHS)

All runs of a table see the same text, rows and steps. A run that is done is not repeated.
"""

import argparse
import json
import sys
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from foretoken.decode import Request
from foretoken.drafters import make_drafter
from foretoken.generation import decode_all
from foretoken.loading import load
from foretoken.machine import Machine
from foretoken.rules import Match
from foretoken.training.loop import train
from foretoken.training.prompts import ids_of, prompts_of
from foretoken.training.recipe import Recipe, filled
from foretoken.training.sources import documents

STORIES = "../shared/data/text/tinystories_train_prefix_2M.txt"
FOLDER = Path("runs/tables")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def scratch(steps: int) -> dict[str, dict[str, Any]]:
    """Runs from nothing: a name, and what differs."""
    runs: dict[str, dict[str, Any]] = {}
    shared = {"mode": "scratch", "tokenizer": "2048", "steps": steps, "rows": 8}
    shared |= {"optimizer": {"name": "muon", "lr": 0.008, "warmup": 40, "weight_decay": 0.05}}
    for text, source in (("code", "stdlib"), ("stories", STORIES)):
        data = {"data": {"source": source, "length": 256}}
        kinds: dict[str, tuple[int, dict[str, Any]]] = {
            "n=1, 6 layers": (6, {"drafter": "none"}),
            "n=4, 3 of 6 layers moved to heads": (6, {"drafter": "mtp", "move_layers": True}),
        }
        if text == "code":
            kinds |= {
                "n=1, 9 layers": (9, {"drafter": "none"}),
                "n=4, 6 layers and 3 heads": (6, {"drafter": "mtp"}),
                "n=4, 9 layers, linear heads": (9, {"drafter": "mtp", "architecture": {"kind": "linear"}}),
                "n=4, 9 layers, anticausal": (9, {"drafter": "mtp", "architecture": {"kind": "anticausal"}}),
                "n=4, 6 layers and 3 heads, causal": (6, {"drafter": "mtp", "architecture": {"kind": "causal"}}),
            }
        for name, (layers, rest) in kinds.items():
            runs[f"{text}: {name}"] = shared | data | {"model": LLAMA | {"num_hidden_layers": layers}} | rest
    return runs


def adapt(steps: int) -> dict[str, dict[str, Any]]:
    """Heads for the one-head code model of the first table."""
    shared = {
        "drafter": "weighted_heads",
        "target": str(folder("code: n=1, 6 layers")),
        "steps": steps,
        "rows": 8,
        "data": {"source": "stdlib", "length": 256},
    }
    final, weighted = ({"architecture": {"states": states, "hidden": 256}} for states in ("final", "weighted"))
    rates = {"name": "adamw", "lr": 0.003, "warmup": 40, "trunk_ratio": 0.25}
    late = rates | {"heads_first": steps // 4}
    return {
        "frozen": shared | final | {"mode": "frozen", "optimizer": rates},
        "frozen, WHS": shared | weighted | {"mode": "frozen", "optimizer": rates},
        "joint": shared | final | {"mode": "joint", "optimizer": rates},
        "joint, heads first": shared | final | {"mode": "joint", "optimizer": late},
        "joint, WHS": shared | weighted | {"mode": "joint", "optimizer": rates},
        "LoRA": shared | final | {"mode": "lora", "optimizer": rates | {"trunk_ratio": 1.0}},
        "LoRA, WHS": shared | weighted | {"mode": "lora", "optimizer": rates | {"trunk_ratio": 1.0}},
    }


def folder(name: str) -> Path:
    return FOLDER / "".join(c if c.isalnum() else "_" for c in name)


def decoded(recipe: Recipe) -> float | None:
    """Tokens per forward of the trained heads as a chain, temperature 0, on pieces of held-out documents."""
    if recipe.drafter == "none":
        return None
    out = Path(recipe.out)
    target = load(recipe.target if recipe.mode == "frozen" else out, dtype="float32")
    pieces = prompts_of(documents(recipe.data.source, split="held_out"), target, length=64, cuts=2, seed=1)
    found = Random(0).sample(list(islice(pieces, 400)), 32)
    drafter = make_drafter(f"{recipe.drafter}:{out}", target)
    requests = [Request(ids_of(target, p), number=i, max_new_tokens=96) for i, p in enumerate(found)]
    rows = decode_all(target, drafter, requests, Match(), batch_size=16)
    return sum(r.emitted - 1 for r in rows) / sum(r.forwards for r in rows)


def parameters(out: Path) -> int:
    from safetensors import safe_open

    total = 0
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("table", choices=["scratch", "adapt"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--steps", type=int, default=500)
    asked = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for name, settings in {"scratch": scratch, "adapt": adapt}[asked.table](asked.steps).items():
        out = folder(name)
        done = out / "result.json"
        if asked.only in name and not done.is_file():
            recipe = filled(Recipe, settings | {"out": str(out), "evaluate": 256, "log_every": asked.steps}, "")
            found = train(recipe)
            row = {"parameters": parameters(out), "held_out": found, "decoded": decoded(recipe)}
            done.write_text(json.dumps(row, indent=1))
        if done.is_file():
            rows[name] = json.loads(done.read_text())
            held = rows[name]["held_out"]
            print(f"{name:45} {rows[name]['parameters']:9} {held['next token/loss']:.3f} {rows[name]['decoded']}")
    if asked.out is not None:
        head = {"command": " ".join(sys.argv), "machine": Machine.here().as_dict(), "steps": asked.steps}
        asked.out.write_text(json.dumps(head | {"runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
