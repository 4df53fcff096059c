"""The page docs/claims.md."""

# ruff: noqa: RUF001

import textwrap

from foretoken.analysis.claims.article import article, paper
from foretoken.analysis.claims.claim import (
    CORRECT,
    DOCUMENTS,
    HIDDEN,
    IMPRECISE,
    SEVEN,
    VOCAB,
    WRONG,
    Claim,
    llama_parameters,
)
from foretoken.analysis.claims.course import course_costs, course_speed, exercises
from foretoken.analysis.claims.web import answer, drafting, methods
from foretoken.analysis.sizes import FORWARD, TRAINED

INTRODUCTION = f"""\
foretoken began with five documents found on the web. Their claims, checked: what can be computed is computed, the rest
compared with the papers. Acceptance is independent with rate α where nothing else is said; τ, tokens per forward,
counts the token that the target emits behind the accepted guesses, E[A] does not. The 7B model has d = {HIDDEN:,},
V = {VOCAB:,}; Llama-2-7B is the same with its {llama_parameters(SEVEN):,} parameters. An operation is a multiplication
or an addition: {FORWARD} per weight and token forward, {TRAINED} with the backward pass. What stands in [brackets] was
restored where the copies garble a formula, or joins two places.

This page is written by `python -m foretoken.analysis.claims docs/claims.md`; a test compares it. “By” names the
functions of `foretoken.analysis` that compute the value; without one it is a statement, or a measurement with its
source."""


def claims() -> list[Claim]:
    """All of them, document by document."""
    return [*drafting(), *methods(), *answer(), *course_speed(), *course_costs(), *article(), *paper()]


def page() -> str:
    """The text of docs/claims.md."""
    found = claims()
    counts = ", ".join(f"{sum(c.verdict == v for c in found)} {v}" for v in (CORRECT, IMPRECISE, WRONG))
    parts = ["# The claims of five documents, checked", *map(wrapped, INTRODUCTION.split("\n\n"))]
    parts.append(f"{len(found)} claims: {counts}.")
    for number, title in DOCUMENTS.items():
        rows = ["| says | | right | why | by |", "|---|---|---|---|---|"]
        rows += [row(c) for c in found if c.document == number]
        parts += [f"## {number}: {title}", "\n".join(rows)]
    parts.append("## Exercises of document 002")
    parts += [wrapped(f"**{question}** {answer}") for question, answer in exercises()]
    return "\n\n".join(parts) + "\n"


def wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 118, break_long_words=False, break_on_hyphens=False)


def row(c: Claim) -> str:
    by = ", ".join(f"`{name}`" for name in c.by.split(", ") if name)
    verdict = c.verdict if c.verdict == CORRECT else f"**{c.verdict}**"
    cells = ["“" + " ".join(c.says.split()) + "”", verdict, c.right, c.why, by]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
