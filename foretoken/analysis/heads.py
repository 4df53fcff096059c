"""How good guesses are that a text can judge: every one at every position, teacher-forced.

A guess of offset o at row t is a law q of token t + o, made from the state at t. The target's own law p of that token
stands at row t + o - 1, behind the text's own tokens. So everything here holds given that the tokens before the guess
are the text's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foretoken.analysis.lens import log_law
from foretoken.unembed import Unembedding

BUDGET = 16 * 2**20
"""Bytes of logits in one chunk."""
NOWHERE = -1
"""The rank of a token that is not in the draft vocabulary."""


@dataclass(frozen=True, slots=True)
class Guess:
    """
    offset   row t guesses token t + offset
    hidden   [T, H], as the output head takes it
    unembed  the output head
    """

    offset: int
    hidden: Tensor
    unembed: Unembedding


@dataclass(frozen=True, slots=True)
class Judged:
    """Of one guess, at rows t = 0 ... T - 1 - offset.

    rank     [n] int64, tokens that the guess puts before the text's; `NOWHERE` if it does not know that token
    overlap  [n], sum min(p, q): P(accepted) under rejection sampling (Leviathan et al. 2022, arXiv:2211.17192, theorem
             3.5)
    agrees   [n] bool, whether both laws have the same first token: accepted at temperature 0
    kl       [n], KL(p || q) in nats; of a draft vocabulary: p given that it is in there, as otherwise nothing is finite
    """

    rank: Tensor
    overlap: Tensor
    agrees: Tensor
    kl: Tensor


def judged(guesses: Sequence[Guess], final: Tensor, unembed: Unembedding, tokens: Tensor) -> list[Judged]:
    """Every guess against the text `tokens` [T] and the target, whose output head `unembed` reads `final` [T, H].

    No more than a chunk of logits exists at a time, and the target's are made once for all guesses.
    """
    T, rows = len(tokens), max(1, BUDGET // (4 * unembed.vocab))
    parts: list[list[Judged]] = [[] for _ in guesses]
    for start in range(0, T - 1, rows):
        end = min(start + rows, T - 1)  # row r holds the law of token r + 1, which the last row has none of
        target = log_law(unembed(final[start:end]))
        for found, guess in zip(parts, guesses, strict=True):
            behind = guess.offset - 1
            first = max(start, behind)
            if first < end:
                logits = guess.unembed(guess.hidden[first - behind : end - behind])
                label = tokens[first + 1 : end + 1]
                found.append(compared(target[first - start :], logits, guess.unembed.tokens, label))
    return [joined(found) for found in parts]


def compared(target: Tensor, logits: Tensor, vocabulary: Tensor | None, label: Tensor) -> Judged:
    """Laws q of these logits [n, V'] against the target's log p [n, V] and the tokens [n] that came.

    vocabulary  [V'], the token of each column of the logits (None: all tokens, in order)
    """
    q, p, inside = log_law(logits), target, target
    column = label[:, None]
    if vocabulary is not None:
        p = target[:, vocabulary]
        inside = p - p.logsumexp(-1, keepdim=True)
        place = torch.full((target.shape[1],), NOWHERE, device=label.device)
        place[vocabulary] = torch.arange(len(vocabulary), device=label.device)
        column = place[label][:, None]
    own = q.gather(1, column.clamp(min=0))
    order = torch.arange(q.shape[1], device=q.device)
    before = ((q > own) | ((q == own) & (order < column))).sum(1)  # of equal ones argmax takes the first
    best = q.argmax(-1) if vocabulary is None else vocabulary[q.argmax(-1)]
    return Judged(
        torch.where(column[:, 0] == NOWHERE, NOWHERE, before),
        torch.minimum(p, q).exp().sum(-1),
        best == target.argmax(-1),
        (inside.exp() * (inside - q)).sum(-1),
    )


def joined(parts: Sequence[Judged]) -> Judged:
    """The rows of all parts, in order."""
    return Judged(
        torch.cat([part.rank for part in parts]),
        torch.cat([part.overlap for part in parts]),
        torch.cat([part.agrees for part in parts]),
        torch.cat([part.kl for part in parts]),
    )
