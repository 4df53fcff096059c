"""Why two ways of decoding said different things: the first token at which they part, judged as rounding or as a bug.

Equal in exact arithmetic is not bit-equal: a forward over eight tokens rounds differently from one over one, and where
two tokens score almost alike, either may win. A wrong mask or a wrong slot changes logits too; `evidence` tells them
apart.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor

from foretoken.answer import Ask, parsed
from foretoken.decode import Request, Session
from foretoken.drafter import Drafter
from foretoken.drafters import make_drafter, settled
from foretoken.evidence import STEP, Evidence, Gap, Judge, Place, Reading, distance, gap_of
from foretoken.generation import end_tokens, tokenize
from foretoken.rules import Match, Rule, make_rule
from foretoken.sampling import Sampling, Scores
from foretoken.target import Read, Target
from foretoken.text import decode
from foretoken.tree import Accepted, Draft, chain

COLOURS = {
    "same": "green",
    "numerical tie": "yellow",
    "bug": "bold red",
    "another sample": "cyan",
    "lossy": "magenta",
}
"""Every verdict, and how it is shown."""


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Where two outputs part, their common length if one goes on; None if they are equal."""
    for i, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


@torch.inference_mode()
def gap_at(target: Target, tokens: Sequence[int], sampling: Sampling, number: int, *, prompt: int | None = None) -> Gap:
    """The target's two best tokens behind `tokens`, from a cached step of width 1 behind one reading of the others.

    number  of the request: names its noise
    prompt  how many of the tokens are prompt (None: all), which presence and frequency penalties do not count
    """
    cache = target.cache(1, len(tokens), 1)
    if len(tokens) > 1:
        target.read(torch.tensor([tokens[:-1]], device=target.device), [len(tokens) - 1], cache)
    logits = target.judge(chain(torch.tensor([tokens[-1:]], device=target.device)), cache).logits[0, 0]
    count = len(tokens) if prompt is None else prompt
    return gap_of(Judge(target, tokens[:count], tokens[count:], sampling, number).contest(logits))


@dataclass(frozen=True, slots=True)
class Explanation:
    """What became of the comparison.

    verdict     one of `COLOURS`, and the reason in a sentence
    units       in which gaps are given
    place       where the outputs part, counted in emitted tokens; None if nowhere
    a, b        where each run emitted its token there; None if its output had ended
    readings    by name: "a", "b", `STEP`, those of `PLAIN`, `TRUTH`
    difference  of any logit between width 1 and run b
    rounding    the dtype's epsilon times the largest logit
    allowed     distances (largest, rms) from the truth that rounding explains
    """

    model: str
    dtype: str
    rule: str
    temperature: float
    units: str
    verdict: str
    reason: str
    tokens: int
    place: int | None = None
    a: Place | None = None
    b: Place | None = None
    texts: dict[int, str] = field(default_factory=dict[int, str])
    readings: dict[str, Reading] = field(default_factory=dict[str, Reading])
    difference: float | None = None
    rounding: float | None = None
    allowed: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list[str])


class Watched(Target):
    """A target that remembers the logits of its last forward."""

    def __init__(self, target: Target) -> None:
        self.__dict__.update(target.__dict__)
        self.inner, self.logits = target, torch.empty(0)

    def judge(self, draft: Draft, cache: Any, features: Sequence[int] = ()) -> Read:
        return self._kept(self.inner.judge(draft, cache, features))

    def read(self, *args: Any, **kwargs: Any) -> Read:
        return self._kept(self.inner.read(*args, **kwargs))

    def _kept(self, read: Read) -> Read:
        self.logits = read.logits
        return read


