"""Models from a folder or a hub name, refused in one sentence if they cannot work."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from foretoken.attention import adopt
from foretoken.errors import UserError, unknown
from foretoken.target import TREE_ATTENTION, Target, layer_windows, model_class_of

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

READ_AS = {"mimo": "qwen2"}
"""Model types that transformers has no class for (they come with code of their own, which we do not run), and the type
that they compute like."""


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attention: str | None = None,
) -> Target:
    """The causal language model and tokenizer at `path`, a folder or a hub name, ready to decode.

    dtype      as saved, if None; "float32", "float64", "bfloat16", "float16"
    device     cuda if there is one, else cpu, if None
    attention  transformers' attention implementation ("sdpa", "eager"); ours in place of "sdpa", if None

    `UserError` if there is no model, the model cannot branch (decided before weights load), or weights are missing or
    cut short.
    """
    if attention is not None and attention not in TREE_ATTENTION:
        raise unknown("attention implementation that reads trees", attention, TREE_ATTENTION)
    name = str(path)
    config = read_config(name)
    layer_windows(config.get_text_config(decoder=True), model_class_of(config))
    model = load_model(name, config, dtype=dtype, device=device, attention=attention)
    if attention is None:
        adopt(model)
    return Target(model, read_tokenizer(name, config))


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
    options: dict[str, Any] = {"dtype": DTYPES[dtype] if isinstance(dtype, str) else dtype or "auto"}
    if attention is not None:
        options["attn_implementation"] = attention
    with quiet():
        try:
            loaded: Any = model_class.from_pretrained(name, config=config, output_loading_info=True, **options)
        except (OSError, RuntimeError, SafetensorError, ValueError) as error:
            raise UserError(
                f"The weights of {name!r} cannot be read ({first_line(error)}); the copy is cut short or "
                "is no checkpoint of this model: fetch it again."
            ) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"The weights of {name!r} lack {len(missing)} tensors, {missing[0]!r} first; the checkpoint is incomplete: "
            "fetch it again."
        )
    if model.dtype == torch.float64:
        model.set_experts_implementation("eager")  # torch has no grouped product in float64
    return model.to(where).eval()


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
