"""Text in, text out: `generate` for answers, `stream` for text as it comes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from foretoken.decode import Request, Row, Session, capacity_for
from foretoken.drafter import Drafter
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.rules import Rule, make_rule
from foretoken.sampling import Sampling
from foretoken.target import Target
from foretoken.text import continuation

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Output:
    """What became of one prompt.

    text                what comes behind the prompt, special tokens left out, cut before a stop string
    token_ids           emitted tokens, an end token included
    drafted             per token, whether it was guessed before it was emitted
    finish              "eos", "stop" or "length"
    forwards            target forwards after the prompt's
    tokens_per_forward  tokens after the first (which the prompt's forward emits) per forward, bonus tokens included
    accepted_per_depth  per depth from 1, the share of forwards that accepted a guess of that depth (unconditional)
    seconds             from the prompt to the last token, of the batch that the prompt was in
    exact               whether the acceptance rule leaves the target's law unchanged
    logprobs            per token, if asked for: log-probability under the model's own logits, before any processing
    """

    text: str
    token_ids: list[int]
    drafted: list[bool]
    finish: str
    forwards: int
    tokens_per_forward: float
    accepted_per_depth: list[float]
    seconds: float
    exact: bool
    logprobs: list[float] | None


def output_of(row: Row, target: Target, rule: Rule) -> Output:
    """The result of a finished row."""
    forwards, tokens = row.forwards, row.output
    if row.stream is not None and row.stream.stopped:
        text = row.stream.text
    else:
        text = "" if target.tokenizer is None else continuation(target.tokenizer, row.request.tokens, tokens)
    return Output(
        text=text,
        token_ids=tokens,
        drafted=row.drafted,
        finish=row.finish or "length",
        forwards=forwards,
        tokens_per_forward=(len(tokens) - 1) / forwards if forwards else 0.0,
        accepted_per_depth=[n / forwards for n in row.accepted],
        seconds=row.ended - row.began,
        exact=rule.exact,
        logprobs=row.logprobs if row.request.logprobs else None,
    )


def requests_for(
    target: Target,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    numbers: Sequence[int] | None = None,
    max_new_tokens: int = 128,
    stop: Sequence[str] = (),
    eos: Sequence[int] | None = None,
    logprobs: bool = False,
    stream: bool = False,
) -> list[Request]:
    """One request per prompt, numbered from 0 unless `numbers` says otherwise."""
    ends = end_tokens(target) if eos is None else eos
    return [
        Request(
            tokens=tokenize(target, prompt),
            sampling=sampling,
            number=i if numbers is None else numbers[i],
            max_new_tokens=max_new_tokens,
            eos=ends,
            stop=stop,
            logprobs=logprobs,
            stream=stream,
        )
        for i, prompt in enumerate(prompts)
    ]


def tokenize(target: Target, prompt: Prompt) -> list[int]:
    """The prompt's tokens, with the special tokens that the tokenizer puts around a text."""
    if not isinstance(prompt, str):
        return list(prompt)
    if target.tokenizer is None:
        raise UserError(f"{target.name!r} has no tokenizer; give the prompt as token ids.")
    if not prompt:
        raise UserError("The prompt is empty; give at least one character.")
    return list(target.tokenizer(prompt)["input_ids"])


def end_tokens(target: Target) -> list[int]:
    """The tokens that end an output, from the generation configuration or else the model's."""
    found = target.model.generation_config.eos_token_id
    if found is None:
        return []
    return [found] if isinstance(found, int) else list(found)


def decode_all(
    target: Target,
    drafter: Drafter,
    requests: Sequence[Request],
    rule: Rule,
    *,
    batch_size: int | None = None,
    on_step: Callable[[Session], None] | None = None,
    on_read: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Every request's finished row, in order; at most `batch_size` run together, and one that ends makes room."""
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; decode at least 1 prompt at a time.")
    capacity = capacity_for(target, drafter, requests)
    waiting, done = list(range(len(requests))), dict[int, Row]()
    session: Session | None = None
    members: list[int] = []
    while waiting or members:
        room = (batch_size or len(requests)) - len(members)
        if waiting and room > 0:
            entering, waiting = waiting[:room], waiting[room:]
            newcomers = Session(
                target, drafter, [requests[i] for i in entering], rule=rule, capacity=capacity, on_read=on_read
            )
            members += entering
            if session is None:
                session = newcomers
            else:
                session.join(newcomers)
        assert session is not None
        if session.running:
            session.step()
        if on_step is not None:
            on_step(session)
        if len(session.running) < len(members):
            done |= {members[i]: row for i, row in enumerate(session.rows) if row.finish is not None}
            keep = session.running
            members = [members[i] for i in keep]
            if keep:
                session.select(keep)
            else:
                session = None
    return [done[i] for i in range(len(requests))]


def generate(
    target: Target,
    prompts: Prompt | Sequence[Prompt],
    *,
    drafter: str | Drafter = "suffix",
    settings: dict[str, Any] | None = None,
    rule: str | Rule = "match",
    max_new_tokens: int = 128,
    stop: Sequence[str] = (),
    logprobs: bool = False,
    batch_size: int | None = None,
    numbers: Sequence[int] | None = None,
    on_step: Callable[[Session], None] | None = None,
    on_read: Callable[[int, int], None] | None = None,
    **sampling: Any,
) -> Any:
    """An `Output` for one prompt (text or token ids), a list of them for a list of prompts.

    drafter     NAME, NAME:PATH or a built drafter, with its `settings`; "none" is plain decoding
    rule        acceptance rule; every exact one leaves the law unchanged, and "match" every token
    batch_size  rows decoded together (all of them if None)
    numbers     names of the prompts' noise (0, 1, ...): a prompt's sample depends on its number and the seed alone
    on_step     called with the session after each step
    on_read     called with the prompt tokens read so far and their number, after each chunk
    sampling    fields of `Sampling`: temperature, top_k, top_p, min_p, penalties, logit_bias, processors, seed
    """
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    batch: Sequence[Prompt] = [prompts] if single else prompts  # pyright: ignore[reportAssignmentType]
    if not batch:
        raise UserError("There is no prompt; give at least one.")
    method, judge = make_drafter(drafter, target, settings), make_rule(rule)
    requests = requests_for(
        target,
        batch,
        Sampling(**sampling),
        numbers=numbers,
        max_new_tokens=max_new_tokens,
        stop=stop,
        logprobs=logprobs,
    )
    rows = decode_all(target, method, requests, judge, batch_size=batch_size, on_step=on_step, on_read=on_read)
    outputs = [output_of(row, target, judge) for row in rows]
    return outputs[0] if single else outputs


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that has become certain, and the tokens of the step that made it so; the last piece has the `output`."""

    text: str
    token_ids: list[int]
    drafted: list[bool]
    output: Output | None = None


def stream(
    target: Target,
    prompt: Prompt,
    *,
    drafter: str | Drafter = "suffix",
    settings: dict[str, Any] | None = None,
    rule: str | Rule = "match",
    max_new_tokens: int = 128,
    stop: Sequence[str] = (),
    number: int = 0,
    on_read: Callable[[int, int], None] | None = None,
    **sampling: Any,
) -> Iterator[Piece]:
    """The text of one prompt's output as it comes; no piece splits a character or shows part of a stop string."""
    method, judge = make_drafter(drafter, target, settings), make_rule(rule)
    requests = requests_for(
        target,
        [prompt],
        Sampling(**sampling),
        numbers=[number],
        max_new_tokens=max_new_tokens,
        stop=stop,
        stream=True,
    )
    session = Session(target, method, requests, rule=judge, on_read=on_read)
    row = session.rows[0]
    assert row.stream is not None
    shown = 0
    while True:
        tokens, drafted = row.output[shown:], row.drafted[shown:]
        shown += len(tokens)
        if row.finish is not None:
            yield Piece(row.stream.finish(), tokens, drafted, output_of(row, target, judge))
            return
        yield Piece(row.stream.ready(), tokens, drafted)
        session.step()
