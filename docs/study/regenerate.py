"""Make the study again: train what is missing, analyse every model, write the figures and the page.

    make study                                      all of it, about three hours on two cores, killed and resumed at will
    python docs/study/regenerate.py --only page     the page and its figures from rows that are there

Models and rows go to runs/study; docs/study gets index.html, index.md and figures. TinyStories, which may not travel with
the package, is looked for as `foretoken bench` looks for it ($FORETOKEN_DATA).
"""

import argparse
import subprocess
import sys
from pathlib import Path

from foretoken.bench.tasks import data_folder
from foretoken.errors import UserError
from foretoken.study.page import write

ROOT = Path(__file__).resolve().parents[2]
MODELS, ROWS = ROOT / "runs" / "study", ROOT / "runs" / "study" / "rows"
ASSETS, RECIPES = ROOT / "foretoken" / "assets", ROOT / "recipes" / "study"
TRAINED = (
    *("code_64x2", "code_192x4_short", "code_192x4", "code_256x6", "copy_32x2", "copy_128x3"),
    *("heads_frozen", "heads_frozen_whs", "heads_joint", "heads_joint_whs", "heads_lora"),
)
"""Recipes by name, targets before the heads on them."""
CODE = (*(str(MODELS / n) for n in ("code_64x2", "code_192x4_short", "code_192x4", "code_256x6")),)
CODE = (CODE[0], str(ASSETS / "stdlib1M"), *CODE[1:], str(ASSETS / "stdlib5M"))
STORIES = (str(ASSETS / "stories260K"), str(ASSETS / "bitstories3M"))
COPYING = (str(MODELS / "copy_32x2"), str(MODELS / "copy_128x3"))
LOOKING = (["--depth", "3", "--every", "4"], ["--depth", "2", "--every", "16"])
"""How far ahead and how often: of texts with few tokens in a vocabulary, and of code, whose nuclei are large."""
DRAFTERS = (
    *(f"{m}:{ASSETS / f'stdlib5M-{m}'}" for m in ("blockwise", "medusa", "weighted_heads", "deepseek_mtp")),
    *(f"mtp:{ASSETS / 'stdlib5M'}", f"eagle:{ASSETS / 'stdlib5M-eagle1'}", f"eagle:{ASSETS / 'stdlib5M-eagle3'}"),
)


def texts() -> dict[str, tuple[str, tuple[str, ...]]]:
    """By name each text and the models that were made for its like."""
    folder = data_folder()
    if folder is None:
        raise UserError("There is no folder of texts; set FORETOKEN_DATA to one that holds text/tinystories_*.txt.")
    stories = folder / "text" / "tinystories_validation_0.8M.txt"
    return {
        "code": ("stdlib", CODE),
        "stories": (str(stories), STORIES),
        "copying": (str(MODELS / "copying" / "held_out.jsonl"), COPYING),
    }


def train() -> None:
    """Every model that is not there yet; an interrupted run goes on."""
    for name, documents, seed in (("train", "33000", "1"), ("held_out", "200", "2")):
        file = MODELS / "copying" / f"{name}.jsonl"
        if not file.is_file():
            call(str(RECIPES / "copying.py"), str(file), "--documents", documents, "--seed", seed)
    for name in TRAINED:
        if not list((MODELS / name).glob("*.safetensors")):
            foretoken("train", str(RECIPES / f"{name}.yaml"))


def analyse() -> None:
    """Every analysis of every model; what is finished is left alone."""
    for data, models in texts().values():
        given = ["--data", data, "--out", str(ROWS), "--limit", "8000", "--models", ",".join(models[1:])]
        foretoken("analyze", "ceiling", models[0], *given, *LOOKING[data == "stdlib"])
        foretoken("analyze", "layers", models[0], *given)
    heads = [f"weighted_heads:{MODELS / name}" for name in ("heads_frozen", "heads_frozen_whs")]
    changed = {name: str(MODELS / name) for name in ("heads_joint", "heads_joint_whs", "heads_lora")}
    given = ["--data", "stdlib", "--out", str(ROWS), "--limit", "8000"]
    foretoken("analyze", "heads", CODE[4], *given, *options("--drafter", heads), *options("--on", changed.values()))
    for model in changed.values():
        foretoken("analyze", "heads", model, *given, "--drafter", f"weighted_heads:{model}")
    changed_too = ["--models", ",".join(list(changed.values())[1:])]
    foretoken("analyze", "ceiling", changed["heads_joint"], *given, *changed_too, *LOOKING[True])
    foretoken("analyze", "heads", CODE[5], *given, *options("--drafter", DRAFTERS))


def options(name: str, values: object) -> list[str]:
    return [part for value in values for part in (name, str(value))]  # pyright: ignore[reportGeneralTypeIssues]


def foretoken(*arguments: str) -> None:
    call("-m", "foretoken.cli", *arguments)


def call(*arguments: str) -> None:
    """Run Python so; what it writes is seen, and its failure is ours."""
    print("python", *arguments, flush=True)
    subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=["train", "analyse", "page"])
    only = parser.parse_args().only
    if only in (None, "train"):
        train()
    if only in (None, "analyse"):
        analyse()
    if only in (None, "page"):
        for file in write(ROWS, ROOT / "docs" / "study"):
            print(file)


if __name__ == "__main__":
    main()
