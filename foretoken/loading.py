"""Models from a folder or a hub name, refused in one sentence if they cannot work."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging
from transformers.utils.hub import cached_file, get_checkpoint_shard_files
from transformers.utils.peft_utils import find_adapter_config_file

from foretoken.attention import adopt
from foretoken.errors import UserError, unknown
from foretoken.graphs import quickened
from foretoken.program import Progress
from foretoken.quantize import quantized, require_quantizable
from foretoken.target import TREE_ATTENTION, Target, layer_windows, model_class_of

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

SAVED_AS = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16}
"""What safetensors calls the floating-point dtypes that weights are converted from."""

PIECE = 1 << 23
"""Bytes of a file that are mapped at once while its tensors are converted."""

READ_AS = {"mimo": "qwen2"}
"""Model types that transformers has no class for (they come with code of their own, which we do not run), and the type
that they compute like."""


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attention: str | None = None,
    quantize: str | None = None,
    compile: bool = False,
    wait: bool = True,
    progress: Progress | None = None,
) -> Target:
    """The causal language model and tokenizer at `path`, a folder or a hub name, ready to decode.

    dtype      as saved, if None; "float32", "float64", "bfloat16", "float16"
    device     cuda if there is one, else cpu, if None
    attention  transformers' attention implementation ("sdpa", "eager"); ours in place of "sdpa", if None
    quantize   "int8": weights rounded to 8 bits by torchao, which is another model and says so in its name
    compile    compile the step for this processor, or record it on a GPU; `wait`, `progress` as in `CompiledTarget`

    `UserError` if there is no model, the model cannot branch (decided before weights load), weights are missing or
    cut short, or the step cannot be compiled.
    """
    if attention is not None and attention not in TREE_ATTENTION:
        raise unknown("attention implementation that reads trees", attention, TREE_ATTENTION)
    if quantize is not None:
        require_quantizable(quantize, compile)
    name = str(path)
    config = read_config(name)
    layer_windows(config.get_text_config(decoder=True), model_class_of(config))
    model = load_model(name, config, dtype=dtype, device=device, attention=attention)
    if attention is None:
        adopt(model)
    if quantize is not None:
        quantized(model, quantize)
    target = Target(model, read_tokenizer(name, config))
    return quickened(target, wait=wait, progress=progress) if compile else target


def load_model(
    name: str,
    config: PreTrainedConfig,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """The causal language model at `name`, whether it can branch or not; arguments and errors as `load`'s."""
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    model_class = model_class_of(config)
    where = device_of(device)
    asked = DTYPES[dtype] if isinstance(dtype, str) else dtype
    options: dict[str, Any] = {"dtype": asked or "auto"}
    if attention is not None:
        options["attn_implementation"] = attention
    with quiet():
        try:
            if asked is not None and (parts := to_convert(name, config, asked)):
                options |= {"state_dict": parts, "generation_config": generation_config(name)}
            source = None if "state_dict" in options else name
            loaded: Any = model_class.from_pretrained(source, config=config, output_loading_info=True, **options)
        except (OSError, RuntimeError, SafetensorError, ValueError) as error:
            raise UserError(
                f"The weights of {name!r} cannot be read ({first_line(error)}); the copy is cut short or "
                "is no checkpoint of this model: fetch it again."
            ) from error
    model, report = loaded
    model.name_or_path = model.config.name_or_path = name
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"The weights of {name!r} lack {len(missing)} tensors, {missing[0]!r} first; the checkpoint is incomplete: "
            "fetch it again."
        )
    if model.dtype == torch.float64:
        model.set_experts_implementation("eager")  # torch has no grouped product in float64
    return model.to(where).eval()


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a safetensors file, read when transformers converts it.

    Weights that keep their dtype are used where the file is mapped. To convert them, transformers would map the whole
    file as well, and hold both.
    """

    file: str
    key: str
    shape: tuple[int, ...]
    kind: str

    def __getitem__(self, index: Any) -> "Stored":
        """Itself: `[...]` asks for the whole tensor."""
        return self

    def to(self, device: torch.device | str | None, dtype: torch.dtype) -> Tensor:
        """The tensor in `dtype`, a few rows read at a time, through a mapping that is closed behind them."""
        made = torch.empty(self.shape, dtype=dtype, device=device)
        rows = max(1, PIECE * len(made) // max(1, made.nbytes)) if self.shape else 1
        for start in range(0, len(made) if self.shape else 1, rows):
            with safe_open(self.file, "pt") as opened:
                if self.shape:
                    made[start : start + rows] = opened.get_slice(self.key)[start : start + rows]
                else:
                    made.copy_(opened.get_tensor(self.key))
        return made


def to_convert(name: str, config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Stored]:
    """The tensors at `name` by their keys, if they are plain safetensors and some have another floating dtype.

    Empty otherwise, and for what only transformers can load: quantized weights, adapters, .bin files.
    """
    if getattr(config, "quantization_config", None) or getattr(config, "transformers_weights", None):
        return {}
    single = cached_file(name, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    index = None if single else cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    files: Any = [single] if single else get_checkpoint_shard_files(name, index)[0] if index else []
    found: dict[str, Stored] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            parts = {key: opened.get_slice(key) for key in list(opened.keys())}
            for key, part in parts.items():
                found[key] = Stored(file, key, tuple(part.get_shape()), part.get_dtype())
    if all(SAVED_AS.get(part.kind, dtype) == dtype for part in found.values()):
        return {}
    return {} if find_adapter_config_file(name) is not None else found


def generation_config(name: str) -> GenerationConfig | None:
    """What `name` says of end tokens and sampling beside its configuration, if anything."""
    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:
        return None


def device_of(device: str | torch.device | None) -> torch.device:
    """The device of that name, a GPU or else the CPU if None; `UserError` if this machine has no such device."""
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises any of them, by device
        raise UserError(f"torch has no device {str(device)!r} here; give another, such as 'cpu'.") from error
    return where


def read_config(name: str) -> PreTrainedConfig:
    """The configuration at `name`; `UserError` if there is none."""
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise UserError(f"{name!r} holds no config.json; give the folder of a transformers checkpoint or a hub name.")
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(
            f"{name!r} is no model, since there is no such folder; give a transformers checkpoint or a hub name."
        )
    try:
        given = PreTrainedConfig.get_config_dict(name)[0]
        if (kind := READ_AS.get(given.get("model_type", ""))) is not None:
            return AutoConfig.for_model(kind, **{k: v for k, v in given.items() if k not in ("model_type", "auto_map")})
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{name!r} is no model that can be found ({first_line(error)}); give the folder of a transformers "
            "checkpoint or a hub name."
        ) from error


def read_tokenizer(name: str, config: PreTrainedConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the weights, or None: token ids can be decoded without one."""
    try:
        return AutoTokenizer.from_pretrained(name, config=config)
    except (OSError, ValueError, KeyError):
        return None


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def quiet() -> Generator[None]:
    """transformers' loading report silenced (what matters of it becomes our errors); its bar stays on terminals."""
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
