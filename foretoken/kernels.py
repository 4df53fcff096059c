"""The operators of `cpu/kernels.cpp`, built for this machine once and kept.

`room`, `pack` and `linear` multiply few rows by weights at the speed of memory, `attend` reads a cache of slots by
position, `write` and `move` change it in place. Results do not depend on how many rows or nodes a call has.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from foretoken.errors import UserError

SOURCE = Path(__file__).with_name("cpu") / "kernels.cpp"
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def folder() -> Path:
    """Where what was compiled is kept: $FORETOKEN_CACHE, or .cache/foretoken in the home directory."""
    return Path(os.environ.get("FORETOKEN_CACHE") or Path.home() / ".cache" / "foretoken")


@lru_cache(maxsize=1)
def load_kernels() -> None:
    """Make `torch.ops.foretoken` and `torch.classes.foretoken` available; `UserError` without a compiler.

    The first time takes half a minute.
    """
    path = folder() / "kernels" / f"{fingerprint()}.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            build(path)
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # compiled programs call into it
    torch.ops.load_library(str(path))
    for name, like in SHAPES.items():
        torch.library.register_fake(f"foretoken::{name}", like, allow_override=True)


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """Names a build: the source, the flags, torch, and the processor that it is made for."""
    sources = [path.read_text() for path in sorted(SOURCE.parent.glob("*.*"))]
    parts = [*sources, *FLAGS, torch.__version__, platform.machine(), processor_flags()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def processor_flags() -> str:
    """What the processor can do, as Linux lists it; its name elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def build(path: Path) -> None:
    """Compile the source into `path`."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise UserError(
            "Compiling a step needs the compiler g++ and there is none; install it, or decode without compiling."
        )
    torch_folders = [*(f"-I{p}" for p in include_paths()), *(f"-L{p}" for p in library_paths())]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    part = path.with_suffix(f".{os.getpid()}")
    command = [compiler, *FLAGS, abi, str(SOURCE), "-o", str(part), *torch_folders, "-ltorch_cpu", "-lc10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise UserError(f"{compiler} cannot build the kernels ({why}); set CXX to g++ 11 or newer, or do not compile.")
    part.replace(path)


def room_like(x: Tensor, values: int) -> Tensor:
    """[values]."""
    return x.new_empty(values)


def packed_shape(weights: Sequence[Tensor]) -> tuple[int, ...]:
    """(blocks, cells, outputs of a block, values of a cell) of weights [outputs, inputs], one below the other."""
    dtype, inputs = weights[0].dtype, weights[0].shape[1]
    lanes, pair = (8, 1) if dtype == torch.float64 else (16, 2 if dtype == torch.bfloat16 else 1)
    outputs = sum(len(weight) for weight in weights)
    return -(-outputs // (2 * lanes)), -(-inputs // pair), 2 * lanes, pair


def pack_like(packed: Tensor, weights: list[Tensor]) -> None:
    """Nothing comes out."""


def linear_like(x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """[..., outputs] of x [..., inputs]."""
    return x.new_empty((*x.shape[:-1], outputs))


def attend_like(
    query: Tensor, keys: Tensor, values: Tensor, plan: Tensor, scale: float, cap: float, sinks: Tensor | None
) -> Tensor:
    """[B, N, H, E] of query [B, H, N, D] and values [B, K, S, E]."""
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], values.shape[3]))


def keep_like(x: Tensor) -> Tensor:
    """A copy."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def write_like(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, slot: Tensor) -> None:
    """Nothing comes out."""


def race_like(values: Tensor, temperature: Tensor, key: Tensor, position: Tensor) -> Tensor:
    """[B, N] int64."""
    return torch.empty_like(position)


def move_like(stores: list[Tensor], path: Tensor, length: Tensor, count: Tensor) -> None:
    """Nothing comes out."""


SHAPES = {
    "room": room_like,
    "pack": pack_like,
    "linear": linear_like,
    "attend": attend_like,
    "keep": keep_like,
    "write": write_like,
    "race": race_like,
    "move": move_like,
}
"""What comes out of each operator, for tracing."""

TENSOR, MAYBE, OUT = "AtenTensorHandle", "const AtenTensorHandle*", "AtenTensorHandle*"
CALLED = {
    "linear": (TENSOR, TENSOR, MAYBE, "int64_t", OUT),
    "attend": (TENSOR, TENSOR, TENSOR, TENSOR, "double", "double", MAYBE, OUT),
    "write": (TENSOR, TENSOR, TENSOR, TENSOR, TENSOR, OUT),
    "race": (TENSOR, TENSOR, TENSOR, TENSOR, OUT),
    "keep": (TENSOR, OUT),
}
"""Types of the arguments of the functions that compiled programs call."""


def shims() -> dict[Any, list[str]]:
    """Their declarations, as inductor wants them."""
    ops: Any = torch.ops.foretoken
    return {
        getattr(ops, name).default: [f"AOTITorchError aoti_torch_cpu_{name}({', '.join(types)})"]
        for name, types in CALLED.items()
    }
