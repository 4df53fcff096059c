"""What methods are compared on: the same prompts for the same seed, that fit, and clear words where there are none."""

import json
from pathlib import Path

import pytest
import torch

from foretoken.bench import tasks
from foretoken.bench.tasks import CATEGORIES, FILES, MT_BENCH, TASKS, prompts
from foretoken.errors import UserError
from foretoken.target import Target
from foretoken.text import decode
from foretoken.training.sources import documents
from tests.models import ASSETS, STORIES, asset

CODE = str(ASSETS / "stdlib5M")
STORY = "Once upon a time, there was a cat.\n\nThe cat sat on a mat, and the mat was red and soft and warm. {}"


def code() -> Target:
    return asset(CODE, torch.float32)


def stories() -> Target:
    return asset(STORIES, torch.float32)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder in the shape of the real one: three questions of each category, four stories, a play."""
    for folder in ("prompts", "text"):
        (tmp_path / folder).mkdir()
    names = [own for group in CATEGORIES.values() for own in group]
    rows = [
        {"question_id": 10 * i + j, "category": name, "turns": [f"{name} question {j}", "and then?"]}
        for i, name in enumerate(names)
        for j in range(3)
    ]
    (tmp_path / FILES["qa"]).write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / FILES["mt_bench"]).write_text("\n".join(json.dumps(r) for r in rows if r["category"] in MT_BENCH))
    told = "\n\n".join(STORY.format(f"It was {n}.") for n in ("one", "two", "three", "four"))
    (tmp_path / FILES["stories"]).write_text("was the end of another.\n\n" + told)
    (tmp_path / FILES["shakespeare"]).write_text("All:\nWe know't, we know't.\n\n" * 100)
    monkeypatch.setenv("FORETOKEN_DATA", str(tmp_path))
    return tmp_path


def refused(asked: str, target: Target | None = None, **settings: int) -> str:
    with pytest.raises(UserError) as found:
        prompts(target or stories(), asked, **{"limit": 2} | settings)
    assert str(found.value).count("\n") == 0
    return str(found.value)


def test_code_is_held_out_and_the_same_whatever_the_limit():
    found = prompts(code(), "code", limit=5, length=40)
    assert found[:3] == prompts(code(), "code", limit=3, length=40)
    assert {p.id for p in found} != {p.id for p in prompts(code(), "code", limit=5, length=40, seed=1)}
    assert [len(p.ids) for p in found] == [40] * 5
    assert len({p.id for p in found}) == 5
    text = list(documents("stdlib", split="held_out"))
    assert all(p.task == "code" and p.text and any(p.text in document for document in text) for p in found)


def test_copy_is_a_piece_of_code_and_its_first_quarter_again():
    pieces, copies = (prompts(code(), task, limit=3, length=40) for task in ("code", "copy"))
    assert [p.ids for p in copies] == [p.ids + p.ids[:10] for p in pieces]
    (begun,) = prompts(stories(), "copy", limit=1, length=40)
    assert begun.ids[0] == 1
    assert begun.ids[40:] == begun.ids[1:11]  # no text begins in the middle of a text


def test_random_tokens_are_drawn_from_all_but_special_ones():
    found = prompts(stories(), "random", limit=40, length=100)
    drawn = {token for p in found for token in p.ids[1:]}
    assert all(p.ids[0] == 1 and len(p.ids) == 100 for p in found)
    assert drawn.isdisjoint({0, 1, 2})
    assert len(drawn) > 500  # of 509
    assert found[:2] == prompts(stories(), "random", limit=2, length=100)
    assert len({tuple(p.ids) for p in found}) == 40


def test_stories_begin_where_a_story_begins(data: Path):
    found = prompts(stories(), "stories", limit=9, length=12)
    assert sorted(p.id for p in found) == [f"stories-{i}.0" for i in range(4)]
    assert all(p.text == decode_start(STORY, 12) for p in found)


def decode_start(text: str, length: int) -> str:
    tokenizer = stories().tokenizer
    assert tokenizer is not None
    return decode(tokenizer, tokenizer(text.replace("\n\n", "\n"))["input_ids"][:length])


def test_shakespeare_is_cut_into_pieces(data: Path):
    found = prompts(stories(), "shakespeare", limit=3, length=20)
    assert all(len(p.ids) == 20 and "know" in p.text for p in found)
    assert len({p.id for p in found}) == 3
    (data / FILES["shakespeare"]).write_text("All:\nWe know't.\n")
    assert "has no text of 96 tokens; ask for shorter prompts" in refused("shakespeare")


def test_spec_bench_is_six_tasks_by_our_names_and_by_its_own(data: Path):
    found = prompts(code(), "spec_bench", limit=2)
    assert [p.task for p in found] == [task for task in CATEGORIES for _ in range(2)]
    assert all(p.text.startswith(CATEGORIES[p.task]) for p in found)
    assert prompts(code(), "math_reasoning", limit=2) == [p for p in found if p.task == "mathematics"]
    assert {p.text[:8] for p in prompts(code(), "roleplay", limit=3)} == {"roleplay"}
    assert len(prompts(code(), "chat", limit=99)) == 3 * len(MT_BENCH)
    assert {p.text for p in prompts(code(), "chat", limit=99)} == {
        p.text for p in prompts(code(), "mt_bench", limit=99)
    }


def test_questions_are_shuffled_and_named_by_their_number(data: Path):
    whole = prompts(code(), "chat", limit=99)
    assert [p.id for p in whole] != sorted((p.id for p in whole), key=int)
    assert whole[:4] == prompts(code(), "chat", limit=4)
    first = prompts(code(), "translation", limit=3)
    assert {p.id: p.text for p in first} == {str(j): f"translation question {j}" for j in range(3)}


def test_all_is_what_is_available(data: Path, monkeypatch: pytest.MonkeyPatch):
    assert [p.task for p in prompts(code(), "all", limit=1, length=16)] == [t for t in TASKS if t != "mt_bench"]
    (data / FILES["qa"]).unlink()
    names = ["code", "copy", "random", "stories", "shakespeare", "mt_bench"]
    assert [p.task for p in prompts(code(), "all", limit=1, length=16)] == names
    monkeypatch.delenv("FORETOKEN_DATA")
    monkeypatch.setattr(tasks, "data_folder", lambda: None)
    assert [p.task for p in prompts(code(), "all", limit=1, length=16)] == names[:3]


def test_the_data_folder_is_found_beside_or_above(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FORETOKEN_DATA")
    below = tmp_path / "checkout" / "below"
    below.mkdir(parents=True)
    (tmp_path / "shared" / "data").mkdir(parents=True)
    monkeypatch.chdir(below)
    assert tasks.data_folder() == tmp_path / "shared" / "data"
    (below / "shared" / "data").mkdir(parents=True)
    assert tasks.data_folder() == below / "shared" / "data"


def test_a_long_question_keeps_its_end_behind_the_first_token(tmp_path: Path):
    file = tmp_path / "long.txt"
    file.write_text("a cat and " * 400 + "a dog\nshort one\n")
    found = {p.id: p for p in prompts(stories(), str(file), limit=9, new=100)}
    ids = found["long-1"].ids
    assert len(ids) == 512 - 100
    assert ids[0] == 1 and ids[1] != 1
    assert found["long-1"].text.endswith("a dog")
    assert found["long-2"].text == "short one"
    assert len(prompts(stories(), "random", limit=1, length=600, new=100)[0].ids) == 412
    assert len(prompts(stories(), "copy", limit=1, length=600, new=400)[0].ids) <= 112


def test_a_users_file_is_read_as_it_is_written(tmp_path: Path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "one cat"}\n\n{"turns": ["two cats", "three"]}\n')
    found = prompts(stories(), f"{file}, {file}", limit=5)
    assert {(p.task, p.id, p.text) for p in found} == {("mine", "mine-1", "one cat"), ("mine", "mine-2", "two cats")}
    assert len(found) == 2
    (tmp_path / "code.txt").write_text("a line\n")
    assert prompts(stories(), str(tmp_path / "code.txt"), limit=5)[0].task == "code.txt"


def with_template() -> Target:
    """The model with a tokenizer that can render chats."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return Target(stories().model, tokenizer)


