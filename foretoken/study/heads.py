"""How good trained heads are on a text, guess by guess and position by position.

Every prediction that training improves is judged here as training makes it, in one pass over a window. Guess i is of
token t + 1 + i, made from the state at t; the target's own law of that token is read off the text's own tokens. A row
per position t, for as long as the deepest guess is within the window:

    window, document, position, context  where t stands; tokens of the window up to t
    rank                                 per guess, tokens that it puts before the text's (null: not in its vocabulary)
    overlap, agrees, kl                  per guess, beside the target's law: see `foretoken.analysis.heads.Judged`

The same heads on another target, such as a fine-tuned one, say how far it drifted from what they were trained on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from foretoken.analysis.heads import NOWHERE, Guess, judged
from foretoken.drafter import Needs
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.loading import load
from foretoken.machine import Machine
from foretoken.objective import Batch, Stage, predictions
from foretoken.progress import Update, progress
from foretoken.study.asked import Asked, parsed
from foretoken.study.rows import Head, Row, Writer, name_of, short
from foretoken.study.windows import Window, encoder_for, length_for, windows
from foretoken.target import Target
from foretoken.training.corpus import check_vocabulary
from foretoken.training.encode import Encoder
from foretoken.training.recipe import Lora
from foretoken.training.trunk import Trunk

KIND = "heads"
LIMIT = 20_000
"""Tokens of text, if the user does not say."""
DIGITS = 5
"""Of every number in a row."""


@runtime_checkable
class Predicts(Protocol):
    """A drafter with predictions that training can improve."""

    @property
    def needs(self) -> Needs: ...

    def stages(self, batch: Batch) -> Sequence[Stage]: ...


@runtime_checkable
class Mixes(Protocol):
    """A drafter whose heads read mixtures of layers."""

    def mixtures(self) -> list[list[float]] | None: ...


def run(
    model: str,
    drafters: Sequence[str],
    data: str,
    out: Path,
    *,
    on: Sequence[str] = (),
    limit: int = LIMIT,
    length: int = 0,
    dtype: str | None = None,
    device: str | None = None,
) -> list[Path]:
    """Write rows of every drafter on `model`, and on every target in `on`, into folder `out`; the files.

    length  tokens per window; 0: 512, or as many as the model's context holds
    """
    wanted = {asked.label(model): asked for asked in map(parsed, drafters)}
    if len(wanted) < len(drafters):
        raise UserError("Two drafters are called the same; give each once, from folders of different names.")
    target = load(model, dtype=dtype, device=device)
    encoder = encoder_for(target.tokenizer, model)
    check_vocabulary(encoder.tokenizer, target.vocab)
    text = Text(encoder, data, length_for(target.context, length), limit)
    cases = [Case(target, model, label, asked, model) for label, asked in wanted.items()]
    files = [measured(case, text, out) for case in cases]
    sizes = sizes_of(target)
    del cases, target  # one model at a time
    for other in on:
        found = load(other, dtype=dtype, device=device)
        require_alike(sizes, found, model, other)
        files += [measured(Case(found, other, label, asked, model), text, out) for label, asked in wanted.items()]
        del found
    return files


@dataclass(frozen=True, slots=True)
class Text:
    """Which windows are read."""

    encoder: Encoder
    data: str
    length: int
    limit: int


@dataclass(frozen=True, slots=True)
class Case:
    """Heads on a target.

    name   of the target, as the user gave it
    label  of the heads
    model  the one whose heads they are, as the user gave it
    """

    target: Target
    name: str
    label: str
    asked: Asked
    model: str

    @property
    def elsewhere(self) -> bool:
        """Whether the target was given as another one than the heads'."""
        return self.name != self.model

    def drafter(self) -> Predicts:
        """The heads beside the target; `UserError` if they do not fit, or predict nothing over a text."""
        settings = dict(self.asked.settings)
        if self.elsewhere:
            if not self.asked.path:
                raise UserError(
                    f"{self.asked.method} without a path is what each model brings along, and --on takes the same "
                    "heads to another model; name their folder."
                )
            settings["other_target"] = "true"
        made: object = make_drafter(self.asked.drafter, self.target, settings)
        if not isinstance(made, Predicts):
            raise UserError(f"{self.asked.drafter!r} has no trained heads; give drafters that `foretoken train` makes.")
        return made


def sizes_of(target: Target) -> dict[str, Any]:
    """What the targets of the same heads have in common."""
    config = target.config
    return {"vocabulary": target.vocab, "hidden size": config.hidden_size, "number of layers": config.num_hidden_layers}


def require_alike(ours: dict[str, Any], other: Target, model: str, name: str) -> None:
    """`UserError` unless heads of a target of these sizes fit the other one."""
    theirs = sizes_of(other)
    for word, size in ours.items():
        if theirs[word] != size:
            raise UserError(
                f"{name!r} has {word} {theirs[word]} and {model!r} has {size}; give --on models of the same "
                "architecture, such as fine-tuned copies."
            )


