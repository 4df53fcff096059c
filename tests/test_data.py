"""What training reads: documents of every source, the tokenizer, the packed corpus and its batches."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from foretoken import UserError
from foretoken.noise import MASK64, mix64
from foretoken.objective import IGNORED
from foretoken.training import encode, sources, stdlib, store
from foretoken.training.corpus import Corpus, check_vocabulary
from foretoken.training.encode import Encoded, Encoder
from foretoken.training.records import Completion, Document
from foretoken.training.sources import documents
from foretoken.training.store import Stored, write_tokens
from foretoken.training.tokenizer import END, train_tokenizer
from tests.models import STORIES

TEXT = "def f(x):\n        return x\n\n\nclass A:\n    def g(self):\n        return self.f\n"
SAYINGS = "Hello there. What is it? It is a dog, and the dog is here."
LLAMA = AutoTokenizer.from_pretrained(STORIES)
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LINES = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LAST = "{{ messages | length }}<|im_start|>{{ messages[-1].content }}<|im_end|>"
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A dog.\nIt is here."},
    {"role": "user", "content": "Where is A dog.?"},
    {"role": "assistant", "content": "user"},
]


@lru_cache
def own() -> PreTrainedTokenizerFast:
    """A tokenizer made here."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        return train_tokenizer([TEXT * 5, SAYINGS * 5], 340, Path(folder))


