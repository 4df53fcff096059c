"""Speed on a processor, against the memory's and other programs', with every step compiled.

    python benchmarks/speed plain      plain decoding of a 134M Llama: the memory's speed, llama.cpp, vLLM, transformers
    python benchmarks/speed widths     forwards over drafts of 1 to 64 nodes against one node
    python benchmarks/speed small      an 11M Qwen3, plain and with look-ups
    python benchmarks/speed contexts   forwards behind 128 to 8,192 tokens
    python benchmarks/speed batches    1 to 64 prompts together, with guessing, without, and adaptive

Weights are random, or those of the models in the package; dtype bfloat16. Every repeat times every case once in a new
order, and the memory's speed between them; ratios are medians of each repeat's. `--out FILE` writes the record.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import batches as together
import forwards
from found import Found, show, write
from race import Race, plain, small
from shapes import ASSETS

PEERS = {
    "plain": "llama_cpp,vllm,transformers,openvino",
    "small": "llama_cpp,llama_cpp:prompt_lookup,vllm,vllm:ngram,transformers,transformers:prompt_lookup,"
    "openvino,openvino:prompt_lookup",
}
HEADS = [f"{name}:{ASSETS / f'stdlib5M-{folder}'}" for name, folder in (("medusa", "medusa"), ("eagle", "eagle1"))]
METHODS = ",".join(f"{m},{m},adaptive=true" for m in ["suffix", *HEADS])


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/speed"), help="where models are saved")
    parser.add_argument("--out", type=Path)
    sections = parser.add_subparsers(dest="section", required=True)
    for name, model, prompts, new in (("plain", "llama-134m", 1, 64), ("small", "qwen3-11m", 4, 192)):
        section = sections.add_parser(name)
        section.add_argument("--model", default=model)
        section.add_argument("--methods", default="" if name == "plain" else "prompt_lookup,suffix")
        section.add_argument("--peers", type=names, default=names(PEERS[name]))
        section.add_argument("--length", type=int, default=96)
        section.add_argument("--new", type=int, default=new)
        section.add_argument("--prompts", type=int, default=prompts)
        section.add_argument("--repeats", type=int, default=15 if name == "plain" else 7)
    for name, widths, contexts in (
        ("widths", "1,2,4,8,16,32,64", "256"),
        ("contexts", "1,8", "128,512,2048,4096,8192"),
    ):
        section = sections.add_parser(name)
        section.add_argument("--model", default="llama-134m")
        section.add_argument("--widths", type=numbers, default=numbers(widths))
        section.add_argument("--contexts", type=numbers, default=numbers(contexts))
        section.add_argument("--repeats", type=int, default=25)
    section = sections.add_parser("batches")
    section.add_argument("--model", default=str(ASSETS / "stdlib5M"))
    section.add_argument("--dtype", default="bfloat16")
    section.add_argument("--methods", default=METHODS)
    section.add_argument("--batches", type=numbers, default=numbers("1,2,4,8,16,32,64"))
    section.add_argument("--tasks", default="code,random")
    section.add_argument("--temperature", type=float, default=0.0)
    section.add_argument("--new", type=int, default=64)
    section.add_argument("--repeats", type=int, default=5)
    return parser


def measured(asked: argparse.Namespace) -> Found:
    """What the section asked for found."""
    methods: Sequence[str] = [asked.methods] if getattr(asked, "methods", "") else []
    if asked.section in ("plain", "small"):
        race = Race(
            asked.model, asked.folder, asked.length, asked.new, asked.prompts, asked.repeats, methods, asked.peers
        )
        return (plain if asked.section == "plain" else small)(race)
    if asked.section == "batches":
        return together.batches(
            together.Asked(
                asked.model,
                asked.folder,
                asked.dtype,
                methods,
                asked.batches,
                asked.tasks,
                asked.temperature,
                asked.new,
                asked.repeats,
            )
        )
    some = forwards.Asked(asked.model, asked.folder, asked.widths, asked.contexts, asked.repeats)
    return (forwards.widths if asked.section == "widths" else forwards.contexts)(some)


def main() -> None:
    asked = arguments().parse_args()
    found = measured(asked)
    show(asked.section, found)
    if asked.out:
        write(asked.section, found, asked.out)


if __name__ == "__main__":
    main()
