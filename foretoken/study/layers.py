"""What each layer would say: its hidden state through the output head, with the final norm and without.

Figures 2 and 3 of Mehra et al. 2025 (arXiv:2502.09419) are drawn from these rows. The paper does not say in which
direction its divergence is taken, nor whether the final norm is applied, so each row has all four. A row per position,
of the law of the token that follows it, the last position of a window excepted:

    window, document, position  where the last token read stands
    context                     tokens of the window read so far
    token, next                 the one read last, and the one that follows in the text
    entropy                     of the final law, nats
    first, settled              earliest layer whose likeliest token (with the norm) is the final one; earliest from
                                which on it stays so
    normed, raw                 with the final norm and without, each measure of `foretoken.analysis.lens` as a list
                                over layers: 0 is the embedding as the first block reads it, L the last block's output
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from foretoken.analysis.lens import MEASURES, Likeness, first_of, likeness, settled_of
from foretoken.check import TOLERANCE
from foretoken.errors import UserError
from foretoken.loading import load
from foretoken.machine import Machine
from foretoken.progress import progress
from foretoken.study.rows import Head, Row, Writer, name_of, short
from foretoken.study.windows import Window, encoder_for, length_for, windows
from foretoken.target import UNNORMED, Target, norm_of
from foretoken.text import TextStream

KIND = "layers"
LIMIT = 20_000
"""Tokens of text, if the user does not say."""
LOGITS = 1 << 23
"""Logits of one law that are in memory at a time."""
STRIP = 160
"""Tokens whose text is kept, of the first window that has as many, or else of the longest."""
DIGITS = 5
"""Of every number in a row."""


@dataclass(frozen=True, slots=True)
class States:
    """What one window's forward left.

    layers  L + 1 of [T, H]: the embedding, then each block's output, the last one before the final norm
    final   [T, H], what the output head reads
    """

    layers: list[Tensor]
    final: Tensor


def run(
    model: str,
    data: str,
    out: Path,
    *,
    limit: int = LIMIT,
    length: int = 0,
    dtype: str | None = None,
    device: str | None = None,
) -> Path:
    """Write the rows of `model` on `data` into folder `out`, or what is missing of them; the file.

    length  tokens per window; 0: 512, or as many as the model's context holds
    """
    target = load(model, dtype=dtype, device=device)
    length = length_for(target.context, length)
    encoder, layers = encoder_for(target.tokenizer, model), readable(target)
    settings = {
        "limit": limit,
        "length": length,
        "dtype": str(target.dtype).removeprefix("torch."),
        "layers": layers,
        "vocab": target.unembed.vocab,
        "tokenizer": encoder.fingerprint,
    }
    parameters = sum(p.numel() for p in target.model.parameters())
    head = Head(KIND, model, name_of(model), parameters, data, settings, Machine.here().as_dict())
    writer = Writer(out, head)
    try:
        if not writer.finished:
            fill(writer, target, windows(encoder, data, length, limit), head.label, limit)
    finally:
        writer.close()
    return writer.path


def fill(writer: Writer, target: Target, text: Iterator[Window], label: str, limit: int) -> None:
    """Write the rows of every window that has none yet, and the last line."""
    assert target.tokenizer is not None
    began, done, count, shown = perf_counter(), 0, 0, Window(0, 0, 0, [])
    with progress() as update:
        for window in text:
            if len(shown.tokens) < min(len(window.tokens), STRIP + 1):
                shown = window
            if window.number >= writer.begun:
                writer.write(rows_of(target, window))
            done, count = done + len(window.tokens), count + 1
            update(f"{label}, tokens", done, max(done, limit))
    writer.end(
        {
            "windows": count,
            "positions": done - count,
            "strip": {"window": shown.number, "text": pieces(target.tokenizer, shown.tokens[: STRIP + 1])},
            "measured_from_window": writer.begun,
            "seconds": round(perf_counter() - began, 2),
        }
    )


def read(target: Target, tokens: Sequence[int]) -> States:
    """Every layer's hidden states over one window, read at once: T x (L + 1) x H numbers."""
    given = torch.tensor([list(tokens)], device=target.device)
    with target.watched([UNNORMED]) as unnormed:
        out = target.decoder(input_ids=given, output_hidden_states=True, use_cache=False)
    return States([h[0] for h in (*out.hidden_states[:-1], unnormed[0])], out.last_hidden_state[0])


