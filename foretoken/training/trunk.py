"""The target in training: made anew, frozen, learning, or with adapters; and what it shows the heads."""

import copy
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from foretoken.errors import UserError
from foretoken.loading import DTYPES, load, quiet
from foretoken.target import UNNORMED, Target
from foretoken.training.recipe import Lora, Recipe
from foretoken.unembed import Unembedding


@dataclass(frozen=True, slots=True)
class Shown:
    """What one forward of the trunk gives.

    features  [B, T, F], the layers that the heads read, side by side
    final     [B, T, H], what the output head reads
    """

    features: Tensor
    final: Tensor


class Trunk:
    """A target whose parameters learn as `mode` says."""

    def __init__(self, target: Target, mode: str, lora: Lora, *, remembers: bool = False) -> None:
        """`remembers`: whether `before` will be asked."""
        self.target, self.mode = target, mode
        self.original = Target(copy.deepcopy(target.model)) if remembers and mode == "joint" else target
        target.model.requires_grad_(mode in ("joint", "scratch"))
        self._adapted: Any = adapted(target, lora) if mode == "lora" else None
        self._names = {name for name, p in target.model.named_parameters() if p.requires_grad}

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those that learn at any time of the run."""
        return [(name, p) for name, p in self.target.model.named_parameters() if name in self._names]

    @property
    def learns(self) -> bool:
        """Whether it learns at any time of the run."""
        return self.mode != "frozen"

    def thaw(self, learn: bool) -> None:
        """Let what learns collect gradients, or not: heads that share its weights give it none then."""
        for _, parameter in self.parameters:
            if not isinstance(parameter, DTensor):  # a sharded layer, which no head shares
                parameter.requires_grad_(learn)

    def __call__(self, tokens: Tensor, layers: Sequence[int], learn: bool) -> Shown:
        """Read tokens [B, T]; with the trunk's graph, and its dropout, if `learn`."""
        self._train(learn)
        deep = any(layer not in (-1, UNNORMED) for layer in layers)
        with nullcontext() if learn else torch.no_grad():
            with self.target.watched(layers) as unnormed:
                out = self.target.decoder(input_ids=tokens, output_hidden_states=deep, use_cache=False)
            final: Tensor = out.last_hidden_state
            others = [final if i == -1 else out.hidden_states[i] for i in layers if i != UNNORMED]
            states: list[Tensor] = [*unnormed, *others]
            return Shown(torch.cat(states, -1) if len(states) > 1 else (*states, final)[0], final)

    def before(self, tokens: Tensor) -> tuple[Tensor, Unembedding]:
        """What the output head of the target before training reads [B, T, H], and that head."""
        self._train(False)
        bare = self._adapted.disable_adapter() if self._adapted is not None else nullcontext()
        with bare, torch.no_grad():
            final = self.original.decoder(input_ids=tokens, use_cache=False).last_hidden_state
        return final, self.original.unembed

    def _train(self, learn: bool) -> None:
        if self.target.model.training != learn:
            self.target.model.train(learn)

    def merge(self) -> None:
        """Fold the adapters into the weights, for good."""
        if self._adapted is not None:
            self._adapted.merge_and_unload()
            self._adapted = None


def adapted(target: Target, lora: Lora) -> Any:
    """peft's wrapper of the target, which adds low-rank adapters inside the model."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("LoRA needs peft, which is not installed; run `pip install foretoken[train]`.") from error
    modules = lora.modules if lora.modules == "all-linear" else [name.strip() for name in lora.modules.split(",")]
    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=modules, bias="none"
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in words of yesterday
            return get_peft_model(target.model, settings)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise UserError(f"peft finds no layers {lora.modules!r} in the target; correct lora.modules.") from error


def working(precision: str) -> torch.dtype:
    """What weights are kept in while they learn."""
    return torch.float64 if precision == "float64" else torch.float32


def open_target(recipe: Recipe, device: torch.device) -> tuple[Target, torch.dtype]:
    """The trained target that a recipe names, and the dtype it came in.

    One that learns is in the working precision; a frozen one stays as it came where products are in bfloat16 anyway.
    """
    target = load(recipe.target, device=device, attention="sdpa")
    came = target.dtype
    if recipe.mode != "frozen" or recipe.precision != "bf16":
        cast(nn.Module, target.model).to(working(recipe.precision))
    return target, came


def new_target(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, device: torch.device, fewer: int = 0) -> Target:
    """A target from scratch, with as many layers as the recipe says but `fewer`."""
    fields = dict(recipe.model)
    kind = fields.pop("model_type", None)
    if not isinstance(kind, str):
        raise UserError("A model from scratch needs model.model_type, such as llama; see recipes/ for an example.")
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    fields = {"vocab_size": len(tokenizer)} | fields | ends
    try:
        if fewer:
            fields["num_hidden_layers"] = AutoConfig.for_model(kind, **fields).num_hidden_layers - fewer
        config = AutoConfig.for_model(kind, **fields)
        torch.manual_seed(recipe.seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"transformers makes no model of these settings ({said}); correct `model` in the recipe."
        ) from error
    return Target(model.to(device, working(recipe.precision)), tokenizer)


def save_target(target: Target, folder: Path, dtype: torch.dtype) -> None:
    """Write model and tokenizer as transformers loads them."""
    with quiet():
        cast(nn.Module, target.model).to(dtype)
        target.model.save_pretrained(folder)
    if target.tokenizer is not None:
        target.tokenizer.save_pretrained(folder)


def saved_in(name: str, came: torch.dtype) -> torch.dtype:
    """The dtype of that name; `came` if it has none."""
    return DTYPES[name] if name else came


def tokenizer_at(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or of a hub name."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path!r} holds no tokenizer; give a folder that does, or a vocabulary size.") from error
