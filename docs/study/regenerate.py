"""Make the study again: train what is missing, analyse every model, write the figures and the page.

    make study                                      all of it: hours on two cores; killed and resumed at will
    python docs/study/regenerate.py --only page     the page and its figures, from rows that are there

Models and rows go to runs/study; docs/study gets index.html, index.md and figures. TinyStories, which may not travel
with the package, is looked for as `foretoken bench` looks for it ($FORETOKEN_DATA).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from foretoken.bench.tasks import data_folder
from foretoken.errors import UserError
from foretoken.study.page import write

ROOT = Path(__file__).resolve().parents[2]
MODELS, ROWS, OUT = Path("runs/study"), Path("runs/study/rows"), Path("docs/study")
ASSETS, RECIPES = Path("foretoken/assets"), Path("recipes/study")
TRAINED = (
    *("code_64x2", "code_192x4_short", "code_192x4", "code_256x6", "copy_32x2", "copy_128x3"),
    *("heads_frozen", "heads_frozen_whs", "heads_joint", "heads_lora"),
)
"""Recipes by name, targets before the heads on them."""
PLAIN = MODELS / "code_256x6"
"""The target of the heads."""
CODE = (
    *(MODELS / "code_64x2", ASSETS / "stdlib1M", MODELS / "code_192x4_short", MODELS / "code_192x4", PLAIN),
    ASSETS / "stdlib5M",
)
STORIES = (ASSETS / "stories260K", ASSETS / "bitstories3M")
COPYING = (MODELS / "copy_32x2", MODELS / "copy_128x3")
LIMIT = "8000"
"""Tokens of each text."""
LOOKING = (["--depth", "3", "--every", "4"], ["--depth", "2", "--every", "24"])
"""How far ahead and how often: of texts with few tokens in a vocabulary, and of code, whose nuclei are large."""
DRAFTERS = (
    *(f"{m}:{ASSETS / f'stdlib5M-{m}'}" for m in ("blockwise", "medusa", "weighted_heads", "deepseek_mtp")),
    *(f"mtp:{ASSETS / 'stdlib5M'}", f"eagle:{ASSETS / 'stdlib5M-eagle1'}", f"eagle:{ASSETS / 'stdlib5M-eagle3'}"),
)


def texts() -> dict[str, Sequence[Path]]:
    """Each text and the models that were made for its like, smallest first."""
    folder = data_folder()
    if folder is None:
        raise UserError("There is no folder of texts; set FORETOKEN_DATA to one that holds text/tinystories_*.txt.")
    stories = folder / "text" / "tinystories_validation_0.8M.txt"
    return {
        os.path.relpath(stories, ROOT): STORIES,
        str(MODELS / "copying" / "copying.jsonl"): COPYING,
        "stdlib": CODE,
    }


def train() -> None:
    """Every model that is not there yet; an interrupted run goes on."""
    for name, documents, seed in (("train", "33000", "1"), ("copying", "200", "2")):
        file = MODELS / "copying" / f"{name}.jsonl"
        if not (ROOT / file).is_file():
            call(str(RECIPES / "copying.py"), str(file), "--documents", documents, "--seed", seed)
    for name in TRAINED:
        if not list((ROOT / MODELS / name).glob("*.safetensors")):
            foretoken("train", str(RECIPES / f"{name}.yaml"))


def analyse() -> None:
    """Every analysis of every model; what is finished is left alone."""
    for data, models in texts().items():
        study(data, models)
        foretoken("analyze", "layers", models[0], "--data", data, "--limit", LIMIT, *further(models))
    changed = [MODELS / name for name in ("heads_joint", "heads_lora")]
    study("stdlib", changed)
    frozen = [f"weighted_heads:{MODELS / name}" for name in ("heads_frozen", "heads_frozen_whs")]
    given = ["--data", "stdlib", "--limit", LIMIT, "--out", ROWS]
    foretoken("analyze", "heads", PLAIN, *given, *repeated("--drafter", frozen), *repeated("--on", changed))
    for model in changed:
        foretoken("analyze", "heads", model, *given, "--drafter", f"weighted_heads:{model}")
    foretoken("analyze", "heads", CODE[-1], *given, *repeated("--drafter", DRAFTERS))


def page() -> None:
    """index.html, index.md and every figure as SVG; as PNG those that README.md shows."""
    folder, made = ROOT / OUT, ROOT / MODELS / "page"
    write(ROOT / ROWS, made)
    shown = set(re.findall(r"figures/([\w.-]+\.png)", (folder / "README.md").read_text("utf-8")))
    shutil.rmtree(folder / "figures", ignore_errors=True)
    (folder / "figures").mkdir()
    for file in [*made.glob("index.*"), *made.glob("figures/*.svg"), *(made / "figures" / name for name in shown)]:
        shutil.copyfile(file, folder / file.relative_to(made))


def study(data: str, models: Sequence[Path]) -> None:
    """Marginals and ceilings."""
    foretoken(
        "analyze", "ceiling", models[0], "--data", data, "--limit", LIMIT, *further(models), *LOOKING[data == "stdlib"]
    )


def further(models: Sequence[Path]) -> list[str]:
    return ["--models", ",".join(map(str, models[1:])), "--out", str(ROWS)]


def repeated(name: str, values: Sequence[object]) -> list[str]:
    return [part for value in values for part in (name, str(value))]


def foretoken(*arguments: object) -> None:
    call("-m", "foretoken.cli", *map(str, arguments))


def call(*arguments: str) -> None:
    """Run Python so; what it writes is seen, and its failure is ours."""
    print("python", *arguments, flush=True)
    subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=["train", "analyse", "page"])
    only = parser.parse_args().only
    if only in (None, "train"):
        train()
    if only in (None, "analyse"):
        analyse()
    if only in (None, "page"):
        page()


if __name__ == "__main__":
    main()
