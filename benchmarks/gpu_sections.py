"""The sections of benchmarks/gpu.py, which runs each in a process: rows as JSON, one per line.

python benchmarks/gpu_sections.py NAME --device cuda --out FOLDER [--tiny]
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from foretoken import operators
from foretoken.attention import adopt
from foretoken.decode import Request, Session
from foretoken.drafters import eagle, make_drafter, medusa
from foretoken.errors import UserError
from foretoken.graphs import GraphedTarget, padded
from foretoken.loading import load
from foretoken.machine import read_bandwidth, synchronise
from foretoken.target import Target
from foretoken.tree import chain
from foretoken.unembed import Unembedding

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "foretoken" / "assets"
SHAPES: dict[str, dict[str, int]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8},
}
TRAINED = {
    "mtp": "stdlib5M",
    **{name: f"stdlib5M-{name}" for name in ("medusa", "blockwise", "weighted_heads", "deepseek_mtp")},
    **{"eagle": "stdlib5M-eagle3", "draft_model": "stdlib1M"},
}
"""Method -> what it was trained into."""
UNTRAINED = ("none", "suffix", "prompt_lookup", "lookahead", "jacobi")

Row = dict[str, Any]


@torch.inference_mode(False)
@torch.no_grad()
def model_of(shape: str, device: str) -> Target:
    """A Llama of random bfloat16 weights (float32 on a processor)."""
    torch.manual_seed(0)
    big = shape != "tiny"
    config = LlamaConfig(
        **SHAPES[shape],
        vocab_size=128256 if big else 512,
        num_key_value_heads=8 if big else 2,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=shape == "1B",
        bos_token_id=None,
        eos_token_id=None,
    )  # pyright: ignore[reportArgumentType]
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16 if device == "cuda" else torch.float32).to_empty(device=device)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02) if parameter.dim() > 1 else parameter.data.fill_(1)
    fresh: Any = type(model.model.rotary_emb)(config)  # its buffers hold no weights and were not filled
    model.model.rotary_emb = fresh.to(device)
    model.tie_weights()
    adopt(model)
    return Target(model)


def seconds_of(work: Callable[[], object], device: str, repeats: int = 20, warm: int = 3) -> float:
    """The median time of `work`, each waited for."""
    found: list[float] = []
    for _ in range(warm + repeats):
        synchronise(torch.device(device))
        began = perf_counter()
        work()
        synchronise(torch.device(device))
        found.append(perf_counter() - began)
    return median(found[warm:])


def roofline(asked: argparse.Namespace, _: str) -> Iterator[Row]:
    size = 1 << (24 if asked.tiny else 33)
    source = torch.ones(size // 2, dtype=torch.bfloat16, device=asked.device)
    goal = torch.empty_like(source)
    copied = 2 * size / seconds_of(lambda: goal.copy_(source), asked.device) / 1e9
    yield {"copy_gb_s": copied, "read_gb_s": read_bandwidth(torch.device(asked.device), min(size, 1 << 32))}


def plain_seconds(target: Target, context: int, tokens: int) -> float:
    """Of a token of plain decoding behind `context` others, the session's own work included."""
    request = Request(torch.randint(target.vocab, (context,)).tolist(), max_new_tokens=tokens + 8)
    session = Session(target, make_drafter("none", target), [request])
    return seconds_of(session.step, target.device.type, tokens - 8, 8)


@torch.inference_mode()
def steps(asked: argparse.Namespace, shape: str, ways: tuple[str, ...] = ("eager", "recorded")) -> Iterator[Row]:
    """Seconds of a forward at each width and of plain decoding."""
    target, context = model_of(shape, asked.device), 64 if asked.tiny else 512
    read = sum(p.nbytes for p in target.model.parameters())
    if not target.config.tie_word_embeddings:
        read -= target.model.get_input_embeddings().weight.nbytes  # of which a step reads one row
    fusing = "fused" in ways[0]
    widths = ((1,) if fusing else (1, 4)) if asked.tiny else (1, 16) if fusing else (1, 2, 4, 8, 16, 32, 64)
    for way in ways:
        began = perf_counter()
        inductor = {"fused": "default", "fused and tuned": "tuned"}.get(way, "")
        used = target if way == "eager" else GraphedTarget(target, inductor=inductor)
        cache = used.cache(1, context + 64, 64)
        used.read(torch.randint(used.vocab, (1, context), device=asked.device), [context], cache)
        row: Row = {"shape": shape, "way": way, "weights": read, "ms": {}, "start_s": {}}
        for width in widths:
            draft = chain(torch.randint(used.vocab, (1, width), device=asked.device))
            began = perf_counter()
            used.judge(draft, cache)
            synchronise(torch.device(asked.device))
            row["start_s"][width] = perf_counter() - began
            row["ms"][width] = 1e3 * seconds_of(partial(used.judge, draft, cache), asked.device)
        yield row | {"plain_ms": 1e3 * plain_seconds(used, context, 24 if asked.tiny else 64)}