class Heard:
    """A rule that remembers the last draft it judged and what it kept."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.name, self.exact, self.samples = rule, rule.name, rule.exact, rule.samples
        self.draft: Draft | None = None
        self.accepted: Accepted | None = None

    def __call__(self, draft: Draft, scores: Scores) -> Accepted:
        self.draft, self.accepted = draft, self.rule(draft, scores)
        return self.accepted


@dataclass(frozen=True, slots=True)
class Run:
    """One of the two ways: a drafter and the rule that judges it."""

    drafter: Drafter
    rule: Rule

    def output(self, target: Target, request: Request) -> list[int]:
        """Everything that it emits."""
        session = Session(target, self.drafter, [request], rule=self.rule)
        session.run()
        return session.rows[0].output

    def watched(self, target: Target, request: Request, place: int) -> tuple[Place, Tensor]:
        """Where it emits the token number `place`, and the logits [V] that decided it."""
        seen, heard = Watched(target), Heard(self.rule)
        session = Session(seen, self.drafter, [request], rule=cast(Rule, heard))
        row, before = session.rows[0], 0
        while row.emitted <= place:
            before = row.emitted
            session.step()
        assert heard.draft is not None and heard.accepted is not None
        depth, count = place - before, int(heard.accepted.count[0])
        path = heard.accepted.path[0, : depth + 1]
        node, first = int(path[-1]), row.forwards == 0
        found = Place(
            token=row.output[place],
            forward=row.forwards,
            width=len(request.tokens) if first else heard.draft.width,
            node=node,
            depth=depth,
            path=heard.draft.tokens[0, path].tolist(),
            guessed=depth < count - 1,
        )
        return found, seen.logits[0, node].clone()


@torch.inference_mode()
def explain(
    target: Target,
    prompt: Sequence[int],
    a: Drafter,
    b: Drafter,
    *,
    sampling: Sampling | None = None,
    rule: Rule | None = None,
    number: int = 0,
    max_new_tokens: int = 128,
    eos: Sequence[int] = (),
) -> Explanation:
    """Why drafter `b` under `rule` says something else behind the prompt than `a` under `match`, if it does."""
    sampling, rule = sampling or Sampling(), rule or Match()
    request = Request(prompt, sampling, number, max_new_tokens, eos)
    ways = {"a": Run(a, Match()), "b": Run(b, rule)}
    said = {name: way.output(target, request) for name, way in ways.items()}
    place = first_difference(said["a"], said["b"])
    common: dict[str, Any] = {
        "model": target.name,
        "dtype": str(target.dtype).removeprefix("torch."),
        "rule": rule.name,
        "temperature": sampling.temperature,
        "units": "logits" if sampling.temperature == 0 else "logits / temperature + noise",
        "tokens": len(said["b"]),
        "place": place,
    }
    if place is None:
        return Explanation(verdict="same", reason=f"All {len(said['a'])} tokens are the same.", **common)
    found = {n: w.watched(target, request, place) for n, w in ways.items() if place < len(said[n])}
    places = {name: where for name, (where, _) in found.items()}
    common |= {**places, "texts": texts(target, places)}
    if len(found) < 2 or any(where.token != said[n][place] for n, where in places.items()):
        why = "A second run of the same decoded something else." if len(found) == 2 else "One output ends before."
        return Explanation(verdict="bug", reason=why, **common)
    evidence = Evidence(target, request, said["a"][:place], found)
    verdict, reason = evidence.verdict(rule)
    return Explanation(
        verdict=verdict,
        reason=reason,
        readings=evidence.readings(),
        difference=distance(evidence.logits["b"], evidence.logits[STEP])[0],
        rounding=torch.finfo(target.dtype).eps * evidence.scale[0],
        allowed=evidence.allowed,
        notes=evidence.notes,
        **common,
    )


def texts(target: Target, places: dict[str, Place]) -> dict[int, str]:
    """The text of every token that is named."""
    known = {token for where in places.values() for token in (where.token, *where.path)}
    return {} if target.tokenizer is None else {token: decode(target.tokenizer, [token]) for token in sorted(known)}


def run(
    model: str,
    prompt: str,
    a: str,
    b: str,
    *,
    settings_a: Sequence[str],
    settings_b: Sequence[str],
    rule: str,
    sampling: dict[str, Any],
    number: int = 0,
    max_new_tokens: int = 128,
    dtype: str | None = None,
    device: str | None = None,
    attention: str | None = None,
    quantize: str | None = None,
    compile: bool = False,
    as_json: bool = False,
) -> str:
    """The verdict, printed with its evidence."""
    given = parsed(settings_a)
    settled(a, given)
    ask = Ask(
        model, b, settings_b, rule, max_new_tokens, (), sampling, dtype, device, attention, quantize, compile, wait=True
    )
    target, drafter = ask.prepare()
    found = explain(
        target,
        tokenize(target, prompt),
        make_drafter(a, target, given),
        drafter,
        sampling=Sampling(**sampling),
        rule=make_rule(rule),
        number=number,
        max_new_tokens=max_new_tokens,
        eos=end_tokens(target),
    )
    if as_json:
        print(json.dumps(finite({"a_drafter": a, "b_drafter": b, **asdict(found)})))
    else:
        render(found, " ".join([a, *settings_a]), " ".join([b, *settings_b]), Console())
    return found.verdict


def finite(value: Any) -> Any:
    """The value with null for the numbers that JSON lacks (a token outside top-p scores minus infinity)."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in cast(dict[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in cast(Sequence[Any], value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(found: Explanation, a: str, b: str, console: Console) -> None:
    """Print an explanation."""
    console.print(
        f"a: {a}, match\nb: {b}, {found.rule}\n{found.model}, {found.dtype}, temperature {found.temperature:g}",
        highlight=False,
        markup=False,
    )
    if found.place is not None:
        console.print(places(found))
    if found.readings:
        console.print(computations(found))
        assert found.difference is not None and found.rounding is not None and found.allowed is not None
        console.print(
            f"Gap and a - b: {found.units}. Largest difference of a logit between width 1 and b: "
            f"{found.difference:.3g}. The dtype's epsilon times the largest logit: {found.rounding:.3g}. Rounding "
            f"explains up to {found.allowed[0]:.3g} (rms {found.allowed[1]:.3g}) from the truth.",
            highlight=False,
        )
    for note in found.notes:
        console.print(note, highlight=False, markup=False)
    console.print(Text.assemble((found.verdict, COLOURS[found.verdict]), ": ", found.reason))


