"""Training data written by the target: what plain decoding says, resumed at any byte, read back token by token."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import foretoken
from foretoken import UserError
from foretoken.training import distill as module
from foretoken.training.corpus import Corpus
from foretoken.training.distill import distill, run
from foretoken.training.prompts import Prompt, pieces, prompts_of
from foretoken.training.records import Completion
from foretoken.training.sources import documents
from tests.models import STORIES, asset

TARGET = asset(STORIES)
TOKENIZER: Any = TARGET.tokenizer
PROMPTS: list[Prompt] = ["Once upon a time", "The dog", [1, 403, 407], "Tom and his big red ball", "One day, a", "She"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_rows_are_what_plain_decoding_says(tmp_path: Path, temperature: float):
    """In the order of the prompts, whatever the drafter and however many are decoded together."""
    made: list[list[dict[str, Any]]] = []
    for drafter, batch_size in (("suffix", 2), ("none", 4)):
        out = tmp_path / f"{drafter}.jsonl"
        count = distill(
            TARGET,
            PROMPTS,
            out,
            drafter=drafter,
            batch_size=batch_size,
            max_new_tokens=20,
            temperature=temperature,
            seed=7,
        )
        assert count == len(PROMPTS)
        made.append(rows(out))
    assert made[0] == made[1]
    for i, (row, prompt) in enumerate(zip(made[0], PROMPTS, strict=True)):
        plain = foretoken.generate(
            TARGET, [prompt], drafter="none", numbers=[i], max_new_tokens=20, temperature=temperature, seed=7
        )[0]
        assert row["tokens"] == plain.token_ids
        assert row["completion"] == plain.text
        assert row["finish"] == plain.finish
        ids = TOKENIZER(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        assert row["prompt_tokens"] == ids
        assert row["prompt"] == (prompt if isinstance(prompt, str) else TOKENIZER.decode(ids, skip_special_tokens=True))
        assert (row["seed"], row["temperature"], row["top_p"], row["max_new_tokens"]) == (7, temperature, 1.0, 20)


def written(out: Path, prompts: list[Prompt] = PROMPTS, **options: Any) -> bytes:
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3, "batch_size": 2} | options
    assert distill(TARGET, prompts, out, **options) == len(prompts)
    return out.read_bytes()


def test_work_goes_on_from_any_byte(tmp_path: Path):
    """What a kill leaves, cut anywhere, becomes the file of a run without one, and whole rows are not written again."""
    whole = written(tmp_path / "whole.jsonl")
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    out = tmp_path / "cut.jsonl"
    for size in [0, 1, 12, ends[0] - 1, ends[0], ends[0] + 5, ends[2] + 40, ends[-1] - 1, ends[-1]]:
        out.write_bytes(whole[:size])
        assert written(out, batch_size=3) == whole, size


def test_rounds_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = written(tmp_path / "whole.jsonl")
    monkeypatch.setattr(module, "ROUND", 1)
    assert written(tmp_path / "rounds.jsonl") == whole


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, out = written(tmp_path / "whole.jsonl"), tmp_path / "broken.jsonl"
    take, steps = module.Writer.take, list[int]()

    def interrupted(self: Any, session: Any) -> None:
        take(self, session)
        steps.append(1)
        if len(out.read_bytes().splitlines()) >= 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.Writer, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written(out)
    begun = out.read_bytes()
    assert 2 <= len(begun.splitlines()) < len(PROMPTS)
    assert whole.startswith(begun)
    monkeypatch.setattr(module.Writer, "take", take)
    assert written(out) == whole


def test_another_file_is_not_touched(tmp_path: Path):
    """Rows of other settings or prompts, and files that are something else, stay as they are."""
    out = tmp_path / "out.jsonl"
    whole = written(out)
    for options, sentence in (
        ({"temperature": 0.5}, r"written with temperature 1\.0 and 0\.5 came"),
        ({"max_new_tokens": 13}, "written with max_new_tokens 12 and 13 came"),
        ({"prompts": PROMPTS[1:]}, "line 1 does not answer that prompt"),
        ({"prompts": PROMPTS[:2]}, "line 3 does not answer that prompt"),
    ):
        with pytest.raises(UserError, match=sentence):
            written(out, **options)
        assert out.read_bytes() == whole
    for text in ("my notes", '{"text": "a"}\n', "a\n" + '{"prompt": '):
        out.write_text(text)
        with pytest.raises(UserError, match="line 1 is no row of training data"):
            written(out)
        assert out.read_text() == text


def test_rows_are_read_back_token_by_token(tmp_path: Path):
    out = tmp_path / "out.jsonl"
    written(out)
    corpus = Corpus.load(str(out), TOKENIZER, share=0, cache=tmp_path / "cache")
    for row, batch in zip(rows(out), corpus.in_order(1, 40, packed=False), strict=True):
        ids = row["prompt_tokens"] + row["tokens"]
        assert batch.tokens[batch.document >= 0].tolist() == ids
        assert batch.tokens[batch.learn].tolist() == row["tokens"]
    found = list(documents(str(out), share=0))
    assert all(isinstance(d, Completion) and not d.whole for d in found)  # each was cut off after 12 tokens


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(2, 400), max_size=40),
    st.lists(st.just(1), max_size=1),
    st.integers(2, 20),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_pieces_are_of_the_document(body: list[int], leading: list[int], length: int, cuts: int, random: Any):
    """Of `length` tokens, leading ones included; the first is the beginning, and all differ in place."""
    found = list(pieces(leading + body, leading, length, cuts, random))
    n = min(length - len(leading), len(body) // 2)
    places = [body[i : i + n] for i in range(len(body) - n + 1)]
    assert len(found) == (min(cuts, len(places)) if n > 0 else 0)
    for i, piece in enumerate(found):
        assert piece[: len(leading)] == leading
        assert piece[len(leading) :] in (places if i else places[:1])
    for piece in found:
        assert found.count(piece) <= places.count(piece[len(leading) :])


def test_prompts_of_documents(monkeypatch: pytest.MonkeyPatch):
    """Texts are cut, chats end where the assistant spoke, prompts stay; the same seed gives the same."""
    talk = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    text = "Once upon a time there was a little dog. He liked to play in the park with a big red ball."
    ids = TOKENIZER(text)["input_ids"]
    found = list(prompts_of([text, talk, Completion("p", "q")], TARGET, length=6, cuts=3, seed=1))
    assert found[0] == ids[:6]
    assert all(p[0] == 1 and len(p) == 6 for p in found[1:3])
    assert found[3:] == [talk[:1], talk[:3], "p"]
    assert list(prompts_of([text, talk], TARGET, length=6, cuts=3, seed=1)) == found[:5]
    assert list(prompts_of([text, talk], TARGET, length=6, cuts=3, seed=2)) != found[:5]
    assert len(list(prompts_of([talk], TARGET, cuts=1))) == 1


def test_chats_are_answered_in_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    talk: Prompt = [{"role": "user", "content": "The dog"}]
    with pytest.raises(UserError, match="has no chat template, and a chat came"):
        distill(TARGET, [talk], tmp_path / "a.jsonl")
    monkeypatch.setattr(TOKENIZER, "chat_template", TEMPLATE)
    distill(TARGET, [talk], tmp_path / "a.jsonl", max_new_tokens=5)
    (row,) = rows(tmp_path / "a.jsonl")
    assert row["prompt"] == talk
    assert row["prompt_tokens"] == TOKENIZER("user: The dog\n>", add_special_tokens=False)["input_ids"]


def test_the_command_from_file_to_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A file of prompts, then more of a source's documents than the limit; the second half goes on from the first."""
    (tmp_path / "prompts.txt").write_text("Once upon a time\nThe dog\n")
    run(
        STORIES,
        tmp_path / "a.jsonl",
        prompts=tmp_path / "prompts.txt",
        max_new_tokens=6,
        temperature=0.7,
        dtype="float64",
    )
    assert [r["prompt"] for r in rows(tmp_path / "a.jsonl")] == ["Once upon a time", "The dog"]
    assert "2 rows in" in capsys.readouterr().err
    with pytest.raises(UserError, match="has no chat template"):
        run(STORIES, tmp_path / "b.jsonl", prompts=tmp_path / "prompts.txt", chat=True)
    text = "<|endoftext|>".join(
        f"There was a dog number {i}, and it had a big red ball to play with." for i in range(9)
    )
    (tmp_path / "text.txt").write_text(text)
    options: dict[str, Any] = {"source": str(tmp_path / "text.txt"), "prompt_tokens": 8, "cuts": 2, "max_new_tokens": 5}
    run(STORIES, tmp_path / "half.jsonl", limit=3, **options)
    assert len(rows(tmp_path / "half.jsonl")) == 3
    run(STORIES, tmp_path / "half.jsonl", limit=7, **options)
    run(STORIES, tmp_path / "whole.jsonl", limit=7, batch_size=3, **options)
    assert (tmp_path / "half.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "either from a file or from a source"),
        ({"source": "stdlib", "prompts": Path("a")}, "either from a file or from a source"),
        ({"source": "stdlib", "chat": True}, "--chat makes users' turns"),
        ({"source": "stdlib", "prompt_tokens": 1}, "--prompt-tokens must be 2 or more"),
        ({"source": "stdlib", "limit": 0}, "--limit 1 or more"),
        ({"source": "nothing"}, "There is no file 'nothing'"),
        ({"source": "stdlib", "out": Path("none/a.jsonl")}, "'none' is no folder"),
        ({"prompts": Path("nothing.txt")}, "cannot be read"),
    ],
)
def test_bad_requests_end_before_the_model_loads(options: dict[str, Any], sentence: str, tmp_path: Path):
    with pytest.raises(UserError, match=sentence):
        run("no such model", options.pop("out", tmp_path / "a.jsonl"), **options)
