"""Time of a training step with n heads over one with the target's own alone, layers in total held fixed (mtp, moved).

    python benchmarks/training_cost.py [--hidden 256,512] [--layers 12] [--vocab 8192] [--out FILE]

All cases of a size are built in one process; their steps alternate in random order and medians are compared. Run it
alone on the machine. Gloeckle et al. 2024 (arXiv:2404.19737, table S5) report for n = 4: 1.22 at 0.3B, 1.07 at
6.7B, on GPUs.
"""

import argparse
import json
import sys
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foretoken.drafters import mtp
from foretoken.machine import Machine
from foretoken.objective import Batch
from foretoken.target import Target
from foretoken.training.learner import Learner
from foretoken.training.recipe import Lora, Loss
from foretoken.training.trunk import Trunk


class Case:
    """A model with n heads, its optimiser, and one step of them."""

    def __init__(self, n: int, hidden: int, layers: int, vocab: int, length: int) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers - (n - 1),
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            max_position_embeddings=length,
        )
        target = Target(LlamaForCausalLM(config))
        heads = mtp.fresh(target, mtp.Architecture(heads=n)) if n > 1 else None
        drafter = None if heads is None else mtp.build(target, mtp.Config(path=heads))
        self.learner = Learner(Trunk(target, "joint", Lora()), drafter, Loss())
        parameters = [*target.model.parameters(), *(heads.parameters() if heads is not None else ())]
        self.parameters = sum(p.numel() for p in parameters)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        tokens = torch.randint(vocab, (2, length))
        self.batch = Batch(tokens, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool))

    def step(self) -> float:
        """Seconds of one optimiser step."""
        began = perf_counter()
        counts = self.learner.counts([self.batch])
        self.learner.gradient(self.batch, counts, True, lambda: torch.autocast("cpu", torch.bfloat16))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", default="256,512")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for hidden in (int(h) for h in asked.hidden.split(",")):
        cases = {n: Case(n, hidden, asked.layers, asked.vocab, asked.length) for n in (1, 2, 4)}
        seconds: dict[int, list[float]] = {n: [] for n in cases}
        for case in cases.values():
            case.step()
        for repeat in range(asked.repeats):
            for n in Random(repeat).sample(list(cases), len(cases)):
                seconds[n].append(cases[n].step())
        for n, case in cases.items():
            pairs = [a / b for a, b in zip(seconds[n], seconds[1], strict=True)]
            row = {"hidden": hidden, "heads": n, "parameters": case.parameters}
            rows.append(row | {"seconds": median(seconds[n]), "ratio": median(pairs), "all": seconds[n]})
            print(
                f"hidden {hidden}, {n} heads, {case.parameters / 1e6:.1f}M parameters: {rows[-1]['seconds']:.3f} s, "
                f"{rows[-1]['ratio']:.3f} of one head"
            )
    if asked.out is not None:
        head = {"command": " ".join(["python", *sys.argv]), "machine": Machine.here().as_dict()}
        asked.out.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
