"""How each token came: guessed and accepted, or emitted by the target; and which forward brought it."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.segment import Segment, Segments
from rich.style import Style
from transformers import PreTrainedTokenizerBase

from foretoken.generation import Output
from foretoken.text import TextStream, decode

PICTURES: dict[int, int | None] = {
    **{i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"},
    127: 0x2421,
    **dict.fromkeys(range(128, 160), 0xFFFD),
}
DRAFTED, TARGET = Style(color="green"), Style(color="yellow", bold=True)


@dataclass(frozen=True, slots=True)
class Span:
    """Whole characters that became certain together.

    drafted  whether every token of them was guessed
    step     the forward that completed them: 0 is the prompt's
    """

    text: str
    drafted: bool
    step: int


class Spans:
    """The spans of one output, as its tokens come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        self._tokenizer, self._stream = tokenizer, TextStream(tokenizer, (), prompt)
        self._waiting: deque[Span] = deque()
        self._step, self._next, self._guessed = 0, 0, True

    def push(self, tokens: Sequence[int], drafted: Sequence[bool]) -> None:
        """Take the next tokens. A token that was not drafted is the last of its forward."""
        for token, guessed in zip(tokens, drafted, strict=True):
            self._step, self._next = self._next, self._next + (not guessed)
            if decode(self._tokenizer, [token]):  # special tokens are no part of any character
                self._guessed = self._guessed and guessed
            self._stream.push(token)
            self._add(self._stream.ready())

    def finish(self) -> None:
        """Nothing more will come: what is no whole character stays as it is."""
        self._add(self._stream.finish())

    def _add(self, text: str) -> None:
        if text:
            self._waiting.append(Span(text, self._guessed, self._step))
            self._guessed = True

    def take(self, characters: int) -> list[Span]:
        """The next spans, of so many characters together; the text may hold some back or end before they do."""
        taken: list[Span] = []
        while characters > 0 and self._waiting:
            span = self._waiting.popleft()
            if len(span.text) > characters:
                self._waiting.appendleft(Span(span.text[characters:], span.drafted, span.step))
                span = Span(span.text[:characters], span.drafted, span.step)
            characters -= len(span.text)
            taken.append(span)
        return taken


def spans_of(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], output: Output) -> list[Span]:
    """The spans of a finished output; their texts together are its text."""
    spans = Spans(tokenizer, prompt)
    spans.push(output.token_ids, output.drafted)
    spans.finish()
    return spans.take(len(output.text))


def visible(text: str) -> str:
    """`text` with control characters as their pictures: a model must not command a terminal or break a page."""
    return text.translate(PICTURES)


def style_of(span: Span) -> Style:
    """Green if drafted, bold yellow if not; every other forward is underlined."""
    return (DRAFTED if span.drafted else TARGET) + Style(underline=span.step % 2 == 1)


def coloured(spans: Iterable[Span]) -> Segments:
    """The spans for a terminal, not wrapped. Line breaks are not underlined."""
    segments: list[Segment] = []
    for span in spans:
        for i, line in enumerate(visible(span.text).split("\n")):
            if i:
                segments.append(Segment("\n"))
            if line:
                segments.append(Segment(line, style_of(span)))
    return Segments(segments)


def legend() -> Segments:
    """One line that explains the colours."""
    plain = Style(dim=True)
    return Segments(
        [
            Segment("drafted and accepted", DRAFTED),
            Segment("  ", plain),
            Segment("emitted by the target", TARGET),
            Segment("  ", plain),
            Segment("every other forward", Style(dim=True, underline=True)),
            Segment(" is underlined\n", plain),
        ]
    )


def counts(outputs: Sequence[Output]) -> str:
    """Tokens, forwards and time in one line. Seconds are those of the slowest."""
    tokens, forwards = sum(len(o.token_ids) for o in outputs), sum(o.forwards for o in outputs)
    rate = (tokens - len(outputs)) / forwards if forwards else 0.0
    seconds = max(o.seconds for o in outputs)
    return (
        f"{tokens:,} token{'s' * (tokens != 1)}, {forwards:,} forward{'s' * (forwards != 1)}, "
        f"{rate:.2f} tokens per forward, {seconds:.2f} s"
    )
