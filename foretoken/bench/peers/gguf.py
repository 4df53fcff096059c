"""A model folder as one GGUF file, the format of llama.cpp (ggml's docs/gguf.md, version 3): Llama, Qwen2, Qwen3.

Matrices keep the type that is asked for and vectors are float32, as llama.cpp's own converter writes them. There is no
vocabulary in it: prompts are token ids.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from foretoken.errors import UserError

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
FLOAT32, BFLOAT16 = 0, 30
"""Types of a tensor."""
UINT32, REAL32, STRING = 4, 6, 8
"""Types of a field."""
TYPES = {"float32": (FLOAT32, torch.float32), "bfloat16": (BFLOAT16, torch.bfloat16)}

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""transformers' model types, and llama.cpp's names of them."""

PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Parts of a layer there and in GGUF."""
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the file: whose values it has and how they are turned."""

    name: str
    source: str  # its name in the folder
    shape: tuple[int, ...]
    heads: int  # of queries or keys, whose halves are interleaved; 0: as it is
    kind: int

    @property
    def nbytes(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count * (4 if self.kind == FLOAT32 else 2)


def write(folder: str, path: Path, dtype: str) -> None:
    """Write the model in `folder` to `path`; `UserError` if llama.cpp would compute something else."""
    config: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text())
    require_writable(folder, config)
    files = tensor_files(folder)
    entries = [entry_of(folder, config, name, shape_of(file, name), dtype) for name, file in files.items()]
    if config.get("tie_word_embeddings"):
        entries = [entry for entry in entries if entry.name != "output.weight"]
    part = path.with_suffix(".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("wb") as out:
        head(out, fields(config), entries)
        for entry in entries:
            pad(out)
            out.write(raw(turned(read(files[entry.source], entry.source), entry.heads), entry.kind))
    part.rename(path)


def require_writable(folder: str, config: Mapping[str, Any]) -> None:
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(
            f"The model in {folder!r} is of type {kind!r} and as GGUF only {', '.join(ARCHITECTURES)} can be written; "
            "leave llama_cpp out for it."
        )
    rope: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rotary = rope.get("rope_type", rope.get("type", "default"))
    asked = {"rotary positions": (rotary, "default"), "mlp_bias": (config.get("mlp_bias") or False, False)}
    asked["use_sliding_window"] = (config.get("use_sliding_window") or False, False)
    for what, (given, need) in asked.items():
        if given != need:
            raise UserError(
                f"The model in {folder!r} has {what} {given!r} and as GGUF only {need!r} can be written; leave "
                "llama_cpp out for it."
            )


def tensor_files(folder: str) -> dict[str, Path]:
    """Every tensor of the model and the file it is in."""
    found: dict[str, Path] = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    if not found:
        raise UserError(f"{folder!r} has no model*.safetensors, which GGUF is written from; save the model as that.")
    return found


def shape_of(path: Path, name: str) -> tuple[int, ...]:
    with safe_open(path, "pt") as file:
        return tuple(file.get_slice(name).get_shape())


def read(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def entry_of(folder: str, config: Mapping[str, Any], source: str, shape: tuple[int, ...], dtype: str) -> Entry:
    """Where a tensor of the folder goes."""
    stem, _, last = source.rpartition(".")
    if stem in WHOLE:
        name = WHOLE[stem]
    else:
        _, _, inside = stem.partition("model.layers.")
        layer, _, part = inside.partition(".")
        if part not in PARTS or last not in ("weight", "bias"):
            raise UserError(
                f"The model in {folder!r} has a tensor {source!r}, for which GGUF has no name; leave llama_cpp out for "
                "it."
            )
        name = f"blk.{layer}.{PARTS[part]}"
    heads = 0
    if config["model_type"] == "llama" and name.endswith(("attn_q", "attn_k")):
        heads = query_heads(config) if name.endswith("attn_q") else key_heads(config)
    kind = TYPES[dtype][0] if len(shape) > 1 else FLOAT32
    return Entry(f"{name}.{last}", source, shape, heads, kind)


def query_heads(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"])


def key_heads(config: Mapping[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or query_heads(config))


def turned(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head in the order of llama.cpp's Llama, which rotates neighbours: 0, h/2, 1, h/2 + 1, ..."""
    if not heads:
        return tensor
    split = tensor.view(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])  # [K, 2, h/2, ...]
    return split.transpose(1, 2).reshape(tensor.shape)


def fields(config: Mapping[str, Any]) -> Iterator[tuple[str, int, int | float | str]]:
    """What llama.cpp is told: name, type, value."""
    architecture = ARCHITECTURES[config["model_type"]]
    rope: dict[str, Any] = config.get("rope_parameters") or {}
    size = config.get("head_dim") or config["hidden_size"] // query_heads(config)
    yield "general.architecture", STRING, architecture
    yield "general.alignment", UINT32, ALIGNMENT
    yield "tokenizer.ggml.model", STRING, "none"
    for name, value in {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": query_heads(config),
        "attention.head_count_kv": key_heads(config),
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size,
    }.items():
        yield f"{architecture}.{name}", UINT32, int(value)
    yield f"{architecture}.attention.layer_norm_rms_epsilon", REAL32, float(config["rms_norm_eps"])
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    yield f"{architecture}.rope.freq_base", REAL32, float(theta)


def head(out: BinaryIO, metadata: Iterator[tuple[str, int, int | float | str]], entries: list[Entry]) -> None:
    """Write everything before the numbers."""
    told = list(metadata)
    out.write(MAGIC + struct.pack("<IQQ", VERSION, len(entries), len(told)))
    for name, kind, value in told:
        out.write(text(name) + struct.pack("<I", kind))
        out.write(text(str(value)) if kind == STRING else struct.pack("<I" if kind == UINT32 else "<f", value))
    offset = 0
    for entry in entries:
        lengths = entry.shape[::-1]  # the fastest first
        out.write(text(entry.name) + struct.pack(f"<I{len(lengths)}QIQ", len(lengths), *lengths, entry.kind, offset))
        offset += -(-entry.nbytes // ALIGNMENT) * ALIGNMENT


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def pad(out: BinaryIO) -> None:
    out.write(bytes(-out.tell() % ALIGNMENT))


def raw(tensor: Tensor, kind: int) -> bytes:
    if kind == FLOAT32:
        return tensor.float().contiguous().numpy().tobytes()
    return tensor.bfloat16().contiguous().view(torch.int16).numpy().tobytes()
