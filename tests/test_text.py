"""Streamed text against the decoding of everything at once: no character split, no stop string shown, nothing lost."""

from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import foretoken
from foretoken.text import UNFINISHED, TextStream, continuation, decode

settings.load_profile("ci")  # the same examples every time, and no deadline on a busy machine

FAMILIES = ["byte fallback", "byte level"]
TRICKY = "aé ß→😀👩‍👩‍👧日本語\n  .,!?xyz"


@lru_cache
def tokenizer(family: str) -> PreTrainedTokenizerBase:
    """Llama's kind, where bytes stand in for characters without a token, and GPT-2's, where tokens are bytes."""
    if family == "byte fallback":
        return AutoTokenizer.from_pretrained(Path(foretoken.__file__).parent / "assets" / "stories260K")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def encoded(family: str, text: str) -> list[int]:
    return tokenizer(family)(text, add_special_tokens=False)["input_ids"]


def special(family: str) -> int:
    return tokenizer(family).all_special_ids[0]


texts = st.text(st.sampled_from(TRICKY), max_size=30) | st.text(st.characters(codec="utf-8"), max_size=12)
texts = texts.filter(lambda t: UNFINISHED not in t)


@pytest.mark.parametrize("family", FAMILIES)
@given(text=texts)
@settings(max_examples=150)
def test_pieces_join_to_the_whole_text_and_end_with_whole_characters(family, text):
    tokens = encoded(family, text)
    stream, shown = TextStream(tokenizer(family)), ""
    for k, token in enumerate(tokens, 1):
        assert stream.push(token) is False
        shown += stream.ready()
        so_far = decode(tokenizer(family), tokens[:k])
        assert UNFINISHED not in shown
        if not so_far.endswith(UNFINISHED):
            assert shown == so_far
    assert shown + stream.finish() == decode(tokenizer(family), tokens)


@pytest.mark.parametrize("family", FAMILIES)
@given(prompt=texts, text=texts)
@settings(max_examples=150)
def test_the_text_behind_a_prompt_is_what_it_adds_to_the_prompts(family, prompt, text):
    """Long runs of bytes in the prompt, of which the last tokens are no whole characters, included."""
    before, tokens = encoded(family, prompt), encoded(family, text)
    known = decode(tokenizer(family), before)
    whole = decode(tokenizer(family), before + tokens)
    stream, shown = TextStream(tokenizer(family), prompt=before), ""
    for token in tokens:
        stream.push(token)
        shown += stream.ready()
        assert UNFINISHED not in shown
    assert shown + stream.finish() == whole[len(known) :]
    assert continuation(tokenizer(family), before, tokens) == whole[len(known) :]


@pytest.mark.parametrize("family", FAMILIES)
@given(parts=st.lists(texts, max_size=4))
def test_special_tokens_inside_show_nothing_and_change_nothing(family, parts):
    tokens = [t for part in parts for t in (*encoded(family, part), special(family))]
    stream = TextStream(tokenizer(family))
    shown = ""
    for token in tokens:
        stream.push(token)
        shown += stream.ready()
    assert shown + stream.finish() == decode(tokenizer(family), tokens)


@given(tokens=st.lists(st.integers(0, 511).filter(lambda t: not 3 <= t < 259), max_size=20))
def test_any_tokens_of_a_byte_fallback_vocabulary_but_bytes_stream_as_they_decode(tokens):
    stream = TextStream(tokenizer("byte fallback"))
    pieces = [stream.ready() for t in tokens if not stream.push(t)]
    assert "".join(pieces) + stream.finish() == decode(tokenizer("byte fallback"), tokens)


@given(tokens=st.lists(st.integers(0, 256), max_size=20))
def test_any_bytes_of_a_byte_level_vocabulary_stream_as_they_decode(tokens):
    """Broken characters too: they come out as the decoder prints them, when it is certain that they are broken."""
    stream = TextStream(tokenizer("byte level"))
    pieces = [stream.ready() for t in tokens if not stream.push(t)]
    assert "".join(pieces) + stream.finish() == decode(tokenizer("byte level"), tokens)


