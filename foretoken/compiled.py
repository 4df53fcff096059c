"""A target whose steps are compiled: one program for every batch, width, tree and length.

What the model does to the nodes of a draft is traced with a cache of slots that is written in place and attention by
position (`cpu/kernels.cpp`). A node gets the same bits whatever stands beside it and whatever the tree, even in
bfloat16: drafts change nothing, nor do neighbours where prompts are read by the program too (`CompiledTarget.reads`).
"""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cached_property, lru_cache
from threading import Lock
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from foretoken.advance import Advance, Terms, committed, decided, is_plain, told
from foretoken.attention import NAME
from foretoken.cache import SlotCache
from foretoken.errors import UserError
from foretoken.kernels import DTYPES, processor_flags
from foretoken.noise import Noise
from foretoken.planned import PlannedCache
from foretoken.program import Loop, Program, Progress, Recipe, is_there, place, program
from foretoken.rules import Rule
from foretoken.sampling import Sampler, Scores
from foretoken.step import Step
from foretoken.target import Read, Target
from foretoken.tree import Draft, chain

ops: Any = torch.ops


UNTRACED = ("_name_or_path", "architectures", "dtype", "transformers_version")
"""What a configuration says that no trace depends on: models that differ in it alone share a program."""


TABLE, LENGTH, TOKENS, ROOT, LEFT = 1, 2, 3, 4, 7
"""Outputs of the program by number, of which the host is told the first."""
ARGS = {ROOT: 0, LENGTH: 3, LEFT: 6}
"""Which of them become which arguments when it runs again."""
PIECE = 48
"""Tokens of a prompt that the program reads at once: products are what takes time then, not weights."""


class Raced(Scores):
    """Scores whose emissions the kernels find, without a look at what cannot win."""

    @cached_property
    def emitted(self) -> Tensor:
        """[B, N] int64: what the target says after each node."""
        where = self.position[:, None] + self.draft.depth
        return ops.foretoken.race(self.values, self.temperature.flatten(), self.noise.key, where)