@torch.inference_mode()
def readable(target: Target) -> int:
    """L; `UserError` if the last layer through norm and head is not the model's own law.

    A projection behind the norm, or a scale that `unembed` does not know, would make every figure quietly wrong.
    """
    norm = norm_of(target)[1]
    tokens = [i % target.vocab for i in range(16)]
    states = read(target, tokens)
    normed = norm(states.layers[-1])
    name = type(target.model).__name__
    if normed.shape != states.final.shape or normed.shape[-1] != target.unembed.weight.shape[-1]:
        raise UserError(f"{name} projects its states before its output head, so its layers have no laws; use another.")
    own = target.model(input_ids=torch.tensor([tokens], device=target.device), use_cache=False).logits[0].float()
    apart = float((target.unembed(normed).float() - own).abs().max() / own.std(-1).min())
    if not apart <= TOLERANCE[target.dtype]:
        raise UserError(
            f"The logits of {name} are not its output head on its final norm's output (they differ by {apart:.2g} of "
            "their spread), so its layers' laws would be wrong; use another model."
        )
    return len(states.layers) - 1


@torch.inference_mode()
def rows_of(target: Target, window: Window) -> list[Row]:
    """The rows of one window.

    Positions are taken in chunks of `LOGITS` / V, one layer and lens at a time, so that besides the states
    T x (L + 1) x H no more than some six times `LOGITS` numbers are in memory, whatever T and L.
    """
    states = read(target, window.tokens)
    chunk, last = max(1, LOGITS // target.unembed.vocab), len(window.tokens) - 1
    rows: list[Row] = []
    for start in range(0, last, chunk):
        part = range(start, min(start + chunk, last))
        rows += chunk_rows(target, window, states, part)
    return rows


def chunk_rows(target: Target, window: Window, states: States, part: range) -> list[Row]:
    """The rows of some neighbouring positions of a window."""
    unembed, norm = target.unembed, norm_of(target)[1]
    here = slice(part.start, part.stop)
    following = torch.tensor(window.tokens[part.start + 1 : part.stop + 1], device=target.device)
    final = unembed(states.final[here])
    normed = [likeness(unembed(norm(h[here])), final, following) for h in states.layers]
    raw = [likeness(unembed(h[here]), final, following) for h in states.layers]
    rows: list[Row] = []
    for t, with_norm, without in zip(part, by_position(normed), by_position(raw), strict=True):
        rows.append(
            {
                "window": window.number,
                "document": window.document,
                "position": window.position + t,
                "context": t + 1,
                "token": window.tokens[t],
                "next": window.tokens[t + 1],
                "entropy": with_norm["entropy"][-1],
                "first": first_of(with_norm["agrees"]),
                "settled": settled_of(with_norm["agrees"]),
                "normed": with_norm,
                "raw": without,
            }
        )
    return rows


def by_position(layers: Sequence[Likeness]) -> list[dict[str, list[Any]]]:
    """Per position, each measure as a list over layers, of numbers with `DIGITS` digits."""
    columns: dict[str, list[list[Any]]] = {}
    for name in MEASURES:
        values = torch.stack([getattr(layer, name) for layer in layers], -1)  # [positions, L + 1]
        if not values.isfinite().all():
            raise UserError("A layer's logits are too large for the model's dtype; give --dtype float32.")
        columns[name] = (values.int() if name == "agrees" else values).tolist()
    count = len(columns["rank"])
    return [{name: [short(x, DIGITS) for x in columns[name][i]] for name in MEASURES} for i in range(count)]


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """The text that each token but the first adds; of a special token its name, of part of a character nothing."""
    stream, found = TextStream(tokenizer, (), tokens[:1]), list[str]()
    special = {int(i) for i in tokenizer.all_special_ids}
    for token in tokens[1:]:
        stream.push(token)
        found.append(str(tokenizer.convert_ids_to_tokens(token)) if token in special else stream.ready())
    return found
