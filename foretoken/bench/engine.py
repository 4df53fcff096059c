"""Prompts decoded together by our engine, with a clock beside it: where seconds go, what was read, what was held."""

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from foretoken.cache import SlotCache
from foretoken.decode import Request, Row, Session
from foretoken.drafter import Drafter, Feed
from foretoken.generation import decode_all
from foretoken.machine import synchronise
from foretoken.rules import Rule
from foretoken.target import Target
from foretoken.tree import Draft


@dataclass(slots=True)
class Watch:
    """What one group's decoding took, step by step.

    first   seconds to the first token
    drafts  seconds of proposals, for each forward; one that serves several counts the same part for each
    judges  of each forward of the target behind the prompts, or step where a forward is part of a program
    widths  nodes per row of each forward
    read    bytes of weights and cache that those forwards read
    kept    bytes of tensors that drafting keeps beside the target's cache, after the first proposal; if asked for
    peak    most bytes that the process (on a GPU: torch there) held
    """

    rows: list[Row] = field(default_factory=list[Row])
    seconds: float = 0.0
    first: float = 0.0
    drafts: list[float] = field(default_factory=list[float])
    judges: list[float] = field(default_factory=list[float])
    widths: list[int] = field(default_factory=list[int])
    read: int = 0
    kept: int = 0
    peak: int | None = None

    def note(self, draft: Draft, seconds: float, forwards: int) -> None:
        """What was made of a draft in so many forwards."""
        self.judges += forwards * [seconds / forwards]
        self.widths += forwards * [draft.width]
        self.drafts[-1:] = [part / forwards for part in self.drafts[-1:] for _ in range(forwards)]

    @property
    def own(self) -> float:
        """Seconds behind the first token outside proposals and forwards."""
        return self.seconds - self.first - sum(self.drafts) - sum(self.judges)

    @property
    def histogram(self) -> dict[int, int]:
        return dict(sorted(Counter(self.widths).items()))


class Clocked:
    """A drafter whose proposals are timed; `audit`: and its state weighed."""

    def __init__(self, drafter: Drafter, device: torch.device, audit: bool) -> None:
        self.drafter, self.device, self.audit, self.watch = drafter, device, audit, Watch()
        self.began = perf_counter()

    @property
    def needs(self) -> Any:
        return self.drafter.needs

    def start(self, batch: int, capacity: int) -> Any:
        return self.drafter.start(batch, capacity)

    def propose(self, feed: Feed, state: Any) -> Draft:
        clock = perf_counter()
        if not self.watch.drafts:
            self.watch.first = clock - self.began
        draft = self.drafter.propose(feed, state)
        synchronise(self.device)
        self.watch.drafts.append(perf_counter() - clock)
        if self.audit and len(self.watch.drafts) == 1:
            self.watch.kept = held(state, feed.cache)
        return draft


def clocked_target(target: Target, watch: Watch, weights: int) -> Target:
    """The target with its forwards behind the prompts timed (whole steps, if it makes those), and what they read."""

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(draft: Draft, *given: Any, **named: Any) -> Any:
            clock = perf_counter()
            done = work(draft, *given, **named)
            if done is not None:
                synchronise(target.device)
                made = max(done[0].count) if draft.times > 1 and isinstance(done, tuple) else 1
                watch.note(draft, perf_counter() - clock, made)
                watch.read += weights * made
            return done

        return clocked

    twin: Any = copy.copy(target)
    twin.judge, twin.advance = timed(target.judge), timed(target.advance)
    return twin


def decode(
    target: Target, drafter: Drafter, rule: Rule, requests: Sequence[Request], weights: int = 0, *, audit: bool = False
) -> Watch:
    """The requests decoded together, to the end of the longest; a row that ends leaves.

    weights: bytes that a forward reads; audit: weigh the drafter's state as well, which takes time.
    """
    target = target.settled(drafter.needs.features)  # or a session would take another, without the clock
    clocked = Clocked(drafter, target.device, audit)
    twin, watch = clocked_target(target, clocked.watch, weights), clocked.watch

    per_token = 0  # bytes of the cache: the same in every step, as rows leave with their slots
    seen = 0  # forwards

    def on_step(session: Session) -> None:
        nonlocal per_token, seen
        per_token = per_token or session.cache.nbytes // (len(session.rows) * session.capacity)
        made, seen = len(watch.judges) - seen, len(watch.judges)
        watch.read += per_token * tokens_read(session, made)

    restart_peak(target.device)
    clocked.began = began = perf_counter()
    watch.rows = decode_all(twin, clocked, requests, rule, on_step=on_step)
    watch.seconds = perf_counter() - began
    watch.first = watch.first or watch.seconds
    watch.peak = peak(target.device)
    return watch


def tokens_read(session: Session, forwards: int) -> int:
    """Tokens of all rows that so many forwards saw, the last ones made; of several each added one to a row."""
    later = sum(n * (n - 1) // 2 for n in session.last.count) if forwards > 1 else 0
    return forwards * sum(len(row.text) for row in session.rows) - later


def read_per_forward(target: Target) -> int:
    """Bytes of weights that a forward reads: all but an embedding that is no output head as well, of a dense model."""
    embedding: Any = target.model.get_input_embeddings()
    tied = target.unembed.weight.data_ptr() == embedding.weight.data_ptr()
    return sum(p.nbytes for p in target.model.parameters()) - (0 if tied else embedding.weight.nbytes)


def extra_parameters(drafter: Drafter, target: Target) -> tuple[int, int]:
    """(number, bytes) of the drafter's weights that the target does not have."""
    shared = {p.data_ptr() for p in target.model.parameters()}
    own: dict[int, Tensor] = {}
    for part in parts(drafter):
        if isinstance(part, nn.Module):
            own |= {p.data_ptr(): p for p in part.parameters() if p.data_ptr() not in shared}
    return sum(p.numel() for p in own.values()), sum(p.nbytes for p in own.values())


def held(state: object, cache: SlotCache) -> int:
    """Bytes of all tensors in a drafter's run state but the target's `cache`; plain Python objects count nothing."""
    stores: dict[int, int] = {}
    for part in parts(state, {id(cache)}):
        if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
            storage = part.untyped_storage()
            stores[storage.data_ptr()] = storage.nbytes()
    return sum(stores.values())


def parts(thing: object, without: Collection[int] = ()) -> Iterator[object]:
    """`thing` and everything it is made of, each once; modules and tensors are not taken apart.

    without: what is left out, by `id`.
    """
    seen, waiting = set(without), [thing]
    while waiting:
        part = waiting.pop()
        if id(part) in seen or isinstance(part, str | bytes | int | float | type | None):
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, nn.Module | Tensor | torch.device):
            continue
        if isinstance(part, dict):
            waiting += list(part.values())
        elif isinstance(part, list | tuple | set | frozenset):
            waiting += list(part)
        elif is_dataclass(part) and not isinstance(part, type):
            waiting += [getattr(part, f.name) for f in fields(part) if hasattr(part, f.name)]
        waiting += list(getattr(part, "__dict__", {}).values())


def restart_peak(device: torch.device) -> None:
    """From here on `peak` counts anew, where the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark of resident memory


def peak(device: torch.device) -> int | None:
    """Most bytes held since `restart_peak`; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.is_file():
        return getattr(psutil.Process().memory_info(), "peak_wset", None)
    marks = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(marks[0].split()[1]) * 1024 if marks else None
