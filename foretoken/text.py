"""Text from tokens as they come: no character is split, and stop strings are seen before they are shown."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "�"  # what decoders print for bytes that are no character yet
CONTEXT = 8
"""Fewest tokens of the prompt decoded with the output, because decoders drop the space before a first token."""


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The text of `tokens`, special tokens left out, spaces as they are."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that `tokens` add behind `prompt`."""
    context = end_of(tokenizer, prompt)
    before = decode(tokenizer, context).rstrip(UNFINISHED)
    return decode(tokenizer, [*context, *tokens])[len(before) :]


def end_of(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> list[int]:
    """The prompt's last tokens, from so far back that they have text and start with no part of a character."""
    n = CONTEXT
    while n < len(prompt) and (not (text := decode(tokenizer, prompt[-n:])) or UNFINISHED in text):
        n *= 2
    return list(prompt[-n:])


class TextStream:
    """The text of one row's output, behind its prompt.

    text     all that is certain, cut before the first stop string
    stopped  whether a stop string has come
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        self.tokenizer, self.stop = tokenizer, [s for s in stop if s]
        self.text, self.stopped = "", False
        self._tokens = end_of(tokenizer, prompt)
        self._context, self._read = 0, len(self._tokens)  # what lies between is taken, and decoded again as context
        self._shown = 0

    def push(self, *tokens: int) -> bool:
        """Take more tokens; whether a stop string is now complete."""
        self._tokens += tokens
        window = decode(self.tokenizer, self._tokens[self._context :])
        if not window.endswith(UNFINISHED):
            self._take(window)
        return self.stopped

    def _take(self, window: str) -> None:
        before = decode(self.tokenizer, self._tokens[self._context : self._read]).rstrip(UNFINISHED)
        if len(window) > len(before):  # tokens without text stay: decoders would drop the space behind them too
            self._context = self._read
        self._read = len(self._tokens)
        searched = len(self.text) - max((len(s) for s in self.stop), default=0)
        self.text += window[len(before) :]
        found = [i for s in self.stop if (i := self.text.find(s, max(0, searched))) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def ready(self) -> str:
        """The text not shown yet that cannot become part of a stop string."""
        end = len(self.text)
        if not self.stopped:
            longest = max((len(s) for s in self.stop), default=0)
            for tail in range(min(longest, end), 0, -1):
                if any(s.startswith(self.text[end - tail :]) for s in self.stop):
                    end -= tail
                    break
        piece, self._shown = self.text[self._shown : end], max(self._shown, end)
        return piece

    def finish(self) -> str:
        """The rest of the text, unfinished characters included: nothing more will come."""
        if not self.stopped:
            self._take(decode(self.tokenizer, self._tokens[self._context :]))
        piece, self._shown = self.text[self._shown :], len(self.text)
        return piece