def measured(case: Case, text: Text, out: Path) -> Path:
    """Write the rows of one case, or what is missing of them; the file."""
    drafter, trunk = case.drafter(), Trunk(case.target, "frozen", Lora())
    offsets = offsets_of(drafter, case.target)
    settings = {
        "limit": text.limit,
        "length": text.length,
        "dtype": str(case.target.dtype).removeprefix("torch."),
        "tokenizer": text.encoder.fingerprint,
        "drafter": case.label,
        "heads": case.asked.drafter,
        "trained_on": case.asked.trained_on(case.model),
        "elsewhere": case.elsewhere,
        "offsets": offsets,
    }
    parameters = sum(p.numel() for p in case.target.model.parameters())
    label = f"{name_of(case.name)} {case.label}"
    head = Head(KIND, case.name, label, parameters, text.data, settings, Machine.here().as_dict())
    writer = Writer(out, head)
    try:
        if not writer.finished:
            found = windows(text.encoder, text.data, text.length, text.limit, max(offsets) + 1)
            with progress() as update:
                fill(writer, Judge(trunk, drafter, offsets), found, text.limit, update)
    finally:
        writer.close()
    return writer.path


@dataclass(frozen=True, slots=True)
class Judge:
    """What rows are made with."""

    trunk: Trunk
    drafter: Predicts
    offsets: list[int]


def fill(writer: Writer, judge: Judge, text: Iterator[Window], limit: int, update: Update) -> None:
    """Write the rows of every window that has none yet, and the last line."""
    began, done, count = perf_counter(), 0, 0
    for window in text:
        if window.number >= writer.begun:
            writer.write(rows_of(judge, window))
        done, count = done + len(window.tokens), count + 1
        update(f"{writer.path.stem}, tokens", done, max(done, limit))
    writer.end(
        {
            "windows": count,
            "positions": done - count * max(judge.offsets),
            "told": told(judge),
            "mixture": mixture_of(judge.drafter),
            "measured_from_window": writer.begun,
            "seconds": round(perf_counter() - began, 2),
        }
    )


def mixture_of(drafter: object) -> list[list[float]] | None:
    """The weights that its heads give to layers [heads, L + 1], if they mix them."""
    found = drafter.mixtures() if isinstance(drafter, Mixes) else None
    return found and [[short(x, DIGITS) for x in head] for head in found]


def offsets_of(drafter: Predicts, target: Target) -> list[int]:
    """How far ahead its predictions are, nearest first."""
    forest = drafter.stages(batch_of(torch.zeros(1, 2, dtype=torch.int64, device=target.device)))
    return sorted(stage.offset for stage in predictions(forest))


def batch_of(tokens: Tensor) -> Batch:
    """Tokens [1, T] of one document, all of them labels."""
    return Batch(tokens, torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool))


def guessed(forest: Sequence[Stage], given: Tensor) -> list[Guess]:
    """Every prediction of the forest over features [1, T, F] of one window, nearest first."""
    found: list[Guess] = []
    for stage in forest:
        output = stage.run(given)
        if stage.unembed is not None:
            hidden = output if stage.ready is None else stage.ready(output)
            found.append(Guess(stage.offset, hidden[0], stage.unembed))
        found += guessed(stage.then, output)
    return sorted(found, key=lambda guess: guess.offset)


@torch.no_grad()
def told(judge: Judge) -> bool:
    """Whether guesses know the tokens before them: of the same features, other tokens make other guesses.

    Only guesses that know none of them are bounded by the marginal law.
    """
    trunk, length = judge.trunk, max(judge.offsets) + 2
    tokens = torch.arange(length, device=trunk.target.device)[None] % trunk.target.vocab
    features = trunk(tokens, judge.drafter.needs.features, learn=False).features
    one, other = (guessed(judge.drafter.stages(batch_of(t)), features) for t in (tokens, tokens.flip(1)))
    return any(not torch.equal(a.hidden, b.hidden) for a, b in zip(one, other, strict=True))


@torch.no_grad()
def rows_of(judge: Judge, window: Window) -> list[Row]:
    """The rows of one window: the states of all guesses are in memory, T x H each, and one chunk of logits."""
    trunk = judge.trunk
    tokens = torch.tensor([window.tokens], device=trunk.target.device)
    shown = trunk(tokens, judge.drafter.needs.features, learn=False)
    guesses = guessed(judge.drafter.stages(batch_of(tokens)), shown.features)
    found = judged(guesses, shown.final[0], trunk.target.unembed, tokens[0])
    reach = len(window.tokens) - max(judge.offsets)
    columns = {
        name: torch.stack([getattr(one, name)[:reach] for one in found], 1).tolist()
        for name in ("rank", "overlap", "agrees", "kl")
    }
    return [
        {
            "window": window.number,
            "document": window.document,
            "position": window.position + t,
            "context": t + 1,
            "rank": [None if r == NOWHERE else r for r in cast(list[int], columns["rank"][t])],
            "overlap": [short(x, DIGITS) for x in columns["overlap"][t]],
            "agrees": [int(x) for x in columns["agrees"][t]],
            "kl": [short(x, DIGITS) for x in columns["kl"][t]],
        }
        for t in range(reach)
    ]