class WholeStep(nn.Module):
    """What is traced: the nodes of a draft behind the committed tokens, what is accepted, and what comes after."""

    def __init__(self, target: Target, features: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.features = target.model, features
        self.target = target

    def forward(
        self,
        tokens: Tensor,
        parent: Tensor,
        ancestors: Tensor,
        length: Tensor,
        terms: list[Tensor],
        stores: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """(logits, table, length, tokens, root, emitted, last, left, features of all nodes, and along the path).

        The features if any are asked for; `length` counts what is committed now, `left` what may still be emitted.
        """
        cache: Any = PlannedCache(stores, length, self.target.windows)
        draft = Draft(tokens, parent, ancestors, 0, False)
        read = self.target.extend(tokens, draft.depth, ancestors, cache, features=self.features)
        given = Terms(*terms)
        scores = Raced(draft, read.logits, given.temperature, Noise(given.key), length + 1, True)
        done = decided(read, draft, given, scores)
        ended = (done.root[:, None] == given.eos).any(1)
        left = torch.where(ended, 0, given.limit - done.count)
        out = read.logits, done.table, length + done.count, done.tokens, done.root, done.emitted, done.last, left
        if read.features is None or done.features is None:
            return out
        return *out, read.features, done.features


class CompiledTarget(Target):
    """A target that compiles its step when a session first needs it."""

    def __init__(
        self, target: Target, *, wait: bool = True, inductor: bool = True, progress: Progress | None = None
    ) -> None:
        """The target, to be compiled.

        wait      compile before the first session; or else sessions decode eagerly until a process of its own, which
                  loads the model from its path and may outlive this one, has put the program on disk
        inductor  fuse what lies between the kernels, which takes half a minute once; or else run the trace
        progress  told each stage of compiling
        """
        require_compilable(target)
        self.__dict__.update(target.__dict__)
        self.eager, self.inductor, self.progress = target, inductor, progress
        self.wait = wait or not inductor or not target.model.name_or_path
        self.programs: dict[tuple[int, ...], Program] = {}
        self.begun: dict[tuple[int, ...], subprocess.Popen[bytes]] = {}
        self.lock = Lock()
        self.plain: dict[int, Terms] = {}

    def settled(self, features: Sequence[int] = ()) -> Target:
        """This target if its program is there (waiting for it, if so asked), else the eager one."""
        key = tuple(features)
        if key not in self.programs and (self.wait or self.ready(key)):
            self.compile(key)
        return self if key in self.programs else self.eager

    def ready(self, features: tuple[int, ...]) -> bool:
        """Whether the program for these features is on disk; if it is not, its compilation has begun."""
        found = is_there(key_of(self.eager, features))
        if not found and features not in self.begun:
            self.begun[features] = in_background(self.eager, features)
        return found

    @property
    def unready(self) -> str | None:
        """Why a session decodes eagerly, in one sentence; None if every program that was asked for is there."""
        for features, process in self.begun.items():
            if features not in self.programs and process.poll():
                said = (place(key_of(self.eager, features)) / "log").read_text().strip().splitlines()
                return f"The step could not be compiled ({(said or ['no message'])[-1].rstrip('.')}); decoded without."
        if any(features not in self.programs for features in self.begun):
            return "The step was still being compiled, which goes on; decoded without. The next run finds it."
        return None

    def compile(self, features: tuple[int, ...]) -> None:
        """Make the program for these features, once."""
        with self.lock:
            if features not in self.programs:
                recipe = recipe_for(self.eager, features)
                self.programs[features] = program(recipe, self.progress, inductor=self.inductor)

    @cached_property
    def sample(self) -> SlotCache:
        """A cache that holds a token: what the slots of each layer look like."""
        cache = self.eager.cache(1, 1)
        self.eager.read(torch.zeros(1, 1, dtype=torch.int64), [1], cache)
        return cache

    @cached_property
    def reads(self) -> bool:
        """Whether prompts are read by the program: where the model's own products of matrices are slow."""
        return self.dtype == torch.bfloat16 and "amx_bf16" not in processor_flags()

    @property
    def chunk(self) -> int:
        return min(PIECE, super().chunk) if self.reads else super().chunk

    def judge(self, draft: Draft, cache: SlotCache, features: Sequence[int] = ()) -> Read:
        """Read a whole draft behind the committed tokens: logits and features at every node.

        Without features any program will do: forwards that are only timed are those that sessions make.
        """
        work = self.programs.get(tuple(features))
        if work is None and not features:
            work = next(iter(self.programs.values()), None)
        if work is None:
            return super().judge(draft, cache, features)
        out = work(*self.given(draft, cache, self.nothing(len(draft.tokens))))
        return Read(out[0], out[-2] if features else None)

    def extend(
        self,
        tokens: Tensor,
        depth: Tensor,
        ancestors: Tensor | None,
        cache: SlotCache,
        *,
        offset: int = 0,
        count: list[int] | None = None,
        at: Sequence[int] | None = None,
        features: Sequence[int] = (),
    ) -> Read:
        """As the model does; a piece of a prompt by the program, if prompts are read by it.

        What stands behind the first `count[b]` tokens of a row is written as well, into slots that are free.
        """
        work = self.programs.get(tuple(features))
        free = cache.longest + tokens.shape[1] <= cache.capacity
        if work is None or ancestors is not None or offset or not free or not self.reads:
            return super().extend(tokens, depth, ancestors, cache, offset=offset, count=count, at=at, features=features)
        if not cache.stores:
            cache.blank(self.sample)
        out = work(*self.given(chain(tokens), cache, self.nothing(len(tokens))))
        return Read(out[0] if at is None else out[0][:, at], out[-2] if features else None)

    def advance(
        self,
        draft: Draft,
        cache: SlotCache,
        sampler: Sampler,
        rule: Rule,
        limits: list[int],
        eos: Tensor,
        features: Sequence[int] = (),
    ) -> tuple[Step, list[list[int]]] | None:
        """A whole step, committed in the cache, and what it told the host; None if it must be made piece by piece.

        Several steps if the draft may be repeated: they count as one, in which every token was committed.
        """
        work = self.programs.get(tuple(features))
        if work is None or not is_plain(sampler, rule):
            return None
        ends = eos if eos.shape[1] else self.nothing(len(limits)).eos
        limit = limits_of(*(min(n, draft.width) for n in limits) if draft.times == 1 else room(draft, cache, limits))
        terms = Terms(sampler.noise.key, sampler.temperature, limit, ends)
        out, numbers = work.repeat(draft.times, *self.given(draft, cache, terms))
        if not draft.chained:
            done = Advance(out[TABLE], None)
            ops.foretoken.move(cache.stores, done.path, cache.length, done.count)
        said = told(numbers, len(limits), draft.width)
        count = [row[-2] for row in said]
        cache.resize([a + b for a, b in zip(cache.lengths, count, strict=True)], out[LENGTH])
        tokens, root, emitted, last = out[TOKENS:LEFT]
        return committed(tokens, out[-1] if features else None, root, emitted, last, count), said

    def repeats(self, sampler: Sampler, rule: Rule) -> bool:
        return is_plain(sampler, rule)

    def given(self, draft: Draft, cache: SlotCache, terms: Terms) -> tuple[Tensor, ...]:
        """The program's arguments for a draft."""
        cache.require_room(draft.width)
        ends = (terms.key, terms.temperature, terms.limit, terms.eos)
        return draft.tokens, draft.parent, draft.ancestors, cache.length, *ends, *cache.stores

    def nothing(self, batch: int) -> Terms:
        """Terms under which nothing is drawn and nothing ends."""
        if batch not in self.plain:
            zeros = torch.zeros(batch, dtype=torch.int64)
            self.plain[batch] = Terms(zeros, torch.zeros(batch, 1, 1), zeros + 1, torch.full((batch, 1), -1))
        return self.plain[batch]

    def shallow(self, layers: int) -> Target:
        return self.eager.shallow(layers)


def room(draft: Draft, cache: SlotCache, limits: list[int]) -> list[int]:
    """Tokens that each row may emit while the draft is repeated: within its limit, and what slots there are."""
    return [min(n, draft.times, cache.capacity - held) for n, held in zip(limits, cache.lengths, strict=True)]


@lru_cache(maxsize=256)
def limits_of(*limits: int) -> Tensor:
    """[B] int64 of them, made once: not to be changed."""
    with torch.inference_mode(False):
        return torch.tensor(limits)


def recipe_for(target: Target, features: tuple[int, ...]) -> Recipe:
    """How the target's step is compiled."""
    twin = traceable(target, {})
    B, N, S = 3, 4, 24  # three rows: for two, two threads would share the rows and not the nodes
    whole = torch.zeros(B, dtype=torch.int64)
    tokens = torch.zeros(B, N, dtype=torch.int64)
    parent = (torch.arange(N) - 1).expand(B, N).contiguous()
    ancestors = torch.ones(N, N, dtype=torch.bool).tril().expand(B, N, N).contiguous()
    terms = [whole, torch.zeros(B, 1, 1), whole + 1, torch.zeros(B, 3, dtype=torch.int64)]
    cache = target.cache(B, S, N)
    with torch.inference_mode(False), torch.no_grad():
        target.read(tokens, [1] * B, cache)
    stores = [torch.zeros_like(s).repeat(1, 1, 2, 1) if s.shape[2] < S else torch.zeros_like(s) for s in cache.stores]
    batch, nodes, ends = Dim("batch"), Dim("nodes"), Dim("ends")
    slots, ring = Dim("slots"), Dim("ring")
    by_layer = [{0: batch, 2: slots if w is None else ring} for w in target.windows for _ in range(2)]
    row, rows = {0: batch}, {0: batch, 1: nodes}
    dynamic = (rows, rows, rows | {2: nodes}, row, [row, row, row, {0: batch, 1: ends}], by_layer)
    args = (tokens, parent, ancestors, whole + 8, terms, stores)
    kept = (TOKENS, 9) if features else (TOKENS,)
    loop = Loop(list(ARGS.items()), LEFT, TABLE, kept)
    return Recipe(key_of(target, features), WholeStep(twin, features).eval(), args, dynamic, loop=loop)


def key_of(target: Target, features: tuple[int, ...]) -> tuple[object, ...]:
    """All that the trace of a step depends on."""
    return ("step", *described(target), features)


def described(target: Target) -> tuple[object, ...]:
    """The model's code and settings, and its weights' shapes and types."""
    given = {k: v for k, v in target.config.to_dict().items() if k not in UNTRACED}
    config = json.dumps(given, sort_keys=True, default=str)
    return type(target.model).__name__, config, held(target.model), transformers.__version__


def held(module: nn.Module) -> list[tuple[object, ...]]:
    """Names, shapes and types of a module's weights."""
    return [(name, tuple(x.shape), x.dtype) for name, x in (*module.named_parameters(), *module.named_buffers())]


def in_background(target: Target, features: tuple[int, ...]) -> "subprocess.Popen[bytes]":
    """A process that compiles the target's step and leaves it on disk, at low priority and beyond the end of this one.

    A thread would share the interpreter with the sessions that decode meanwhile, and abort it if they end first.
    """
    path = place(key_of(target, features))
    path.mkdir(parents=True, exist_ok=True)
    dtype = str(target.dtype).removeprefix("torch.")
    command = [sys.executable, "-m", "foretoken.background", target.name, dtype, *map(str, features)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with (path / "log").open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


def traceable(target: Target, known: dict[int, Any]) -> Target:
    """A copy of the target over the same weights: tracing puts tensors without values into its modules.

    Its attention is ours, and its experts are picked without a look at how many tokens each has. known: what was
    copied, by `id`, as `copy.deepcopy` has it.
    """
    twin = copy.copy(target)
    twin.model = model = unshared(target.model, known)
    model.set_attn_implementation(NAME)
    if any(type(module).__name__.endswith("Experts") for module in model.modules()):
        model.set_experts_implementation("batched_mm")
    return twin


def unshared(module: nn.Module, known: dict[int, Any]) -> Any:
    """A copy of the module over the same weights."""
    known |= {id(x): x for x in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, known)


def require_compilable(target: Target) -> None:
    """`UserError` if the target's step cannot be compiled here."""
    if target.device.type != "cpu":
        raise UserError(f"The model is on {target.device}, and steps are compiled for processors; load it there.")
    if target.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise UserError(f"The model is in {target.dtype}, and steps are compiled in {names}; load it in one of them.")
    if any(is_traceable_wrapper_subclass(weight) for weight in target.model.parameters()):
        raise UserError("The model's weights are quantized, which is not compiled; load them as they were saved.")
    if not target.model._supports_attention_backend:  # pyright: ignore[reportPrivateUsage]
        raise UserError(
            f"{type(target.model).__name__} computes attention by itself, which cannot be compiled; decode it without."
        )
