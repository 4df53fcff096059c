"""What a GPU is worth to decoding: a bound first, then steps, attention, methods, training, and one table.

    python benchmarks/gpu.py [--out FOLDER] [--seconds 560] [--device cpu --tiny]

Each section is a process of its own with a limit of its own, so that one which fails or hangs costs no other; all end
within `--seconds`, and what was measured is in gpu.json after every section. Weights of the 1B and 8B shapes are
random: time does not depend on what they say. Acceptance comes from trained models. `--tiny` runs the same code on
small shapes in about a minute on a processor.

roofline  bytes copied and read per second
steps     a forward at each width, and plain decoding, eager and recorded (`foretoken.graphs`)
fused     the same with kernels fused by torch.compile
attention tree attention over a long prefix, ours, and torch's under a mask
losses    cross-entropy of a large vocabulary: time and memory
methods   every method on models that travel with the package: tokens per forward, and against plain decoding
trained   a larger model and heads trained here, decoded
shapes    seconds of a step with each method's draft on the 8B shape
memory    of a training step against the number of heads (benchmarks/training_memory.py)
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from foretoken.machine import processor

SECTIONS = Path(__file__).parent / "gpu_sections.py"
LIMITS = {
    **{"roofline": 30, "steps:1B": 60, "steps:8B": 90, "attention": 60, "methods": 120, "shapes:8B": 60},
    **{"fused:8B": 150, "losses": 45, "trained": 170, "memory": 60},
}
"""Most seconds of each section, in order."""
Row = dict[str, Any]


def section(name: str, asked: argparse.Namespace, limit: float) -> Row:
    """What a section measured, in a process of its own; rows that came before it failed are kept."""
    command = [sys.executable, str(SECTIONS), name, "--device", asked.device, "--out", str(asked.out)]
    began, why = perf_counter(), ""
    with (asked.out / "section.txt").open("w+") as printed, (asked.out / "errors.txt").open("w+") as errors:
        whole = [*command, "--tiny"] if asked.tiny else command
        work = subprocess.Popen(whole, stdout=printed, stderr=errors, start_new_session=True)
        try:
            code = work.wait(limit)
            errors.seek(0)
            why = "".join(errors.readlines()[-3:])[-600:] if code else ""
        except subprocess.TimeoutExpired:
            os.killpg(work.pid, signal.SIGKILL)  # and what it started
            work.wait()
            why = f"stopped after {limit:.0f} s"
        printed.seek(0)
        rows = [json.loads(line[4:]) for line in printed if line.startswith("ROW ")]
    return {"rows": rows, "seconds": perf_counter() - began} | ({"failed": why} if why else {})


def summary(found: Row) -> Iterator[str]:
    """The lines of the table, as far as there are measurements."""
    bound = next(iter(found.get("roofline", {}).get("rows", [])), {"copy_gb_s": float("nan"), "read_gb_s": 0.0})
    yield f"copy {bound['copy_gb_s']:.0f} GB/s (read and written), read {bound['read_gb_s']:.0f} GB/s"
    for name, part in found.items():
        yield f"-- {name} ({part['seconds']:.0f} s){': ' + part['failed'] if 'failed' in part else ''}"
        for row in part["rows"]:
            shown = {k: {w: round(x, 3) for w, x in v.items()} if isinstance(v, dict) else v for k, v in row.items()}
            extra = ""
            if "plain_ms" in row:
                share = row["weights"] / row["plain_ms"] / 1e6 / bound["copy_gb_s"]
                wide = {w: x / row["ms"]["1"] for w, x in row["ms"].items()}
                extra = f"; plain reads at {share:.0%} of copying; v(16) {wide.get('16', float('nan')):.3f}"
            yield (
                "   "
                + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
                + extra
            )
    yield from predicted(found)


def predicted(found: Row) -> Iterator[str]:
    """Speedup on the 8B shape if guesses were accepted there as on the trained models."""
    steps_ms = {row["method"]: row["step_ms"] for key in found if "shapes" in key for row in found[key]["rows"]}
    for key in ("methods", "trained"):
        for row in found.get(key, {}).get("rows", []):
            if row.get("method") in steps_ms and "tokens_per_forward" in row:
                worth = row["tokens_per_forward"] * steps_ms["none"] / steps_ms[row["method"]]
                yield f"   {row['method']} accepted as in {key}, at the large shape's speed: {worth:.2f} times plain"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default="", help="sections, separated by commas")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    began, found = perf_counter(), Row()
    for name, limit in LIMITS.items():
        left = asked.seconds - (perf_counter() - began)
        if left < 10 or (asked.only and name not in asked.only.split(",")) or (asked.tiny and "1B" in name):
            continue
        found[name] = section(name, asked, min(limit, left))
        head: Row = {"command": " ".join(sys.argv), "processor": processor(), "torch": torch.__version__}
        (asked.out / "gpu.json").write_text(json.dumps(head | {"sections": found}, indent=1) + "\n")
        print(f"{name}: {found[name]['seconds']:.0f} s {found[name].get('failed', '')}", flush=True)
    print("\n".join(summary(found)))


if __name__ == "__main__":
    main()
