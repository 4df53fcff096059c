"""Documents to tokens: which ids, and which of them are learnt."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from foretoken.errors import UserError
from foretoken.training.records import Completion, Document, Message

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What encloses the assistant's words in templates that mark them."""
SECTION = 1 << 20
"""Characters of a text from which on it is cut for tokenising, which takes a hundred bytes of memory for each."""
BREAK = re.compile(r"\n(?=\S)")
"""Where a text may be cut: no byte-level tokenizer of today has a token across it."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One document's token ids, and which of them are learnt (None: all)."""

    tokens: list[int]
    learn: list[bool] | None = None


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """What two tokenizers share if and only if they read every text alike."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        state: dict[str, Any] = json.loads(backend.to_str())
        state.pop("truncation", None)
        state.pop("padding", None)
    else:
        state = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    return sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]


def sections(text: str) -> Iterator[str]:
    """The text in pieces of about `SECTION` characters, cut at starts of lines."""
    start = 0
    while start < len(text):
        found = BREAK.search(text, start + SECTION)
        end = found.end() if found is not None else len(text)
        yield text[start:end]
        start = end


class Encoder:
    """Reads documents as the target would: texts as prompts are read, chats by the tokenizer's template.

    Texts and completions end with the tokenizer's end token; a chat ends as its template ends it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.fingerprint = tokenizer, fingerprint(tokenizer)
        self.end: int | None = tokenizer.eos_token_id  # pyright: ignore[reportAttributeAccessIssue]
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = Tokenizer.from_str(backend.to_str()) if isinstance(backend, Tokenizer) else None
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()

    def encode(self, documents: Sequence[Document]) -> Iterator[Encoded]:
        """Each document's tokens, in order."""
        short = iter(self.ids([d for d in documents if isinstance(d, str) and len(d) <= SECTION]))
        for document in documents:
            if isinstance(document, str):
                yield Encoded(self.ended(next(short) if len(document) <= SECTION else self.long(document)))
            elif isinstance(document, Completion):
                yield self.completion(document)
            else:
                yield self.chat(document)

    def long(self, text: str) -> list[int]:
        """The tokens of a text of any length, read section by section."""
        first, *rest = sections(text)
        (tokens,) = self.ids([first])
        if self.end is not None and tokens[-1:] == [self.end]:  # of tokenizers that put an end there themselves
            tokens.pop()
        for i in range(0, len(rest), 16):
            for more in self.ids(rest[i : i + 16], special=False):
                tokens += more
        return tokens

    def ids(self, texts: Sequence[str], *, special: bool = True) -> Iterable[list[int]]:
        """The tokens of each text, with those that the tokenizer puts around a text if `special`."""
        if not texts:
            return []
        if self._backend is not None:  # one call for all: it uses every core
            return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=special)]
        return [list(self.tokenizer(t, add_special_tokens=special, verbose=False)["input_ids"]) for t in texts]

    def leading(self) -> list[int]:
        """The tokens that the tokenizer puts before every text."""
        (bare,), (whole,) = self.ids(["a"], special=False), self.ids(["a"])
        return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])

    def ended(self, tokens: list[int]) -> list[int]:
        return tokens if self.end is None or tokens[-1:] == [self.end] else [*tokens, self.end]

    def completion(self, document: Completion) -> Encoded:
        """The prompt read alone, as it is when the target answers it, and the completion, which is learnt."""
        prompt, tokens = document.prompt_tokens, document.tokens
        if prompt is None or tokens is None or document.tokenizer != self.fingerprint:
            if isinstance(document.prompt, list):
                return self.chat([*document.prompt, {"role": "assistant", "content": document.completion}])
            prompt, whole = self.ids([document.prompt, document.prompt + document.completion])
            tokens = whole[len(prompt) :]
            if whole[: len(prompt)] != prompt:  # a token lies across the border: the completion starts one of its own
                (tokens,) = self.ids([document.completion], special=False)
            tokens = self.ended(tokens) if document.whole else tokens
        return Encoded([*prompt, *tokens], [False] * len(prompt) + [True] * len(tokens))

    def chat(self, messages: list[Message]) -> Encoded:
        """The conversation in the tokenizer's format; what the assistant said is learnt, ends of its turns included."""
        tokenizer: Any = self.tokenizer
        if getattr(tokenizer, "chat_template", None) is None:
            raise UserError("The tokenizer has no chat template, and chats came; give text, or a model made for chats.")
        if GENERATION.search(tokenizer.get_chat_template()):
            found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            return Encoded(list(found["input_ids"]), [bool(m) for m in found["assistant_masks"]])
        text, said = self.render(messages), self.said(messages)
        if not tokenizer.is_fast:
            raise UserError("The tokenizer cannot say where its tokens begin, and chats came; use a fast tokenizer.")
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        learn = [any(a < end and start < b for start, end in said) for a, b in found["offset_mapping"]]
        return Encoded(list(found["input_ids"]), learn)

    def render(self, messages: list[Message], *, asked: bool = False) -> str:
        """The conversation as text; if `asked`, up to where the assistant is to speak."""
        tokenizer: Any = self.tokenizer
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked))

    def said(self, messages: list[Message]) -> list[tuple[int, int]]:
        """From where to where of the rendered conversation the assistant speaks, by rendering it turn by turn."""
        text, spans = self.render(messages), list[tuple[int, int]]()
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, through = self.render(messages[:i], asked=True), self.render(messages[: i + 1])
            end = len(through.rstrip())
            marker = next((t for t in self.tokenizer.all_special_tokens if through[:end].endswith(t)), None)
            if marker is None:
                end = len(through)  # no token ends the turn, so its last space or line break does
            if not text.startswith(through[:end]):  # the template shows earlier turns differently
                end = text.find(marker, len(before)) + len(marker) if marker else -1
            if not text.startswith(before) or end < len(before):
                raise UserError(
                    f"The chat template rewrites what came before turn {i + 1}, so its words cannot be found; "
                    "use a template with {% generation %} around the assistant's words."
                )
            spans.append((len(before), end))
        return spans
