"""Memory of one training step against the number of heads: head by head as `foretoken train` does, and all at once.

    python benchmarks/training_memory.py [--heads 1,2,4,8] [--device cpu|cuda] [--out FILE]

Every case is a fresh process, because the largest memory that a process ever held is never forgotten. A case first
holds parameters, gradients and the optimiser's state, then makes one step: what the step adds on top is the result.
n heads are the target's own and n - 1 of `mtp`; both ways compute the same gradient, whose norms are compared.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from foretoken.drafters import mtp
from foretoken.machine import Machine
from foretoken.objective import IGNORED, Batch
from foretoken.target import Target
from foretoken.training.learner import Learner
from foretoken.training.recipe import Lora, Loss
from foretoken.training.trunk import Trunk

WAYS = ("head by head", "all at once")


@dataclass(frozen=True, slots=True)
class Case:
    """Bytes of one case.

    static  parameters, gradients and the optimiser's state, by their sizes
    before  held when the step began: `static`, and on a CPU the interpreter and its libraries
    peak    the most that was held at any time
    norm    of the gradient
    """

    way: str
    heads: int
    static: int
    before: int
    peak: int
    norm: float

    @property
    def step(self) -> int:
        return self.peak - self.before


def target_of(asked: argparse.Namespace) -> Target:
    """A Llama with random weights: memory does not depend on what they say."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=asked.vocab,
        hidden_size=asked.hidden,
        intermediate_size=asked.hidden * 11 // 4,
        num_hidden_layers=asked.layers,
        num_attention_heads=max(1, asked.hidden // 64),
        num_key_value_heads=max(1, asked.hidden // 64),
        max_position_embeddings=asked.length,
    )
    return Target(LlamaForCausalLM(config).to(asked.device))


def head_by_head(learner: Learner, batch: Batch, counts: dict[str, int]) -> None:
    """The gradient as training computes it."""
    learner.gradient(batch, counts, True, nullcontext)


def all_at_once(learner: Learner, batch: Batch, counts: dict[str, int]) -> None:
    """The same gradient from one loss, for which the logits of all heads exist together."""
    target = learner.trunk.target
    learner.trunk.thaw(True)
    target.model.train()
    states: Any = target.decoder(input_ids=batch.tokens, output_hidden_states=True, use_cache=False)
    features = torch.cat([states.hidden_states[layer] for layer in learner.layers], -1) if learner.layers else None
    forest = learner.forest(batch)
    weights = learner.weights(forest)
    logits = [learner.own().unembed(states.last_hidden_state)]
    for stage in forest:
        logits.append(stage.unembed(stage.ready(stage.run(features))))
    losses = [
        weights[stage.name] / counts[stage.name] * cross_entropy(found, batch.labels(stage.offset))
        for stage, found in zip((learner.own(), *forest), logits, strict=True)
    ]
    torch.stack(losses).sum().backward()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over labelled rows, of all logits [B, T, V]."""
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def measure(way: str, n: int, asked: argparse.Namespace) -> Case:
    """One step of one case, in a process that has done nothing else."""
    target = target_of(asked)
    heads = mtp.fresh(target, mtp.Architecture(heads=n)) if n > 1 else None
    drafter = None if heads is None else mtp.build(target, mtp.Config(path=heads))
    learner = Learner(Trunk(target, "joint", Lora()), drafter, Loss())
    parameters = [*target.model.parameters(), *(heads.parameters() if heads is not None else ())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=False)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tokens = torch.randint(asked.vocab, (1, asked.length), device=asked.device)
    batch = Batch(tokens, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool))
    counts = learner.counts([batch])
    state = [x for entry in optimizer.state.values() for x in entry.values() if isinstance(x, Tensor)]
    static = 2 * size(parameters) + size(state)
    before = held(asked.device)
    (head_by_head if way == WAYS[0] else all_at_once)(learner, batch, counts)
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    optimizer.step()
    return Case(way, n, static, before, peak(asked.device), norm)


def size(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def held(device: str) -> int:
    """Bytes held now; on a GPU, forgets what was held before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def peak(device: str) -> int:
    """The most bytes ever held."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def afresh(way: str, n: int) -> Case:
    """The case measured by a new process, with this one's arguments."""
    command = [sys.executable, __file__, *sys.argv[1:], "--case", f"{way}:{n}"]
    exact = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}  # glibc then returns what is freed, so that RSS is what is alive
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | exact)
    if done.returncode:
        raise SystemExit(f"{way}, {n} heads: {done.stderr.strip()[-2000:]}")
    return Case(**json.loads(done.stdout.splitlines()[-1]))


def table(cases: list[Case]) -> str:
    """MiB of every case, and how much more a step holds than with the fewest heads."""
    lines = [f"{'':14}{'heads':>6}{'static':>9}{'peak':>9}{'step':>9}{'more':>8}"]
    for case in cases:
        least = next(c for c in cases if c.way == case.way)
        figures = [case.static, case.peak, case.step]
        shown = "".join(f"{x / 2**20:9.0f}" for x in figures)
        lines.append(f"{case.way:14}{case.heads:6}{shown}{case.step / least.step - 1:+8.0%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--heads", default="1,2,4,8")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        way, n = asked.case.split(":")
        print(json.dumps(asdict(measure(way, int(n), asked))))
        return
    numbers = [int(n) for n in asked.heads.split(",")]
    cases = [afresh(way, n) for way in WAYS for n in numbers]
    print(table(cases))
    for ours, joint in zip(cases[: len(numbers)], cases[len(numbers) :], strict=True):
        if abs(ours.norm - joint.norm) > 1e-3 * joint.norm:
            raise SystemExit(f"The gradients of {ours.heads} heads differ: norms {ours.norm} and {joint.norm}.")
    if asked.out is not None:
        rows = [asdict(case) | {"step": case.step} for case in cases]
        settings = {k: v for k, v in vars(asked).items() if k not in ("out", "case")}
        head = {"command": " ".join(["python", *sys.argv]), "machine": Machine.here().as_dict(), "settings": settings}
        asked.out.write_text(json.dumps(head | {"unit": "bytes", "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