@pytest.mark.parametrize("key", ["messages", "conversations", "prompt"])
def test_a_chat_is_asked_in_its_template_without_the_last_answer(key: str, tmp_path: Path):
    file = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "hi cat"}, {"role": "assistant", "content": "hello"}]
    file.write_text(json.dumps({key: chat}))
    (found,) = prompts(with_template(), str(file), limit=1)
    assert found.text == "user: hi cat\nassistant:"
    assert "is a chat" in refused(str(file)) and "no chat template" in refused(str(file))
    file.write_text(json.dumps({key: chat[1:]}))
    assert "nobody asks" in refused(str(file), with_template())


def test_questions_are_chats_where_there_is_a_template(data: Path):
    (found,) = prompts(with_template(), "qa", limit=1)
    assert found.text.startswith("user: qa question") and found.text.endswith("\nassistant:")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("translatoin", "'translatoin' is no task; there are all, chat, code,"),
        ("translatoin", "did you mean 'translation'?"),
        ("code, shakespear", "did you mean 'shakespeare'?"),
        ("", "'' is no task"),
        ("nowhere.jsonl", "'nowhere.jsonl' does not exist; give a .txt or .jsonl file of prompts, or a task: code,"),
        ("no/where", "'no/where' does not exist"),
        ("{tmp}", "is a folder"),
        ("{tmp}/table.csv", 'is no file of prompts; write a .txt with one per line, or a .jsonl with "prompt"'),
        ("{tmp}/empty.txt", "holds no prompt; write one per line"),
        ("{tmp}/empty.jsonl", "holds no prompt; write one per line"),
        ("{tmp}/torn.jsonl", "torn.jsonl', line 2 is no JSON; write one object with"),
        ("{tmp}/other.jsonl", "other.jsonl', line 1 has no prompt; write one object with"),
    ],
)
def test_what_is_no_task_is_refused_in_a_sentence(asked: str, said: str, tmp_path: Path):
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "torn.jsonl").write_text('{"prompt": "one"}\n{"prompt"')
    (tmp_path / "other.jsonl").write_text('{"question": "one"}\n')
    assert said in refused(asked.replace("{tmp}", str(tmp_path)))


