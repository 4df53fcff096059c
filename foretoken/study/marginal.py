"""`foretoken analyze marginal`: what a next-token model knows of tokens further ahead (arXiv:2502.09419)."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from foretoken.analysis.lens import rank
from foretoken.analysis.marginals import entropy, overlap
from foretoken.errors import UserError, at_least
from foretoken.loading import read_config
from foretoken.machine import Machine
from foretoken.marginal import nucleus
from foretoken.progress import Update, progress
from foretoken.study.futures import Cut, Future, Size, futures, size_for
from foretoken.study.reading import Reader, open_reader
from foretoken.study.rows import Head, Row, Writer, name_of, short
from foretoken.study.windows import Window, encoder_for, length_for, windows
from foretoken.target import model_class_of

SIZES = (0.99, 0.9)
"""Masses whose sets of next tokens are counted (figure 4 of the paper)."""
SHARE = 0.25
"""Of the free memory, where none is given."""
MOST = 1 << 30
"""Bytes, where none are given: more makes nothing faster."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the rows depend on, besides model and text.

    horizon  K, the depth of the furthest law: token x_{t+K}
    top_p    mass of every next-token law along a path
    least    paths of two tokens or more that are less likely are not followed
    every    the position at which laws are taken: each, each second, ...
    limit    tokens of the text
    length   of its windows (0: 512, or the model's context)
    seed     of the continuations that are drawn
    dtype    of the model (None: as saved)
    """

    horizon: int = 2
    top_p: float = 0.99
    least: float = 0.0
    every: int = 1
    limit: int = 20_000
    length: int = 0
    seed: int = 0
    dtype: str | None = None

    def __post_init__(self) -> None:
        at_least("the analysis", horizon=(self.horizon, 2), every=(self.every, 1), limit=(self.limit, 0))
        at_least("the analysis", length=(self.length, 0))
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (exact).")
        if not 0 <= self.least < 1:
            raise UserError(f"least is {self.least}; it is a probability: give 0 (follow every path) or more, below 1.")

    @property
    def cut(self) -> Cut:
        return Cut(self.horizon, self.top_p, self.least)


def run(
    models: Sequence[str], data: str, folder: Path, settings: Settings, memory: float | None, device: str | None
) -> list[str]:
    """Analyse every model, one after the other; notes on what was done differently than asked."""
    notes = list[str]()
    for model in models:
        model_class_of(read_config(model))  # what is no model is refused before the work
    with progress() as update:
        for model in models:
            measure(model, data, folder, settings, memory, device, update, notes)
    return notes


def measure(
    model: str,
    data: str,
    folder: Path,
    settings: Settings,
    memory: float | None,
    device: str | None,
    update: Update,
    notes: list[str],
) -> None:
    """Write the rows of one model. memory: GiB that laws may take (None: a quarter of what is free)."""
    reader = open_reader(model, dtype=settings.dtype, device=device, say=notes.append)
    settings = replace(settings, length=length_for(reader.context, settings.length))
    head = head_of(reader.model, model, data, settings, "sequences" if reader.note else "tree")
    given = min(MOST, SHARE * psutil.virtual_memory().available) if memory is None else memory * 2**30
    size = size_for(reader.vocab, settings.horizon, given)
    encoder = encoder_for(reader.tokenizer, model)
    with closing(Writer(folder, head)) as writer:
        if writer.finished:
            return
        began, positions, leaves, done = perf_counter(), 0, 0, 0
        for window in windows(encoder, data, settings.length, settings.limit, settings.horizon + 1):
            if window.number >= writer.begun:
                rows = list(measured(reader, window, settings, size))
                writer.write(rows)
                positions, leaves = positions + len(rows), leaves + sum(sum(row["leaves"]) for row in rows)
            done += len(window.tokens)
            update(f"{head.label}: tokens of {data}", done, settings.limit or done)
        seconds = perf_counter() - began
        facts = {"positions": positions, "nodes": leaves, "forwards": reader.forwards, "note": reader.note}
        writer.end({"seconds": round(seconds, 3), **facts, "begun": writer.begun})


def head_of(model: PreTrainedModel, name: str, data: str, settings: Settings, reading: str) -> Head:
    """The first line of the rows; `reading`: whether continuations are read as a tree or as sequences."""
    count = sum(p.numel() for p in model.parameters())
    asked = {**asdict(settings), "reading": reading}
    return Head("marginal", name, name_of(name), count, data, asked, Machine.here().as_dict())


def measured(reader: Reader, window: Window, settings: Settings, size: Size) -> Iterator[Row]:
    """The rows of one window."""
    text, K = window.tokens, settings.horizon
    first = -window.position % settings.every
    places = list(range(first, len(text) - K, settings.every))
    seed = settings.seed * 1_000_003 + window.number
    for found in futures(reader, text, places, settings.cut, size, seed):
        truth = [[text[t + k] for t in found.row.tolist()] for k in range(1, K + 1)]
        columns = columns_of(found, found.row.new_tensor(truth))
        for i, t in enumerate(found.row.tolist()):
            where = {"window": window.number, "document": window.document, "position": window.position + t}
            yield {**where, "context": t + 1, **{name: plain(values, i) for name, values in columns.items()}}


def columns_of(found: Future, truth: Tensor) -> dict[str, Tensor]:
    """What is written of a chunk, positions last; truth [K, M] are the text's own tokens.

    Ranks and probabilities begin with depth 1, the model's own next-token law; laws of depth 2 and more are not divided
    by their mass. The last six fields are about guesses i = 1..K - 1 of x_{t+1+i} from the divided marginals, along the
    continuation that was drawn (`analysis.summary.chains`).
    """
    laws = [found.law, *found.total]
    q = list(found.total / found.mass[..., None].clamp(min=1e-30))
    guesses = list(zip(q, found.behind, found.drawn[1:], strict=True))
    best = [law.argmax(-1) for law in q]
    own = [law.argmax(-1) for law in found.behind]
    tops = zip(found.behind, best, strict=True)
    columns = {
        "truth": list(truth),
        "nucleus": [nucleus(found.law, mass).count for mass in SIZES],
        "entropy": entropy(found.law),
        "leaves": list(found.leaves),
        "mass": list(found.mass),
        "rank": [rank(law, token) for law, token in zip(laws, truth, strict=True)],
        "chance": [chance(law, token) for law, token in zip(laws, truth, strict=True)],
        "greedy": [rank(law, token) for law, token in zip(laws, found.greedy, strict=True)],
        "information": found.information,
        "overlap": [overlap(p, q) for q, p, _ in guesses],
        "ratio": [(chance(q, x) / chance(p, x).clamp(min=1e-30)).clamp(max=1) for q, p, x in guesses],
        "top": [chance(p, token) for p, token in tops],
        "hit": [(x == token).long() for x, token in zip(found.drawn[1:], best, strict=True)],
        "peak": [p.amax(-1) for p in found.behind],
        "sure": [(x == token).long() for x, token in zip(found.drawn[1:], own, strict=True)],
    }
    return {k: v if isinstance(v, Tensor) else torch.stack(v) for k, v in columns.items()}


def chance(law: Tensor, token: Tensor) -> Tensor:
    """[n]: the probability of token [n] under law [n, V]."""
    return law.gather(-1, token[:, None])[:, 0]


def plain(values: Tensor, i: int) -> object:
    """Position i's numbers, as JSON takes them."""
    found: list[float] = values[..., i].flatten().tolist()
    numbers = [short(x) for x in found]
    return numbers if values.ndim > 1 else numbers[0]
