"""A target whose steps are CUDA graphs: what the model, the sampler and the rule launch is launched at once.

A graph is recorded when a batch, width and kind of draft comes for the first time, and replayed from then on; drafts
are padded to few widths and batches to few sizes. A graph reads and writes fixed addresses, so the target owns the
slots and lends them to caches (`arena.py`). Lengths, depths and who sees whom are read on the device. On a processor
the recorded function itself runs: the tests' equality holds for what a GPU replays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from foretoken.advance import Advance, advance, is_plain, told
from foretoken.arena import Arena, Shape
from foretoken.cache import SlotCache
from foretoken.compiled import CompiledTarget, traceable
from foretoken.errors import UserError, unknown
from foretoken.operators import provide
from foretoken.planned import PlannedCache
from foretoken.program import Progress
from foretoken.rules import Rule
from foretoken.sampling import Sampler
from foretoken.step import Step
from foretoken.target import Read, Target
from foretoken.tree import Draft

WARM = 2
"""Runs before a recording: kernels are built, libraries find their workspaces."""
ROOM = 256
"""Capacities are multiples of this, so that caches of like length share slots and graphs."""
FUSED: dict[str, dict[str, Any] | None] = {"": None, "default": {}, "tuned": {"coordinate_descent_tuning": True}}
"""What `inductor` may be, and the options that it stands for."""

Captured = Callable[..., Any]


class Nodes:
    """A draft of fixed size and address: B rows of N nodes, the real ones first."""

    def __init__(self, batch: int, width: int, chained: bool, device: torch.device) -> None:
        with torch.inference_mode(False):
            node = torch.arange(width, device=device)
            seen = node <= node[:, None] if chained else node == node[:, None]
            self.alone = seen.expand(batch, width, width).contiguous()
            self.tokens = torch.zeros(batch, width, dtype=torch.int64, device=device)
            self.draft = Draft(self.tokens, torch.full_like(self.tokens, -1), self.alone.clone(), width - 1, chained)
            self.depth = node.expand(batch, width).contiguous() if chained else torch.zeros_like(self.tokens)
        self.size = (0, 0)

    def fill(self, draft: Draft) -> None:
        """Take over a draft; what is behind it can never be accepted, and of a tree sees only itself."""
        B, N = draft.tokens.shape
        if self.size != (B, N):
            self.tokens.zero_()
            self.draft.parent.fill_(-1)
            self.draft.ancestors.copy_(self.alone)
            self.size = (B, N)
        self.tokens[:B, :N] = draft.tokens
        self.draft.parent[:B, :N] = draft.parent
        if not draft.chained:
            self.draft.ancestors[:B, :N, :N] = draft.ancestors

    def depths(self) -> Tensor:
        """[B, N] int64, computed where the graph is recorded: it follows the tree."""
        return self.depth if self.draft.chained else self.draft.depth


@dataclass(frozen=True, slots=True)
class Work:
    """A recorded function and the nodes that it reads."""

    nodes: Nodes
    run: Captured


class Forward(nn.Module):
    """The model's part of a step: the nodes of a draft behind the committed tokens."""

    def __init__(self, target: Target, features: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.target, self.features = target.model, target, features

    def forward(
        self, tokens: Tensor, depth: Tensor, ancestors: Tensor, length: Tensor, stores: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """(logits,), or (logits, features) if any are asked for."""
        cache: Any = PlannedCache(stores, length, self.target.windows)
        read = self.target.extend(tokens, depth, ancestors, cache, features=self.features)
        return (read.logits,) if read.features is None else (read.logits, read.features)


class GraphedTarget(Target):
    """A target that records its steps. Sessions use it as any other."""

    def __init__(self, target: Target, *, inductor: str = "") -> None:
        """inductor: "" records the model's own kernels, which starts at once; "default" and "tuned" fuse them first.

        Fusing takes torch.compile tens of seconds for each width of draft.
        """
        if inductor not in FUSED:
            raise unknown("way to fuse kernels", inductor, FUSED)
        require_graphs(target)
        self.__dict__.update(target.__dict__)
        provide()
        self.eager, self.inductor = target, inductor
        self.twin = traceable(target, {})
        self.arenas: list[Arena] = []
        self.works: dict[tuple[object, ...], Work] = {}
        self.steps: dict[tuple[object, ...], Captured] = {}
        self.shapes: list[Shape] = []  # of any cache, once one was written to
        self.pool: Any = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def cache(self, batch: int, capacity: int, width: int = 1) -> SlotCache:
        """An empty cache, in slots of graphs if their shape is known; it has room for the padding of drafts."""
        capacity = -(-(capacity + padded(width) - width) // ROOM) * ROOM
        cache = super().cache(batch, capacity, padded(width))
        if self.shapes:
            shapes = [replace(s, size=layer.size) for s, layer in zip(self.shapes, cache.slots, strict=True)]
            self.arena(shapes, cache).seat(cache)
        return cache

    def arena(self, shapes: list[Shape], cache: SlotCache) -> Arena:
        """One that nobody uses, of enough rows; made if there is none."""
        batch = padded(len(cache.lengths))
        for arena in self.arenas:
            if arena.shapes == shapes and arena.batch == batch and arena.serves(cache):
                return arena
        with torch.inference_mode(False):
            try:
                self.arenas.append(Arena(shapes, batch, self.device))
            except UserError:
                self.release()
                self.arenas.append(Arena(shapes, batch, self.device))
        return self.arenas[-1]

    def release(self) -> None:
        """Give back the slots that no cache is using, and their graphs."""
        idle = [a for a in self.arenas if a.holder is None or a.holder() is None]
        self.arenas = [a for a in self.arenas if a not in idle]
        self.works = {key: work for key, work in self.works.items() if key[0] in {id(a) for a in self.arenas}}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def seated(self, draft: Draft, cache: SlotCache) -> Arena | None:
        """The arena that holds the rows of `cache`; None if it is too full for a padded draft, or not written to."""
        shapes = [shape for layer in cache.slots if (shape := Shape.of(layer)) is not None]
        if len(shapes) < len(cache.slots) or cache.longest + padded(draft.width) > cache.capacity:
            return None
        if padded(draft.width) > cache.reserve:
            return None
        held = next((a for a in self.arenas if a.holds(cache)), None)
        if held is None:
            self.shapes, held = shapes, self.arena(shapes, cache)
            held.seat(cache)
        held.follow(cache)
        return held

    def judge(self, draft: Draft, cache: SlotCache, features: Sequence[int] = ()) -> Read:
        """Read a whole draft behind the committed tokens: logits and features, overwritten by the next step."""
        arena = self.seated(draft, cache)
        if arena is None:
            return super().judge(draft, cache, features)
        key, B, N = tuple(features), *draft.tokens.shape
        work = self.work(arena, draft, key, None)
        read = work.run()
        return Read(read.logits[:B, :N], None if read.features is None else read.features[:B, :N])

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

        limits  per row, the most tokens that it may emit
        eos     [B, E] int64, tokens that end each row, padded with -1
        """
        arena = self.seated(draft, cache) if is_plain(sampler, rule) else None
        if arena is None:
            return None
        arena.tell(sampler, limits, eos)
        work = self.work(arena, draft, tuple(features), sampler.sampled)
        arena.tell(sampler, limits, eos)  # again, if a recording came between
        done: Advance = work.run()
        done = done.of(*draft.tokens.shape)
        said = told(done.table.flatten().tolist(), len(limits), draft.width)  # waits for the device
        counts = [row[-2] for row in said]
        cache.lengths = [a + b for a, b in zip(cache.lengths, counts, strict=True)]
        arena.limits = [a - b for a, b in zip(limits, counts, strict=True)]
        return done.step(counts), said

    def work(self, arena: Arena, draft: Draft, features: tuple[int, ...], sampled: bool | None) -> Work:
        """The recorded step for drafts like this one, which it is filled with; `sampled` None: the forward alone."""
        B, N = arena.batch, padded(draft.width)
        ends = None if sampled is None else arena.terms.eos.shape[1]
        key = (id(arena), N, draft.chained, features, sampled, ends)
        work = self.works.get(key)
        if work is None:
            nodes = Nodes(B, N, draft.chained, self.device)
            nodes.fill(draft)
            body = self.body(arena, nodes, features, sampled)
            arena.blank()
            work = self.works[key] = Work(nodes, captured(body, self.device, self.pool))
        work.nodes.fill(draft)
        return work

    def body(self, arena: Arena, nodes: Nodes, features: tuple[int, ...], sampled: bool | None) -> Captured:
        """What is recorded: everything of a step between the draft and the copy to the host."""
        draft, terms, step = nodes.draft, arena.terms, self.step_for(arena, nodes, features)

        def forward() -> Read:
            out = step(nodes.tokens, nodes.depths(), draft.ancestors, arena.length, arena.stores)
            return Read(out[0], out[1] if features else None)

        def whole() -> Advance:
            done = advance(forward(), draft, terms, arena.length, bool(sampled))
            arena.commit(None if draft.chained else done.path, done.count)
            return done

        return forward if sampled is None else whole

    def step_for(self, arena: Arena, nodes: Nodes, features: tuple[int, ...]) -> Captured:
        """The model's part of a step, fused if so asked: once for every size."""
        key = (*arena.shapes, *nodes.tokens.shape, features)
        if key not in self.steps:
            step, options = Forward(self.twin, features).eval(), FUSED[self.inductor]
            args = (nodes.tokens, nodes.depth, nodes.draft.ancestors, arena.length, arena.stores)
            self.steps[key] = step if options is None else fused(step, args, options)
        return self.steps[key]

    def shallow(self, layers: int) -> Target:
        return self.eager.shallow(layers)


def fused(step: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Captured:
    """`step` of arguments shaped like these, traced without a look at Python and compiled."""
    with torch.inference_mode(False), torch.no_grad():
        traced = torch.export.export(step, args, strict=False)
        return torch.compile(traced.module(), fullgraph=True, dynamic=False, options=options)


def captured(body: Captured, device: torch.device, pool: Any) -> Captured:
    """`body`, recorded on a GPU: each call replays it and returns what it returned, at the same addresses."""
    if device.type != "cuda":
        return body
    stream, here = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            body()
    here.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        out = body()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


def padded(n: int) -> int:
    """The power of two from n on: what widths and batches are padded to."""
    return 1 << (n - 1).bit_length()


def require_graphs(target: Target) -> None:
    """`UserError` if the target's step cannot be recorded."""
    model: Any = target.model
    if not model._supports_attention_backend:
        raise UserError(
            f"{type(model).__name__} computes attention by itself, which cannot be recorded as a graph; decode without."
        )
    rope = getattr(target.config, "rope_parameters", None) or {}
    if any(r.get("rope_type") in ("dynamic", "longrope") for r in (rope, *rope.values()) if isinstance(r, dict)):
        raise UserError(
            f"{type(model).__name__} asks how long the text is in every forward, which cannot be recorded as a graph; "
            "decode without."
        )


def quickened(target: Target, *, wait: bool = True, progress: Progress | None = None) -> Target:
    """The target with its step compiled for a processor, or recorded on a GPU; see `CompiledTarget`."""
    if target.device.type == "cuda":
        return GraphedTarget(target)
    return CompiledTarget(target, wait=wait, progress=progress)
