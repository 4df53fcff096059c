"""What a recipe names, opened: the target, the drafter, the text."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from foretoken import saved as store
from foretoken.branch import blocks_of
from foretoken.drafters import configured, module_of
from foretoken.errors import UserError
from foretoken.target import Target
from foretoken.training.corpus import Corpus, check_vocabulary
from foretoken.training.learner import Learner
from foretoken.training.processes import Processes
from foretoken.training.recipe import Recipe
from foretoken.training.sources import documents
from foretoken.training.tokenizer import train_tokenizer
from foretoken.training.trunk import Trunk, new_target, open_target, saved_in, tokenizer_at, working

NATIVE = "native"
"""As `resume_from`: the weights that the target's own checkpoint brings along."""

TOKENIZER = "tokenizer"
"""Where a run keeps the tokenizer that it made, until it saves its model."""


@dataclass(frozen=True, slots=True)
class Setup:
    """heads and architecture are None where the target is trained alone.

    dtype  what weights are saved in
    """

    trunk: Trunk
    heads: nn.Module | None
    architecture: Any
    learner: Learner
    corpus: Corpus
    held_out: Corpus | None
    dtype: torch.dtype


def prepare(recipe: Recipe, processes: Processes) -> Setup:
    """Everything that a run needs; `UserError` for what does not fit together."""
    module = None if recipe.drafter == "none" else trainable(recipe.drafter)
    if recipe.mode == "scratch":
        tokenizer = new_tokenizer(recipe, processes)
        target, heads = from_scratch(recipe, tokenizer, module, processes.device)
        came = target.dtype
    else:
        target, came = open_target(recipe, processes.device)
        heads = None if module is None else heads_for(recipe, target, module)
    if target.tokenizer is None:
        raise UserError(
            f"{recipe.target!r} has no tokenizer, so text cannot be read; put its tokenizer.json beside it."
        )
    check_vocabulary(target.tokenizer, target.vocab)
    architecture: Any = None if heads is None else heads.architecture
    drafter = None if module is None else module.build(target, module.Config(path=heads))
    trunk = Trunk(target, recipe.mode, recipe.lora, remembers=recipe.loss.keep_target > 0)
    if not trunk.parameters and (heads is None or not any(True for _ in heads.parameters())):
        raise UserError(
            f"{recipe.drafter} has no weights of its own with this architecture and the target is frozen, so nothing "
            "learns; set mode=joint."
        )
    corpus, held_out = texts(recipe, target.tokenizer)
    if getattr(architecture, "vocabulary", 0) and recipe.resume_from in ("", NATIVE):
        cast(Any, heads).choose(corpus.frequent(architecture.vocabulary), target)
    return Setup(
        trunk,
        heads,
        architecture,
        Learner(trunk, drafter, recipe.loss),
        corpus,
        held_out,
        saved_in(recipe.kept_dtype, came),
    )


def trainable(name: str) -> ModuleType:
    """The module of a drafter that has weights."""
    module = module_of(name)
    if not all(part in vars(module) for part in ("Architecture", "fresh")):
        raise UserError(f"{name} has nothing to train; name a drafter with heads, such as mtp or medusa.")
    return module


def from_scratch(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, module: ModuleType | None, device: torch.device
) -> tuple[Target, nn.Module | None]:
    """A new target and its heads; with `move_layers` it has fewer layers by those that are the heads'."""
    target = new_target(recipe, tokenizer, device)
    heads = None if module is None else heads_for(recipe, target, module)
    if module is None or heads is None or not recipe.move_layers:
        return target, heads
    block = type(blocks_of(target)[1][-1])
    moved = sum(type(layer) is block for layer in heads.modules())
    if not moved:
        return target, heads
    if moved >= target.config.num_hidden_layers:
        raise UserError(
            f"The model has {target.config.num_hidden_layers} layers and its heads take {moved}; give it more, or set "
            "move_layers=false."
        )
    target = new_target(recipe, tokenizer, device, fewer=moved)
    return target, heads_for(recipe, target, module)


def heads_for(recipe: Recipe, target: Target, module: ModuleType) -> nn.Module:
    """The drafter's weights: new, or those of `resume_from`; in the working precision."""
    if recipe.resume_from == NATIVE:
        return native(recipe, target, module).to(target.device, working(recipe.precision)).requires_grad_()
    folder = Path(recipe.resume_from) if recipe.resume_from else None
    if folder is None:
        architecture = configured(module.Architecture, recipe.drafter, recipe.architecture)
    else:
        architecture = continued(recipe, folder, target, module)
    torch.manual_seed(recipe.seed + 1)
    heads: nn.Module = module.fresh(target, architecture).to(target.device, working(recipe.precision))
    if folder is not None:
        store.load_weights(folder, heads)
    return heads.requires_grad_()


def native(recipe: Recipe, target: Target, module: ModuleType) -> nn.Module:
    """The weights of that method that the target was published with."""
    if "native" not in vars(module):
        raise UserError(
            f"No model is published with weights of {recipe.drafter}, so resume_from={NATIVE} has nothing to go on "
            "from; name a folder, or leave it out."
        )
    configured(module.Architecture, recipe.drafter, recipe.architecture)  # refuses what is no setting
    heads: nn.Module = module.native(target, recipe.architecture)
    if heads.state_dict().keys() != module.fresh(target, heads.architecture).state_dict().keys():
        raise UserError(
            f"The modules of {target.name!r} are of another kind than its last block, so what is trained could not be "
            f"loaded again; use them as they are, or train new ones without resume_from={NATIVE}."
        )
    return heads


def continued(recipe: Recipe, folder: Path, target: Target, module: ModuleType) -> Any:
    """The architecture of the drafter in `folder`, which must be of this target and as the recipe says."""
    saved = store.read(folder, recipe.drafter)
    if not recipe.other_target:
        store.require_target(saved, target, folder)
    architecture = store.settle(module.Architecture, saved, folder)
    for key, value in recipe.architecture.items():
        if saved.architecture.get(key) != value:
            raise UserError(
                f"The drafter in '{folder}' has {key} = {saved.architecture.get(key)!r} and the recipe says {value!r}; "
                "leave architecture out to go on from it."
            )
    return architecture


def new_tokenizer(recipe: Recipe, processes: Processes) -> PreTrainedTokenizerBase:
    """The tokenizer of a model from scratch: one at a path, or one made from the data, kept in the run's folder."""
    if not recipe.tokenizer.isdigit():
        return tokenizer_at(recipe.tokenizer)
    folder = Path(recipe.out) / TOKENIZER
    if processes.main and not folder.is_dir():
        draft = folder.with_name(f".{TOKENIZER}.part")
        shutil.rmtree(draft, ignore_errors=True)
        texts = (d for d in documents(recipe.data.source, share=recipe.data.held_out) if isinstance(d, str))
        train_tokenizer(texts, int(recipe.tokenizer), draft)
        draft.rename(folder)
    processes.wait()
    return tokenizer_at(str(folder))


def texts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Corpus, Corpus | None]:
    """The text to train on and the text to be measured on."""
    d = recipe.data
    corpus = Corpus.load(d.source, tokenizer, share=d.held_out, cache=d.cache or None)
    try:
        held_out = Corpus.load(d.source, tokenizer, split="held_out", share=d.held_out, cache=d.cache or None)
    except UserError:  # the source is too small to hold anything out
        held_out = None
    return corpus, held_out