def chatting(template: str) -> Any:
    """That tokenizer with marks of turns and a chat template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=own().backend_tokenizer,
        eos_token=END,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    return path


# --- sources


def test_a_folder_is_its_files_in_order(tmp_path: Path):
    """Each kind of file gives its documents; hidden, empty and binary files give none."""
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "a.py").write_text(" x = 1\n")
    (tmp_path / "b" / "b.txt").write_text("one\n<|endoftext|>\ntwo \n<|endoftext|> \n<|endoftext|>three")
    (tmp_path / "c.txt").write_text("\n whole\n")
    (tmp_path / "d.png").write_bytes(b"\x89PNG\xff\x00")
    (tmp_path / "e.md").write_text(" \n")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    lines(
        tmp_path / "f.jsonl",
        {"text": "t"},
        {"text": ""},
        {"prompt": "p", "completion": "c"},
        {"prompt": "p", "response": ""},
        {"messages": turns},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": turns[:1], "completion": turns[1:]},
        {"prompt": turns, "completion": "c", "finish": "length"},
        {"prompt": "p", "completion": "c", "prompt_tokens": [1], "tokens": [2, 3], "tokenizer": "z"},
    )
    expected: list[Document] = [" x = 1\n", "one", "two", "three", "\n whole\n", "t", Completion("p", "c")]
    expected += [Completion("p", ""), turns, turns, turns, Completion(turns, "c", whole=False)]
    expected += [Completion("p", "c", True, [1], [2, 3], "z")]
    assert list(documents(str(tmp_path), share=0)) == expected
    assert list(documents(str(tmp_path / "**" / "*.txt"), share=0)) == ["one", "two", "three", "\n whole\n"]
    assert list(documents(str(tmp_path / "a.py"), share=0)) == expected[:1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["<|endof", "text|>", "<|endoftext|>", "a", " ", "b\n", "é"]), max_size=12))
def test_a_separator_is_found_wherever_a_chunk_ends(tmp_path_factory: pytest.TempPathFactory, parts: list[str]):
    file = tmp_path_factory.getbasetemp() / "chunks.txt"
    text = "".join(parts)
    file.write_text(text, "utf-8")
    whole = [t.strip() for t in text.split("<|endoftext|>")] if "<|endoftext|>" in text else [text]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK", 3)
        assert list(documents(str(file), share=0)) == [t for t in whole if t.strip()]


def test_a_share_is_held_out_by_content(tmp_path: Path):
    """The splits part the documents; which one a document is in depends on nothing but itself."""
    texts = [f"document {i}" for i in range(3000)]
    file, turned = lines(tmp_path / "a.jsonl", *({"text": t} for t in texts)), tmp_path / "b.jsonl"
    lines(turned, *({"text": t} for t in reversed(texts)))
    train, held = (list(documents(str(file), split=s, share=0.1)) for s in sources.SPLITS)
    assert sorted(map(str, train + held)) == sorted(texts)
    assert abs(len(held) - 300) < 5 * 270**0.5
    assert list(documents(str(turned), split="held_out", share=0.1)) == held[::-1]


def test_the_standard_library_holds_packages_out():
    """No file of a held-out package, no test of one, and no line that only they have, is training data."""
    train, held = (list(documents("stdlib", split=s)) for s in sources.SPLITS)
    assert all(
        len(d) < 500 for d in set(map(str, train)) & set(map(str, held))
    )  # empty packages have a line of comment
    telling = ["class JSONDecoder", "class HTTPConnection:", "class ThreadPoolExecutor", "class LoggerAdapter"]
    telling += ["class BuiltinLevelsTest", "class HeaderTests(", "class WSGIServer(", "class TOMLDecodeError"]
    for line in telling:
        assert any(line in str(d) for d in held), line
        assert not any(line in str(d) for d in train), line
    size = sum(len(str(d).encode()) for d in held) / sum(len(str(d).encode()) for d in train + held)
    assert 0.03 < size < 0.07
    files = stdlib.files()
    assert files == sorted(files)
    assert not any("site-packages" in f.parts or "encodings" in f.parts for f in files)
    assert {f.relative_to(stdlib.root()).parts[0] for f in files if stdlib.held_out(f)} == {*stdlib.HELD_OUT, "test"}


@pytest.mark.filterwarnings("ignore")
def test_datasets_in_folders_are_read(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "other": ["c", "d"]})
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert list(documents(str(tmp_path / "one"), share=0)) == ["a", "b"]
    assert list(documents(f"hf:{tmp_path / 'two'}:test", share=0)) == ["b"]
    assert list(documents(f"hf:{tmp_path / 'two'}:train:other", share=0)) == ["c", "d"]
    lines(tmp_path / "rows.jsonl", {"text": "e"})
    (tmp_path / "three").mkdir()
    (tmp_path / "rows.jsonl").rename(tmp_path / "three" / "train.jsonl")
    assert list(documents(f"hf:{tmp_path / 'three'}", share=0)) == ["e"]
    with pytest.raises(UserError, match=r"three' cannot be read .*Bad split"):
        documents(f"hf:{tmp_path / 'three'}:tset")
    with pytest.raises(UserError, match=r"'tset' is no split of .*; there are test, train: did you mean 'test'"):
        documents(f"hf:{tmp_path / 'two'}:tset")
    with pytest.raises(UserError, match=r"'txt' is no column of .* did you mean 'text'"):
        next(documents(f"hf:{tmp_path / 'two'}:train:txt", share=0))


def test_datasets_are_asked_for_only_when_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the datasets package"):
        documents("hf:a/b")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"text": "a"}\n{"text": ', "data.jsonl', line 2 is no JSON"),
        ("[1]\n", 'data.jsonl\', line 1 has no "text"'),
        ('{"prompt": "a"}\n', "line 1 has no"),
        ('\n{"messages": [{"role": "user"}]}\n', 'line 2 has a turn without "role"'),
        ('{"prompt": "a", "completion": "b", "prompt_tokens": 1, "tokens": [1], "tokenizer": "a"}\n', "no list of num"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, content: str, sentence: str):
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(UserError, match=sentence):
        list(documents(str(tmp_path / "data.jsonl"), share=0))


def test_what_cannot_be_read_is_said(tmp_path: Path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"There is no file '.*nothing'"):
        documents(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"latin.txt' is no UTF-8 text"):
        list(documents(str(tmp_path / "latin.txt")))
    with pytest.raises(UserError, match=r"'heldout' is no split; .* did you mean 'held_out'"):
        documents("stdlib", split="heldout")  # pyright: ignore
    with pytest.raises(UserError, match=r"share is 1\.0"):
        documents(str(tmp_path), share=1.0)
    (tmp_path / "latin.txt").write_text(" \n")
    with pytest.raises(UserError, match="holds no text"):
        Corpus.load(str(tmp_path), own(), cache=tmp_path / "cache")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"has 1 documents and none of them in held_out, with a held-out share of 0\.0"):
        Corpus.load(str(tmp_path), own(), split="held_out", share=0.0, cache=tmp_path / "cache")
    with pytest.raises(UserError, match=r"cache .* cannot be made"):
        Corpus.load(str(tmp_path), own(), cache=tmp_path / "a.txt" / "b")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


# --- tokenizer


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text(alphabet="ab_1 \n\t\r'<|endoftext>"))
def test_every_text_survives_the_tokenizer(text: str):
    assert own().decode(own()(text)["input_ids"]) == text


def test_indentation_is_a_token():
    tokens = own().tokenize(TEXT)
    assert "ĊĠĠĠĠĠĠĠĠ" in tokens
    assert "return" in tokens
    assert own()("")["input_ids"] == []
    assert own()(END + "a")["input_ids"][0] == own().eos_token_id == own().bos_token_id == 0


def test_a_saved_tokenizer_loads_beside_any_model(tmp_path: Path):
    made = train_tokenizer([TEXT * 5], 300, tmp_path)
    LlamaConfig(vocab_size=300).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, " é 漢字 12345\n\n  x", f"a{END}b"):
        assert loaded(text)["input_ids"] == made(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.eos_token == END
    with pytest.raises(UserError, match="vocabulary of 256"):
        train_tokenizer([TEXT], 256, tmp_path)


# --- batches


def reference(streams: Sequence[Sequence[int]], learn: Sequence[Sequence[bool]], length: int) -> list[list[tuple]]:
    """Per window, (token, document, whether it is learnt) of each place, documents counted over the whole stream."""
    flat = [(t, i, f) for i, (d, m) in enumerate(zip(streams, learn, strict=True)) for t, f in zip(d, m, strict=True)]
    return [flat[i : i + length] for i in range(0, len(flat), length)]


DOCUMENTS = st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=9), min_size=1)


@settings(max_examples=100, deadline=None)
@given(DOCUMENTS, st.integers(1, 12))
def test_windows_are_the_stream_and_labels_stay_in_documents(drawn: list[list[tuple[int, bool]]], length: int):
    streams, learn = [[t for t, _ in d] for d in drawn], [[f for _, f in d] for d in drawn]
    corpus, expected = Corpus.of(streams, learn), reference(streams, learn, length)
    assert corpus.tokens == sum(map(len, streams))
    assert corpus.documents == len(streams)
    rows = [(batch, r) for batch in corpus.in_order(3, length) for r in range(3)]
    for i, (batch, r) in enumerate(rows):
        window = expected[i] if i < len(expected) else []
        n = len(window)
        assert batch.tokens[r, :n].tolist() == [t for t, _, _ in window]
        assert batch.learn[r].tolist() == [f for _, _, f in window] + [False] * (length - n)
        assert batch.document[r].tolist() == [d - window[0][1] for _, d, _ in window] + [-1] * (length - n)
        for offset in range(length + 2):
            labels = batch.labels(offset)[r].tolist()
            for j in range(length):
                inside = j < n and j + offset < n and window[j][1] == window[j + offset][1] and window[j + offset][2]
                assert labels[j] == (window[j + offset][0] if inside else IGNORED)
    assert len(rows) == -(-len(expected) // 3) * 3


@settings(max_examples=50, deadline=None)
@given(DOCUMENTS, st.integers(1, 12))
def test_unpacked_rows_are_documents(drawn: list[list[tuple[int, bool]]], length: int):
    streams, learn = [[t for t, _ in d] for d in drawn], [[f for _, f in d] for d in drawn]
    corpus = Corpus.of(streams, learn)
    rows = [b for batch in corpus.in_order(2, length, packed=False) for b in zip(*rows_of(batch), strict=True)]
    for i, (tokens, document, flags) in enumerate(rows):
        kept = streams[i][:length] if i < len(streams) else []
        rest = length - len(kept)
        assert tokens == kept + [0] * rest
        assert document == [0] * len(kept) + [-1] * rest
        assert flags == (learn[i][:length] if kept else []) + [False] * rest


def rows_of(batch: Any) -> tuple[list, list, list]:
    return batch.tokens.tolist(), batch.document.tolist(), batch.learn.tolist()


COUNTING = Corpus.of([list(range(i, i + 7)) for i in range(0, 700, 7)])
"""Token i is i: 700 tokens, windows of 16 start at multiples of it, and there are 44."""


@pytest.mark.parametrize("batch", [1, 4, 7, 60])
def test_an_epoch_is_every_window_once(batch: int):
    """However steps and epochs lie to each other; every epoch and every seed has an order of its own."""
    n = COUNTING.windows(16)
    assert n == 44

    def starts(seed: int) -> list[int]:
        steps = range(-(-3 * n // batch))
        return [t for s in steps for t in COUNTING.batch(s, batch, 16, seed=seed).tokens[:, 0].tolist()][: 3 * n]

    taken, other = starts(5), starts(6)
    epochs = [taken[i : i + n] for i in range(0, 3 * n, n)]
    for epoch in epochs:
        assert sorted(epoch) == [16 * i for i in range(n)]
    assert len({tuple(e) for e in [*epochs, other[:n], sorted(epochs[0])]}) == 5


def test_the_order_never_changes():
    """A run must resume with other versions of everything: windows sorted by a hash of epoch, seed and number."""
    first = COUNTING.batch(0, 8, 16, seed=1).tokens[:, 0].tolist()
    later = COUNTING.batch(11, 4, 16, seed=2).tokens[:, 0].tolist()
    assert first == [496, 576, 352, 32, 464, 640, 80, 240]
    assert later == [192, 512, 544, 336]
    for seed in (0, -1, 1 << 40):
        key = mix64(mix64(seed & MASK64) + 1)
        expected = sorted(range(44), key=lambda i: mix64(i ^ key))
        assert COUNTING.batch(11, 4, 16, seed=seed).tokens[:, 0].tolist() == [16 * i for i in expected[:4]]


def test_orders_are_uniform():
    """Over 2,000 seeds every window is first, and follows every other, about equally often (5 sigma)."""
    corpus, n = Corpus.of([list(range(5))]), 2000
    firsts = [tuple(corpus.batch(0, 2, 1, seed=s).tokens[:, 0].tolist()) for s in range(n)]
    counts = np.unique(np.array(firsts), axis=0, return_counts=True)[1]
    assert len(counts) == 20
    assert np.abs(counts - n / 20).max() < 5 * (n / 20) ** 0.5


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("packed", [True, False])
def test_processes_share_the_batch_of_one(world: int, packed: bool):
    for step in (0, 3, 12):
        whole = COUNTING.batch(step, 8, 5, seed=3, packed=packed)
        parts = [COUNTING.batch(step, 8, 5, seed=3, packed=packed, rank=r, world=world) for r in range(world)]
        for name in ("tokens", "document", "learn"):
            assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
    together = zip(*(COUNTING.in_order(8, 16, rank=r, world=world) for r in range(world)), strict=True)
    for whole, parts in zip(COUNTING.in_order(8, 16), together, strict=True):
        assert torch.equal(torch.cat([p.document for p in parts]), whole.document)
        assert torch.equal(torch.cat([p.tokens for p in parts]), whole.tokens)
    with pytest.raises(UserError, match="3 processes cannot share a batch of 8"):
        COUNTING.batch(0, 8, 16, world=3)


def test_a_corpus_too_small_is_refused():
    with pytest.raises(UserError, match="has 700 tokens and a row 701"):
        COUNTING.batch(0, 1, 701)
    assert COUNTING.batch(0, 1, 700).tokens[0].tolist() == list(range(700))
    assert next(COUNTING.in_order(1, 701)).document[0, -1] == -1
    with pytest.raises(UserError, match="holds no token"):
        Corpus.of([[], []])


# --- tokens on disk


def test_a_corpus_is_its_documents_end_to_end(tmp_path: Path):
    """As the tokenizer reads each text alone, with its end; from disk as from memory."""
    texts = [TEXT, "a", SAYINGS, "b" * 50]
    file = lines(tmp_path / "a.jsonl", *({"text": t} for t in texts))
    for tokenizer in (own(), LLAMA):
        corpus = Corpus.load(str(file), tokenizer, share=0, cache=tmp_path / "cache")
        expected = [[*tokenizer(t)["input_ids"], tokenizer.eos_token_id] for t in texts]
        assert [corpus.document(i) for i in range(corpus.documents)] == expected
        packed = [t for b in corpus.in_order(2, 9) for t in b.tokens[b.document >= 0].tolist()]
        assert packed == [t for d in expected for t in d]
        assert all(torch.equal(b.learn, b.document >= 0) for b in corpus.in_order(2, 9))


def test_a_prompt_is_read_and_its_completion_learnt(tmp_path: Path):
    """Texts by this tokenizer, ids by the one they came from; no end is taught where the text was cut off."""
    ids = {"prompt_tokens": [1, 5], "tokens": [7, 8]}
    file = lines(
        tmp_path / "a.jsonl",
        {"text": "a dog"},
        {"prompt": "Once upon", "completion": " a time"},
        {"prompt": "Once upon", "completion": " a time", "finish": "length"},
        {"prompt": "Onc", "completion": "e upon"},  # alone, the prompt has other tokens than in front of its completion
        {"prompt": "Once upon", "completion": " a time", **ids, "tokenizer": encode.fingerprint(LLAMA)},
        {"prompt": "Once upon", "completion": " a time", **ids, "tokenizer": "another"},
        {"text": "a dog"},
    )
    prompt, whole = LLAMA("Once upon")["input_ids"], LLAMA("Once upon a time")["input_ids"]
    onc, end = LLAMA("Onc")["input_ids"], LLAMA.eos_token_id
    assert whole[: len(prompt)] == prompt
    assert LLAMA("Once upon")["input_ids"][: len(onc)] != onc
    text = LLAMA("a dog")["input_ids"] + [end]
    expected = [
        ([], text),
        (prompt, [*whole[len(prompt) :], end]),
        (prompt, whole[len(prompt) :]),
        (onc, [*LLAMA("e upon", add_special_tokens=False)["input_ids"], end]),
        ([1, 5], [7, 8]),
        (prompt, [*whole[len(prompt) :], end]),
        ([], text),
    ]
    corpus = Corpus.load(str(file), LLAMA, share=0, cache=tmp_path / "cache")
    for (tokens, _, learn), (read, learnt) in zip(
        (row for b in corpus.in_order(1, 30, packed=False) for row in zip(*rows_of(b), strict=True)),
        expected,
        strict=True,
    ):
        assert tokens[: len(read) + len(learnt)] == read + learnt
        assert learn == [False] * len(read) + [True] * len(learnt) + [False] * (30 - len(read) - len(learnt))


def test_a_long_text_is_read_in_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = (TEXT + "x = 1\n\n\n") * 40
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(encode, "SECTION", 100)
    assert len(list(encode.sections(text))) > 16
    assert "".join(encode.sections(text)) == text
    corpus = Corpus.load(str(tmp_path / "a.txt"), own(), share=0, cache=tmp_path / "cache")
    assert corpus.document(0) == [*own()(text)["input_ids"], 0]
    start, *tokens, end = Corpus.load(str(tmp_path / "a.txt"), LLAMA, share=0, cache=tmp_path / "cache").document(0)
    assert start == LLAMA.bos_token_id
    assert end == LLAMA.eos_token_id
    assert not {start, end} & set(tokens)  # no section has a start or an end of its own


@pytest.mark.parametrize("largest", [65535, 65536])
def test_large_vocabularies_fit(tmp_path: Path, largest: int):
    encoder: Any = SimpleNamespace(
        tokenizer=range(largest + 1), encode=lambda docs: [Encoded([largest, 0], [True, False]) for _ in docs]
    )
    assert write_tokens(tmp_path, ["a", "b"], encoder) == 4
    data = Stored.open(tmp_path)
    assert data.tokens.tolist() == [largest, 0, largest, 0]
    assert data.tokens.itemsize == (2 if largest < 65536 else 4)
    assert data.learn(1, 4).tolist() == [False, True, False]


def test_the_cache_is_used_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Text, time, split, share, tokenizer and template each make it anew; nothing else does."""
    file, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    lines(file, *({"text": f"document {i}"} for i in range(100)))
    read: list[int] = []
    monkeypatch.setattr(store, "write", lambda *a: (read.append(1), write(*a)))  # pyright: ignore

    def load(tokenizer: Any = LLAMA, source: Path = file, **options: Any) -> tuple[int, list[int]]:
        read.clear()
        corpus = Corpus.load(str(source), tokenizer, cache=cache, **options)
        return len(read), corpus.document(0)

    assert [load()[0], load()[0]] == [1, 0]
    monkeypatch.chdir(tmp_path)
    assert load(source=Path("a.jsonl"))[0] == 0
    for options in ({"split": "held_out", "share": 0.3}, {"share": 0.3}, {"tokenizer": own()}):
        assert [load(**options)[0], load(**options)[0]] == [1, 0]
    assert [load(chatting(t))[0] for t in (PLAIN, MARKED, PLAIN)] == [1, 1, 0]
    stat = file.stat()
    file.write_text(file.read_text().replace("document", "tnemucod"))  # of the same size
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    again, tokens = load()
    assert again == 1
    assert "tnemucod" in LLAMA.decode(tokens)