def test_missing_data_are_named_with_what_to_set(data: Path, monkeypatch: pytest.MonkeyPatch):
    (data / FILES["stories"]).unlink()
    assert "does not hold it; set FORETOKEN_DATA" in refused("stories")
    (data / FILES["qa"]).write_text('{"question": 1}\n')
    assert "holds no questions in Spec-Bench's format" in refused("rag")
    monkeypatch.setenv("FORETOKEN_DATA", str(data / "nowhere"))
    assert "FORETOKEN_DATA is" in refused("all")
    monkeypatch.setattr(tasks, "data_folder", lambda: None)
    assert refused("qa").startswith("The task 'qa' needs prompts/spec_bench_question.jsonl, and no folder shared/data")


def test_numbers_out_of_range_are_refused():
    assert "limit is 0" in refused("code", limit=0)
    assert "ask for 508 or fewer" in refused("code", new=510)


def test_a_target_without_a_tokenizer_gets_random_tokens_alone(data: Path):
    bare = Target(stories().model)
    (found,) = prompts(bare, "random", limit=1, length=12)
    assert len(found.ids) == 12 and found.text == ""
    for task in ("code", "qa", "stories"):
        assert "has no tokenizer" in refused(task, bare)


def test_a_model_without_a_limit_reads_everything(data: Path, monkeypatch: pytest.MonkeyPatch):
    target = Target(stories().model, stories().tokenizer)
    monkeypatch.setattr(Target, "context", None)
    assert len(prompts(target, "random", limit=1, length=700)[0].ids) == 700