def fused(asked: argparse.Namespace, shape: str) -> Iterator[Row]:
    """One way after the other: the faster one takes longer to begin."""
    yield from steps(asked, shape, ("fused",) if asked.tiny else ("fused", "fused and tuned"))


@torch.inference_mode()
def attention(asked: argparse.Namespace, _: str) -> Iterator[Row]:
    """Seconds of one layer's attention; `gb_s` counts keys and values once, `error` is against float32."""
    operators.provide()
    half = torch.bfloat16 if asked.device == "cuda" else torch.float32
    for length in (100,) if asked.tiny else (1000, 8000, 32000, 128000):
        keys, values = (torch.randn(1, 8, length + 100, 128, device=asked.device).to(half) for _ in range(2))
        for nodes in (1, 7) if asked.tiny else (1, 16, 64):
            query = torch.randn(1, 32, nodes, 128, device=asked.device).to(half)
            sees = torch.ones(nodes, nodes, device=asked.device).tril().long()
            lengths = torch.full((nodes, 1), length, device=asked.device)
            plan = torch.cat([lengths, torch.zeros_like(lengths), sees], -1)[None, None].contiguous()
            ours = partial(torch.ops.foretoken.attend, query, keys, values, plan, 128**-0.5, 0.0, None)
            mask = operators.visible(plan, keys.shape[2])[:, None]
            masked: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention
            theirs = partial(masked, query, keys, values, attn_mask=mask, enable_gqa=True)
            exact = operators.attend(query.float(), keys.float(), values.float(), plan, 128**-0.5, 0.0, None)
            error = float((ours().float() - exact).abs().max() / exact.abs().max())
            took, torchs = (seconds_of(work, asked.device) for work in (ours, theirs))
            moved = 2 * 8 * length * 128 * keys.element_size()
            yield {"prefix": length, "nodes": nodes, "us": took * 1e6, "torch_us": torchs * 1e6} | {
                "gb_s": moved / took / 1e9,
                "error": error,
            }


def losses(asked: argparse.Namespace, _: str) -> Iterator[Row]:
    """Forward and backward of each implementation of cross-entropy that is there."""
    from foretoken.training.losses import IMPLEMENTATIONS, cross_entropy

    rows, hidden, vocab = (64, 32, 512) if asked.tiny else (8192, 4096, 128256)
    dtype = torch.bfloat16 if asked.device == "cuda" else torch.float32
    weight = torch.randn(vocab, hidden, device=asked.device).mul_(0.02).to(dtype).requires_grad_()
    states = torch.randn(rows, hidden, device=asked.device).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (rows,), device=asked.device)
    for name in IMPLEMENTATIONS[1:]:
        row: Row = {"implementation": name}
        try:
            before = memory(asked.device, fresh=True)

            work = partial(cross_entropy, states, Unembedding(weight), labels, name)
            row["ms"] = 1e3 * seconds_of(lambda work=work: work().backward(), asked.device, 5, 2)
            row["mib"] = (memory(asked.device) - before) / 2**20
        except UserError as error:
            row["why not"] = str(error)
        yield row


def memory(device: str, fresh: bool = False) -> int:
    """The most bytes held on a GPU; 0 elsewhere."""
    if device != "cuda":
        return 0
    if fresh:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def texts(target: Target, count: int, length: int) -> list[list[int]]:
    """Prompts of code that nothing here was trained on."""
    from foretoken.training import stdlib

    held = [file for file in stdlib.files() if stdlib.held_out(file)]
    tokenizer: Any = target.tokenizer
    found = (tokenizer(stdlib.code(f))["input_ids"] for f in held)
    return [ids[:length] for ids in found if len(ids) > length][:count]


def decoded(target: Target, name: str, prompts: list[list[int]], tokens: int, **settings: Any) -> Row:
    """Every prompt by itself: tokens per forward, and seconds per token behind the first step."""
    drafter = make_drafter(name, target, settings)
    emitted = forwards = 0
    seconds, outputs = 0.0, list[list[int]]()
    for trial in range(2):  # the first one records
        emitted, forwards, seconds, outputs = 0, 0, 0.0, []
        for prompt in prompts if trial else prompts[:1]:
            session = Session(target, drafter, [Request(prompt, max_new_tokens=tokens)])
            synchronise(target.device)
            began = perf_counter()
            session.run()
            seconds += perf_counter() - began
            row = session.rows[0]
            emitted, forwards = emitted + row.emitted - 1, forwards + row.forwards
            outputs.append(row.output)
    return {"tokens_per_forward": emitted / forwards, "ms_per_token": 1e3 * seconds / emitted, "output": outputs}


def compared(asked: argparse.Namespace, target: Target, named: dict[str, str]) -> Iterator[Row]:
    """Every method, recorded, beside plain decoding; `same` counts prompts whose output is that of plain decoding."""
    used, plain = GraphedTarget(target), Row()
    prompts = texts(target, 2 if asked.tiny else 6, 64)
    for name, drafter in named.items():
        settings: Row = {"tree": "chain"} if name in TRAINED and name != "draft_model" else {}
        try:
            row = decoded(used, drafter, prompts, 24 if asked.tiny else 160, **settings)
        except UserError as error:
            yield {"method": name, "why not": str(error)}
            continue
        output: list[list[int]] = row.pop("output")
        plain = plain or row | {"output": output}
        same = sum(a == b for a, b in zip(output, plain["output"], strict=True))
        yield {"method": name, **row} | {
            "speedup": plain["ms_per_token"] / row["ms_per_token"],
            "same": f"{same} of {len(output)}",
        }


