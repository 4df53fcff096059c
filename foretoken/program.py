"""What was compiled, on disk and at work: a shared library without weights, and where its inputs come from."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foretoken.kernels import fingerprint, folder, load_kernels, shims
from foretoken.lowering import Source, lower, tensors

Progress = Callable[[str], None]
"""Told the name of each stage of compiling as it begins."""

CHUNK = 4096
"""Values of a fused loop for which one more thread pays."""
STAGES = ("kernels", "tracing", "compiling", "packing weights")


@dataclass(frozen=True, slots=True)
class Loop:
    """How a module runs again on what its last run left, its outputs by number.

    back  (output, argument): which outputs become which arguments
    left  [B] whole numbers, 0 for a row of which nothing is left to do: when that comes to one it is over
    told  whole numbers that each run brings to the host
    kept  outputs [B, n, ...] that are wanted of every run, one behind the other along n
    """

    back: Sequence[tuple[int, int]]
    left: int
    told: int
    kept: Sequence[int]

    def lists(self) -> list[list[int]]:
        """The same as `cpu/program.h` has it."""
        before = dict(self.back)[self.left]
        return [[o for o, _ in self.back], [a for _, a in self.back], list(self.kept), [self.left, self.told, before]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is to be compiled.

    key      everything that the trace depends on
    module   whose weights the program reads
    args     of its forward, as an example: nested lists of tensors
    dynamic  which of their dimensions may change, as torch.export has it
    facts    what is known of its outputs beside their values
    loop     how it is repeated, if it can be
    """

    key: Sequence[object]
    module: nn.Module
    args: tuple[Any, ...]
    dynamic: tuple[Any, ...]
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    loop: Loop | None = None


class Program:
    """A compiled module: call it with the module's arguments, flat. `facts` are its recipe's."""

    def __init__(self, path: Path, inputs: list[Tensor], recipe: Recipe, *, together: bool) -> None:
        """Load what was compiled into `path`. together: its threads stay together for a whole run (`cpu/crew.h`)."""
        classes: Any = torch.classes
        loop = recipe.loop.lists() if recipe.loop else []
        self.library = classes.foretoken.Program(str(path / "program.pt2"), inputs, together, loop)
        self.inputs, self.facts = inputs, recipe.facts

    def __call__(self, *args: Tensor) -> list[Tensor]:
        return self.library.run(args)

    def repeat(self, times: int, *args: Tensor) -> tuple[list[Tensor], list[int]]:
        """Up to `times` runs, each on what the one before it left, as its `Loop` says; no further one after 0.1 s.

        Returns the outputs of the last one, those that are kept of all, and the numbers that each told.
        """
        return self.library.repeat(args, times)

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights and all else that it reads."""
        return sum(x.nbytes for x in self.inputs)


class Trace(Program):
    """A traced module that runs operator by operator: there at once, slower, and the same."""

    def __init__(self, recipe: Recipe) -> None:
        lowered = lower(recipe.module, recipe.args, recipe.dynamic)
        self.inputs, self.graph = tensors(lowered.sources, recipe.module, lowered.constants), lowered.graph
        self.facts, self.loop = recipe.facts, recipe.loop

    def __call__(self, *args: Tensor) -> list[Tensor]:
        return list(self.graph(*self.inputs, *(x.contiguous() for x in args)))

    def repeat(self, times: int, *args: Tensor) -> tuple[list[Tensor], list[int]]:
        assert self.loop is not None
        given, told, runs = list(args), list[int](), list[list[Tensor]]()
        busy = args[dict(self.loop.back)[self.loop.left]].bool()
        while not runs or (len(runs) < times and busy.any() and torch.equal(runs[-1][self.loop.left].bool(), busy)):
            for output, arg in self.loop.back if runs else ():
                given[arg] = runs[-1][output].reshape(given[arg].shape)
            runs.append(self(*given))
            told += runs[-1][self.loop.told].flatten().tolist()
        kept = {n: torch.cat([out[n] for out in runs], 1) for n in self.loop.kept}
        return [kept.get(n, x) for n, x in enumerate(runs[-1])], told


def program(recipe: Recipe, progress: Progress | None = None, *, inductor: bool = True) -> Program:
    """The compiled module of a recipe, from the disk if it was compiled before; without `inductor` its trace."""
    tell: Progress = progress or (lambda stage: None)
    tell(STAGES[0])
    load_kernels()
    if not inductor:
        tell(STAGES[1])
        return Trace(recipe)
    path = kept(recipe, tell)
    tell(STAGES[3])
    known = json.loads((path / "inputs.json").read_text())
    sources = [Source(s["kind"], tuple(s["names"])) for s in known["sources"]]
    inputs = tensors(sources, recipe.module, load_file(path / "constants.safetensors"))
    return Program(path, inputs, recipe, together=known["together"])


def kept(recipe: Recipe, tell: Progress) -> Path:
    """The folder of the compiled module, compiled now if it was not before."""
    path = place(recipe.key)
    path.mkdir(parents=True, exist_ok=True)
    with FileLock(path / "lock"):
        if not is_there(recipe.key):
            compile_into(path, recipe, tell)
    return path


def is_there(key: Sequence[object]) -> bool:
    """Whether a recipe of this key was compiled before."""
    return (place(key) / "inputs.json").exists()


def place(key: Sequence[object]) -> Path:
    """The folder of what is compiled for a recipe of this key: the same for what compiles to the same code."""
    parts = [*key, torch.__version__, torch.get_num_threads(), fingerprint(), own_code()]
    return folder() / "programs" / hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


@lru_cache(maxsize=1)
def own_code() -> str:
    """Names the package's own source: what was traced with another is compiled anew."""
    root = Path(__file__).parent
    files = sorted([*root.glob("*.py"), *(root / "drafters").glob("*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def compile_into(path: Path, recipe: Recipe, tell: Progress) -> None:
    """Trace and compile; `inputs.json` is written last, so what is there is whole."""
    from torch._inductor import aoti_compile_and_package

    tell(STAGES[1])
    lowered = lower(recipe.module, recipe.args, recipe.dynamic)
    given = tensors(lowered.sources, recipe.module, lowered.constants, blank=True)
    leaves, dynamic = flat(recipe.args), flat(recipe.dynamic)
    tell(STAGES[2])
    with torch.no_grad():
        whole = torch.export.export(
            lowered.graph, (*given, *leaves), dynamic_shapes=(*({} for _ in given), *dynamic), strict=False
        )
        settings = {
            "cpp.threads": torch.get_num_threads(),
            "cpp.min_chunk_size": CHUNK,
            "aot_inductor.custom_ops_to_c_shims": shims(),
        }
        aoti_compile_and_package(whole, package_path=str(path / "program.pt2"), inductor_configs=settings)
    save_file({k: v.contiguous() for k, v in lowered.constants.items()}, path / "constants.safetensors")
    known = {"sources": [asdict(s) for s in lowered.sources], "together": lowered.ours}
    (path / "inputs.json").write_text(json.dumps(known))


def flat(nested: Sequence[Any]) -> list[Any]:
    """The leaves of nested lists and tuples, in order."""
    return [leaf for item in nested for leaf in (flat(item) if isinstance(item, list | tuple) else [item])]