@pytest.mark.parametrize("family", FAMILIES)
@given(text=texts, stop=st.lists(st.text(st.sampled_from(TRICKY), min_size=1, max_size=3), max_size=2), data=st.data())
@settings(max_examples=150)
def test_tokens_pushed_together_are_the_text_of_tokens_pushed_one_by_one(family, text, stop, data):
    """Text without a stop string in it, so that where a group ends does not matter."""
    tokens = encoded(family, text)
    if any(s in decode(tokenizer(family), tokens) for s in stop):
        stop = []
    stream, shown = TextStream(tokenizer(family), stop), ""
    while tokens:
        size = data.draw(st.integers(1, len(tokens)))
        assert stream.push(*tokens[:size]) is False
        shown, tokens = shown + stream.ready(), tokens[size:]
    assert shown + stream.finish() == decode(tokenizer(family), encoded(family, text))


def test_an_unfinished_character_is_shown_at_the_end_only():
    for family in FAMILIES:
        tokens = encoded(family, "a😀")
        stream = TextStream(tokenizer(family))
        for token in tokens[:-1]:
            stream.push(token)
        assert stream.ready() == "a"
        assert stream.finish() == decode(tokenizer(family), tokens[:-1])[1:]
        assert stream.text.startswith("a" + UNFINISHED)


# --------------------------------------------------------------------------------------------------------- stop strings


def stopped_text(family: str, tokens: list[int], stop: list[str]) -> tuple[int | None, str]:
    """The number of tokens after which a stop string is there, None if never; the text before the first one."""
    for k in range(1, len(tokens) + 1):
        known = decode(tokenizer(family), tokens[:k])
        if not known.endswith(UNFINISHED) and (found := [known.find(s) for s in stop if s in known]):
            return k, known[: min(found)]
    return None, decode(tokenizer(family), tokens)


@pytest.mark.parametrize("family", FAMILIES)
@given(
    text=st.text(st.sampled_from("ab é😀"), max_size=25), stop=st.lists(st.text(st.sampled_from("ab é😀"), max_size=5))
)
@settings(max_examples=200)
def test_stop_strings_end_the_text_wherever_they_lie_and_are_never_shown(family, text, stop):
    tokens, stop = encoded(family, text), [s for s in stop if s]
    at, expected = stopped_text(family, tokens, stop)
    stream, shown = TextStream(tokenizer(family), stop), ""
    for k, token in enumerate(tokens, 1):
        ended = stream.push(token)
        shown += stream.ready()
        assert expected.startswith(shown)
        assert ended == (k == at)
        if ended:
            break
        tails = [
            n
            for n in range(len(stream.text) + 1)
            if any(s.startswith(stream.text[len(stream.text) - n :]) for s in stop)
        ]
        assert shown == stream.text[: len(stream.text) - max(tails, default=0)]  # no more is held back than must be
    assert shown + stream.finish() == expected
    assert stream.text == expected


def test_a_beginning_of_a_stop_string_is_held_back_and_released():
    stream, shown = TextStream(tokenizer("byte level"), ["END.", "\n\n"]), []
    for token in encoded("byte level", "xEN END? EN\n"):
        stream.push(token)
        shown.append(stream.ready())
    assert shown == ["x", "", "", "EN ", "", "", "", "END?", " ", "", "", "EN"]
    assert stream.finish() == "\n"


def test_the_first_of_two_stop_strings_in_one_token_cuts():
    """A token may bring several at once; the text ends before the one that starts first, not the one listed first."""
    tokens = encoded("byte fallback", "was")
    assert len(tokens) == 1
    stream = TextStream(tokenizer("byte fallback"), ["s", "a"])
    assert stream.push(tokens[0])
    assert stream.ready() + stream.finish() == "w"


def test_empty_stop_strings_stop_nothing():
    stream = TextStream(tokenizer("byte level"), ["", ""])
    for token in encoded("byte level", "abc"):
        assert not stream.push(token)
    assert stream.ready() == "abc"


def test_stop_strings_are_not_looked_for_in_the_prompt():
    prompt, tokens = encoded("byte level", "abc"), encoded("byte level", "cab")
    stream = TextStream(tokenizer("byte level"), ["cc", "ab"], prompt)
    assert [stream.push(t) for t in tokens] == [False, False, True]
    assert stream.finish() == "c"