write = store.write


def test_an_error_leaves_no_cache(tmp_path: Path):
    lines(tmp_path / "a.jsonl", {"text": "a"}, {"texts": "b"})
    with pytest.raises(UserError, match="line 2"):
        Corpus.load(str(tmp_path / "a.jsonl"), own(), share=0, cache=tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_kill_leaves_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was written stays aside, and the next run reads everything anew."""
    texts = [f"document {i}" for i in range(9)]
    file, cache = lines(tmp_path / "a.jsonl", *({"text": t} for t in texts)), tmp_path / "cache"
    monkeypatch.setattr(store, "DOCUMENTS", 2)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    if (child := os.fork()) == 0:
        encode, calls = Encoder.encode, list[int]()

        def dying(self: Encoder, documents: Sequence[Document]) -> Any:
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(self, documents)

        signal.alarm(60)
        monkeypatch.setattr(Encoder, "encode", dying)
        Corpus.load(str(file), LLAMA, share=0, cache=cache)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [p.suffix for p in cache.iterdir() if p.is_dir()] == [".partial"]
    corpus = Corpus.load(str(file), LLAMA, share=0, cache=cache)
    assert [LLAMA.decode(corpus.document(i), skip_special_tokens=True) for i in range(9)] == texts
    assert [p.suffix for p in cache.iterdir() if p.is_dir()] == [""]


def test_a_tokenizer_larger_than_the_model_is_refused():
    check_vocabulary(LLAMA, 512)
    with pytest.raises(UserError, match="of id 511 and the model 511 tokens"):
        check_vocabulary(LLAMA, 511)


# --- chats


def learnt(encoder: Encoder, encoded: Encoded) -> tuple[str, list[str]]:
    """The text of all tokens, and those of the runs of learnt ones."""
    runs: list[list[int]] = [[]]
    for token, learn in zip(encoded.tokens, encoded.learn or [], strict=True):
        if learn:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return encoder.tokenizer.decode(encoded.tokens), [encoder.tokenizer.decode(r) for r in runs if r]


@pytest.mark.parametrize("template", [PLAIN, MARKED, THINKING, LINES], ids=["plain", "marked", "thinking", "lines"])
def test_what_the_assistant_said_is_learnt(template: str):
    """Its words and the end of its turn, wherever the same words stand elsewhere, and nothing else."""
    tokenizer = chatting(template)
    encoder = Encoder(tokenizer)
    (encoded,) = encoder.encode([CHAT])
    text, runs = learnt(encoder, encoded)
    assert text == tokenizer.apply_chat_template(CHAT, tokenize=False)
    end, start = ("\n", "") if template == LINES else ("<|im_end|>", "<think></think>" if template == THINKING else "")
    space = " " if template == LINES else ""  # one token with the first letter
    assert runs == [f"{space}A dog.\nIt is here.{end}", f"{start}user{end}"]


WORDS = st.text(alphabet="aAb .\n<|>", min_size=1, max_size=12).map(lambda s: f"x{s}y")
TURNS = st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), WORDS), max_size=6)


@settings(max_examples=60, deadline=None)
@given(TURNS)
def test_masks_of_any_talk_agree(turns: list[tuple[str, str]]):
    """Found by rendering, marked by the template, or read off the roles: all the same."""
    talk = [{"role": "user", "content": "x"}, *({"role": r, "content": c} for r, c in turns)]
    expected = [m["content"] + "<|im_end|>" for m in talk if m["role"] == "assistant"]
    found = [learnt(e, next(e.encode([talk]))) for e in map(Encoder, (plain_chat(), marked_chat()))]
    assert found[0] == found[1]
    assert found[0][1] == expected


@lru_cache
def plain_chat() -> Any:
    return chatting(PLAIN)


@lru_cache
def marked_chat() -> Any:
    return chatting(MARKED)


def test_chats_need_a_template_that_can_be_followed(tmp_path: Path):
    file = lines(tmp_path / "a.jsonl", {"messages": CHAT})
    with pytest.raises(UserError, match="has no chat template, and chats came"):
        Corpus.load(str(file), own(), share=0, cache=tmp_path / "cache")
    with pytest.raises(UserError, match="rewrites what came before turn 3"):
        Corpus.load(str(file), chatting(LAST), share=0, cache=tmp_path / "cache")


def test_a_chat_prompt_completes_as_a_chat():
    """A completion of a chat by another tokenizer is one more turn; by the same one, its ids."""
    encoder = Encoder(plain_chat())
    whole, kept = encoder.encode(
        [Completion(CHAT[:4], "user"), Completion(CHAT[:4], "user", True, [4, 5], [6], encoder.fingerprint)]
    )
    (chat,) = encoder.encode([CHAT])
    assert whole == chat
    assert kept == Encoded([4, 5, 6], [False, False, True])