def methods(asked: argparse.Namespace, _: str) -> Iterator[Row]:
    target = load(ASSETS / "stdlib5M", dtype="float32", device=asked.device)
    named = {name: name for name in UNTRAINED} | {k: f"{k}:{ASSETS / v}" for k, v in TRAINED.items()}
    yield from compared(asked, target, dict(list(named.items())[:: 4 if asked.tiny else 1]))


def trained(asked: argparse.Namespace, folder: str) -> Iterator[Row]:
    """A code model with four heads, as large and long as the time allows, and what its heads are worth."""
    from foretoken.training.loop import train
    from foretoken.training.recipe import Recipe, filled

    size = SHAPES["tiny"] if asked.tiny else SHAPES["1B"] | {"hidden_size": 768, "intermediate_size": 2048}
    size = size | {"num_attention_heads": size["hidden_size"] // (8 if asked.tiny else 64)}
    given: Row = {"drafter": "mtp", "architecture": {"heads": 4, "kind": "parallel"}, "mode": "scratch"}
    given |= {"tokenizer": str(ASSETS / "stdlib5M"), "rows": 4 if asked.tiny else 48, "evaluate": 0}
    given |= {"model": {"model_type": "llama", "max_position_embeddings": 2048, "tie_word_embeddings": True, **size}}
    given |= {"optimizer": {"name": "muon", "lr": 0.006, "warmup": 20, "weight_decay": 0.05}, "tensorboard": False}
    given |= {"data": {"source": "stdlib", "length": 32 if asked.tiny else 512}, "save_every": 10**6}
    began = perf_counter()
    train(filled(Recipe, given | {"steps": 4, "out": f"{folder}/first"}))  # tokenises the text, too
    middle = perf_counter()
    train(filled(Recipe, given | {"steps": 12, "out": f"{folder}/timed"}))
    step = (perf_counter() - middle) / 12
    left = 2 if asked.tiny else 110 - (perf_counter() - began)
    count = min(3000, max(8, int(left / step)))
    train(filled(Recipe, given | {"steps": count, "out": f"{folder}/whole"}))
    yield {"trained_steps": count, "seconds_per_step": step}
    target = load(f"{folder}/whole", dtype=None, device=asked.device)
    yield from compared(asked, target, {"none": "none", "suffix": "suffix", "mtp": f"mtp:{folder}/whole"})


@torch.inference_mode()
def shapes(asked: argparse.Namespace, shape: str) -> Iterator[Row]:
    """Seconds of a step with a draft; what was guessed is wrong, which costs the same."""
    target = GraphedTarget(model_of(shape, asked.device))
    with torch.inference_mode(False), torch.no_grad():
        heads: Row = {
            "medusa": medusa.fresh(target, medusa.Architecture(heads=4, unembedding="shared")),
            "eagle": eagle.fresh(target, eagle.Architecture(version=1)),
        }
    prompt = torch.randint(target.vocab, (64 if asked.tiny else 512,)).tolist()
    for name in ("none", "suffix", "medusa", "eagle"):
        settings: Row = {"tree": "chain", "depth": 4} if name in heads else {}
        if name in heads:
            settings["path"] = heads[name].to(target.device, target.dtype)
        drafter = make_drafter(name, target, settings)
        count = 16 if asked.tiny else 48
        request = Request(prompt, max_new_tokens=(count + 1) * padded(drafter.needs.width) * 2)
        session = Session(target, drafter, [request])
        yield {"shape": shape, "method": name, "step_ms": 1e3 * seconds_of(session.step, asked.device, count - 8, 8)}


def training_memory(asked: argparse.Namespace, folder: str) -> Iterator[Row]:
    size = ["--vocab", "1000", "--length", "64"] if asked.tiny else ["--hidden", "2048", "--layers", "16"]
    out = Path(folder) / "memory.json"
    script = [sys.executable, str(ROOT / "benchmarks" / "training_memory.py"), "--device", asked.device]
    subprocess.run([*script, "--heads", "1" if asked.tiny else "1,4", *size, "--out", str(out)], check=True)
    yield from json.loads(out.read_text())["cases"]


SECTIONS: dict[str, Callable[[argparse.Namespace, str], Iterator[Row]]] = {
    **{"roofline": roofline, "steps": steps, "attention": attention, "methods": methods, "shapes": shapes},
    **{"fused": fused, "losses": losses, "trained": trained, "memory": training_memory},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("section")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    name, _, shape = asked.section.partition(":")
    (asked.out / "work").mkdir(parents=True, exist_ok=True)
    what = ("tiny" if asked.tiny else shape) if shape else str(asked.out / "work")
    for row in SECTIONS[name](asked, what):
        print("ROW " + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
