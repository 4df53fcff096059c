"""Methods ready to decode groups of prompts: this library's on the loaded target, and other programs'."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import get_num_threads

from foretoken.bench.cells import Ask, Group
from foretoken.bench.engine import Watch, decode, extra_parameters, read_per_forward
from foretoken.bench.methods import Method, methods
from foretoken.compiled import CompiledTarget
from foretoken.decode import Request, Row
from foretoken.drafters import make_drafter
from foretoken.errors import UserError, unknown
from foretoken.generation import end_tokens
from foretoken.graphs import GraphedTarget
from foretoken.rules import make_rule
from foretoken.sampling import Sampling
from foretoken.target import Target

if TYPE_CHECKING:
    from foretoken.bench.peers import Worker


@dataclass(frozen=True, slots=True)
class Taken:
    """What one method made of one group, once."""

    tokens: list[list[int]]
    seconds: float
    first: float | None
    rows: list[Row] | None = None
    watch: Watch | None = None
    forwards: int | None = None
    accepted: list[int] | None = None


class Entry(Protocol):
    """A method that can be asked for rows.

    resamples  whether at temperatures above 0 it gives another sample of the same law than plain decoding does
    """

    label: str
    resamples: bool

    def refuses(self, group: Group) -> str | None:
        """Why it cannot decode such a group."""
        ...

    def take(self, group: Group, new: int, audit: bool = False) -> Taken: ...

    def describe(self) -> dict[str, Any]:
        """The fields of its rows that are always the same."""
        ...

    def close(self) -> None: ...


class Ours:
    """A method of this library on the loaded target."""

    def __init__(self, method: Method, target: Target, ask: Ask) -> None:
        self.label, self.method, self.target, self.ask = method.label, method, target, ask
        self.rule = make_rule(method.rule)
        self.resamples = self.rule.samples
        self.drafter = make_drafter(method.drafter, target, dict(method.settings))
        target.settled(self.drafter.needs.features)  # compiled now, not while the first prompt is timed
        self.parameters, self.bytes = extra_parameters(self.drafter, target)
        self.kept: dict[int, int] = {}  # bytes that drafting keeps, by batch size
        self.weights = read_per_forward(target)
        self.ends = [] if ask.ignore_eos else end_tokens(target)

    def refuses(self, group: Group) -> str | None:
        return None

    def take(self, group: Group, new: int, audit: bool = False) -> Taken:
        sampling = Sampling(temperature=group.temperature, seed=self.ask.seed)
        requests = [
            Request(p.ids, sampling, n, new, self.ends) for p, n in zip(group.prompts, group.numbers, strict=True)
        ]
        watch = decode(self.target, self.drafter, self.rule, requests, self.weights, audit=audit)
        if audit:
            self.kept[group.batch] = watch.kept
        return Taken([row.output for row in watch.rows], watch.seconds, watch.first, watch.rows, watch)

    def describe(self) -> dict[str, Any]:
        return {
            "drafter": self.method.drafter,
            "settings": self.method.settings,
            "rule": self.method.rule,
            "exact": self.rule.exact,
            "peer": False,
            "requires": self.method.requires,
            "extra_parameters": self.parameters,
            "compiled": isinstance(self.target, CompiledTarget | GraphedTarget),
        }

    def close(self) -> None:
        pass


class Theirs:
    """A method of another program, in its own process. `most`: tokens of the longest prompt with its answer."""

    resamples = True

    def __init__(self, name: str, ask: Ask, target: Target, most: int) -> None:
        self.label, self.ask = name, ask
        self.worker = started(name, ask, target, most)
        self.ends = [] if ask.ignore_eos else end_tokens(target)

    def refuses(self, group: Group) -> str | None:
        if group.batch > 1 and not self.worker.facts.get("batched", True):
            return f"{self.label} decodes one prompt at a time."
        return None

    def take(self, group: Group, new: int, audit: bool = False) -> Taken:
        ran = self.worker.run(
            [p.ids for p in group.prompts],
            max_new_tokens=new,
            temperature=group.temperature,
            seed=self.ask.seed,
            eos=self.ends,
        )
        return Taken(ran.tokens, ran.seconds, ran.first, forwards=ran.forwards, accepted=ran.accepted)

    def describe(self) -> dict[str, Any]:
        facts = self.worker.facts
        return {
            "drafter": self.label,
            "settings": facts,
            "rule": "its own",
            "exact": bool(facts.get("exact", True)),
            "peer": True,
            "requires": f"{self.label.partition(':')[0]}, a program of its own",
            "extra_parameters": int(str(facts.get("extra_parameters", 0) or 0)),
        }

    def close(self) -> None:
        self.worker.close()


def started(name: str, ask: Ask, target: Target, most: int) -> "Worker":
    """The peer's worker with the first drafter of its kind that it takes; `UserError` as for the first, if none.

    most: see `Theirs`.
    """
    from foretoken.bench.peers import start

    dtype, threads = str(target.dtype).removeprefix("torch."), get_num_threads()
    kind, refusals = name.partition(":")[2], list[UserError]()
    takes = kind in ("draft_model", "eagle")  # vLLM's "mtp" is the model's own
    paths = [m.path for m in methods(ask.drafters) if takes and m.name == kind and m.path]
    for path in paths or [None]:
        try:
            worker = start(
                name, ask.model, dtype=dtype, threads=threads, most=most, batch=max(ask.batches), draft=path, eagle=path
            )
        except UserError as error:
            refusals.append(error)
            continue
        worker.facts |= {"drafter": path} if path else {}
        return worker
    raise refusals[0]


def peer_methods(asked: Sequence[str]) -> list[str]:
    """ "PEER" for every peer asked for and "PEER:METHOD" for all that it has; one method where it was named."""
    if not asked:
        return []
    from foretoken.bench.peers import methods

    found: list[str] = []
    for name in asked:
        peer, _, method = name.partition(":")
        known = methods(peer)
        if method and method not in known:
            raise unknown(f"method of the peer {peer!r}", method, known)
        found += [peer if m == "plain" else f"{peer}:{m}" for m in ([method] if method else known)]
    return list(dict.fromkeys(found))
