"""From what a method made of a group to its rows."""

from collections.abc import Sequence
from typing import Any

from foretoken.bench.cells import Group
from foretoken.bench.engine import Watch
from foretoken.bench.entries import Entry, Ours, Taken
from foretoken.bench.rows import Row
from foretoken.explain import first_difference, gap_at
from foretoken.sampling import Sampling
from foretoken.target import Target


def rows_of(
    entry: Entry, group: Group, taken: Taken, plain: Sequence[list[int]], target: Target, seed: int, **always: Any
) -> list[Row]:
    """A row for each prompt of the group. plain: what plain decoding says; always: run, round and repeat."""
    total = sum(len(tokens) for tokens in taken.tokens)
    always |= entry.describe() | {
        "method": entry.label,
        "task": group.task,
        "temperature": group.temperature,
        "seed": seed,
        "batch": group.batch,
        "group": group.number,
        "seconds": taken.seconds,
        "tokens_per_second": total / taken.seconds,
        "first": taken.first,
    }
    if taken.watch is not None and isinstance(entry, Ours):
        always |= seconds_of(taken.watch) | {"extra_memory": entry.bytes + entry.kept.get(group.batch, 0)}
    found: list[Row] = []
    for i, (prompt, tokens) in enumerate(zip(group.prompts, taken.tokens, strict=True)):
        own = text_of(taken, i) | compared(entry, group, i, tokens, plain[i], target, seed)
        if always["repeat"] == 0:
            own["ids"] = tokens
        else:
            own["drafted"] = None
        found.append(Row(**always, **own, prompt=prompt.id, prompt_tokens=len(prompt.ids), tokens=len(tokens)))
    return found


def compared(
    entry: Entry, group: Group, i: int, tokens: list[int], plain: list[int], target: Target, seed: int
) -> dict[str, Any]:
    """Whether the tokens are plain decoding's, and where not, how close the target's choice was."""
    if group.temperature > 0 and entry.resamples:
        return {"same_as_plain": None}
    place = first_difference(plain, tokens)
    if place is None:
        return {"same_as_plain": True}
    both = [text[place] if place < len(text) else None for text in (plain, tokens)]
    differs: dict[str, Any] = {"position": place, "tokens": both, "gap": None}
    if place < len(plain):
        context = [*group.prompts[i].ids, *plain[:place]]
        sampling = Sampling(temperature=group.temperature, seed=seed)
        differs["gap"] = gap_at(target, context, sampling, group.numbers[i]).gap
    return {"same_as_plain": False, "differs": differs}


def seconds_of(watch: Watch) -> dict[str, Any]:
    """The fields of a row that tell where a group's time went."""
    return {
        "draft": sum(watch.drafts),
        "verify": sum(watch.judges),
        "own": watch.own,
        "steps": len(watch.judges),
        "widths": watch.histogram,
        "read_gb_s": watch.read / sum(watch.judges) / 1e9 if watch.judges else None,
        "peak_memory": watch.peak,
    }


def text_of(taken: Taken, i: int) -> dict[str, Any]:
    """The fields of a row that follow from the text: forwards, and which guesses were accepted."""
    if taken.rows is None:
        forwards, accepted = taken.forwards, taken.accepted or []
        if len(taken.tokens) > 1:
            forwards, accepted = None, []  # a peer tells them of the group
        drafted = None
    else:
        row = taken.rows[i]
        forwards, accepted = row.forwards, row.accepted
        drafted = "".join("01"[guessed] for guessed in row.drafted)
    before = [forwards or 0, *accepted]
    return {
        "forwards": forwards,
        "accepted": accepted,
        "unconditional": [round(n / forwards, 4) for n in accepted] if forwards else [],
        "conditional": [round(n / b, 4) if b else 0.0 for n, b in zip(accepted, before, strict=False)],
        "tokens_per_forward": (len(taken.tokens[i]) - 1) / forwards if forwards else None,
        "drafted": drafted,
    }