def places(found: Explanation) -> Table:
    """Where each run emitted the first token that differs."""
    table = Table("", "emits", "forward", "width", "depth", "read in that forward, up to the token", highlight=False)
    table.title, table.title_justify = f"They part at token {found.place} of the output (from 0)", "left"
    for name, where in (("a", found.a), ("b", found.b)):
        if where is None:
            table.add_row(name, "nothing: its output had ended")
            continue
        how = f"{where.forward}" if where.forward else "the prompt's"
        path = "" if where.forward == 0 else "".join(found.texts.get(token, f"<{token}>") for token in where.path)
        said = f"{quoted(found, where.token)}{', a guess' if where.guessed else ''}"
        table.add_row(name, said, how, str(where.width), str(where.depth), plainly_shown(path))
    return table


def computations(found: Explanation) -> Table:
    """The logits of both tokens, by every computation of them."""
    table = Table("logits", "width", "first", "second", "gap", "of a", "of b", "a - b", "off, most", "rms")
    for name, reading in found.readings.items():
        off = [f"{x:.2g}" if x is not None else "" for x in (reading.largest, reading.rms)]
        numbers = [f"{x:.4g}" for x in (reading.gap, *reading.logits, reading.lead)]
        tops = [candidate(found, token) for token in (reading.best, reading.second)]
        table.add_row(f"run {name}" if name in ("a", "b") else name, str(reading.width), *tops, *numbers, *off)
    return table


def candidate(found: Explanation, token: int) -> str:
    """The run that emitted the token, or its number."""
    emitted = [name for name, where in (("a", found.a), ("b", found.b)) if where is not None and where.token == token]
    return emitted[0] if emitted else str(token)


def quoted(found: Explanation, token: int) -> str:
    """The token's text and number."""
    text = found.texts.get(token)
    return str(token) if text is None else f"{plainly_shown(text)} {token}"


def plainly_shown(text: str) -> str:
    """The text as one line without rich's markup."""
    return escape(repr(text))
