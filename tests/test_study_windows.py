"""What analyses read and write: windows against a slow reading, files of rows cut at every byte."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foretoken.errors import UserError
from foretoken.study.reading import of_one_length
from foretoken.study.rows import FORMAT, Head, Row, Writer, file_of, found, read, short
from foretoken.study.windows import LENGTH, PASSES, length_for, windows
from foretoken.training import stdlib
from foretoken.training.encode import Encoder
from foretoken.training.sources import SEPARATOR
from tests.tiny import NUMBERS, tokenizer

ENCODER = Encoder(tokenizer())

# ------------------------------------------------------------------------------------------------------------- windows


def texts(path: Path, lengths: list[int], seed: int = 0) -> list[list[int]]:
    """A file of documents of so many tokens each, the last of which ends it; those tokens."""
    draw = random.Random(seed)
    documents = [[draw.randrange(NUMBERS) for _ in range(n - 1)] for n in lengths]
    path.write_text(SEPARATOR.join(" ".join(map(str, d)) for d in documents))
    return [[*d, NUMBERS] for d in documents]


def slowly(documents: list[list[int]], length: int, limit: int, shortest: int) -> list[tuple[int, int, list[int]]]:
    """(document, position, tokens): all pieces, sorted by pass, as many as the limit holds."""
    pieces = [
        (d, p, tokens[p : p + length]) for d, tokens in enumerate(documents) for p in range(0, len(tokens), length)
    ]
    pieces = [piece for piece in pieces if len(piece[2]) >= shortest]
    if not limit:
        return pieces
    share = max(1, limit // PASSES // length)  # pieces of a document in one pass
    pieces.sort(key=lambda piece: (piece[1] // length // share, piece[0], piece[1]))
    kept, left = list[tuple[int, int, list[int]]](), limit
    for document, position, tokens in pieces:
        if left < shortest:
            break
        kept.append((document, position, tokens[:left]))
        left -= len(kept[-1][2])
    return kept


def read_as(data: Path | str, *how: int) -> list[tuple[int, int, list[int]]]:
    windowed = list(windows(ENCODER, str(data), *how))
    assert [w.number for w in windowed] == list(range(len(windowed)))
    return [(w.document, w.position, w.tokens) for w in windowed]


@pytest.mark.parametrize("lengths", [[200], [7, 30, 3, 55, 2, 12, 90, 31], [10] * 40, [640, 5, 5]])
@pytest.mark.parametrize("shortest", [2, 4])
@pytest.mark.parametrize("limit", [0, 7, 40, 41, 64, 150, 333, 10_000])
def test_windows_are_those_of_a_slow_reading(tmp_path: Path, lengths: list[int], shortest: int, limit: int):
    documents = texts(tmp_path / "text.txt", lengths)
    for length in (4, 5, 16):
        given = read_as(tmp_path / "text.txt", length, limit, shortest)
        assert given == slowly(documents, length, limit, shortest)
        left = limit - sum(len(tokens) for *_, tokens in given)
        if limit and left >= shortest:  # there was no more to read
            assert sorted(given) == read_as(tmp_path / "text.txt", length, 0, shortest)


def test_a_limit_shows_many_documents(tmp_path: Path):
    """Of forty long documents a limit takes the beginnings of `PASSES`, and of three all it can, in turn."""
    texts(tmp_path / "many.txt", [500] * 40)
    many = read_as(tmp_path / "many.txt", 8, 8 * 2 * PASSES)
    assert [(d, p) for d, p, _ in many] == [(d, p) for d in range(PASSES) for p in (0, 8)]
    texts(tmp_path / "three.txt", [500] * 3)
    three = read_as(tmp_path / "three.txt", 8, 48)
    assert [(d, p) for d, p, _ in three] == [(0, 0), (1, 0), (2, 0), (0, 8), (1, 8), (2, 8)]


def test_one_long_document_is_read_to_its_end(tmp_path: Path):
    (tokens,) = texts(tmp_path / "text.txt", [1001])
    for limit in (0, 1001, 5000):
        given = read_as(tmp_path / "text.txt", 10, limit)
        assert [t for *_, some in given for t in some] == tokens[:1000]  # the last one is no window of two
        assert [p for _, p, _ in given] == list(range(0, 1000, 10))


def test_no_text_is_long_enough(tmp_path: Path):
    texts(tmp_path / "text.txt", [3, 6, 4])
    with pytest.raises(
        UserError, match=r"^The longest text in '.*text\.txt' has 6 tokens and 7 are needed; give longer"
    ):
        read_as(tmp_path / "text.txt", 8, 0, 7)
    assert read_as(tmp_path / "text.txt", 8, 0, 6)[0][0] == 1
    with pytest.raises(UserError, match="length"):
        read_as(tmp_path / "text.txt", 5, 0, 6)


@pytest.mark.parametrize(
    ("context", "asked", "length"),
    [(256, 0, 256), (4096, 0, LENGTH), (None, 0, LENGTH), (64, 64, 64), (None, 9999, 9999)],
)
def test_the_length_of_a_window(context: int | None, asked: int, length: int):
    assert length_for(context, asked) == length


def test_windows_are_no_longer_than_the_model_holds():
    with pytest.raises(
        UserError, match=r"^Windows of 65 tokens were asked for and the model holds 64; give --length 64\.$"
    ):
        length_for(64, 65)


def test_of_the_standard_library_the_held_out_packages_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A library of four files, two of them of packages that no model was trained on."""
    for number, name in enumerate(("ast.py", "json/decoder.py", "test/test_json/test_all.py", "textwrap.py")):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{number} {number} {number}")
    monkeypatch.setattr(stdlib, "root", lambda: tmp_path)
    assert read_as("stdlib", 8, 0) == [(0, 0, [1, 1, 1, NUMBERS]), (1, 0, [2, 2, 2, NUMBERS])]


def test_of_a_file_everything_is_read(tmp_path: Path):
    """Nothing is held out of what is only analysed: a share of 2 % of these would be missing."""
    texts(tmp_path / "text.txt", [4] * 400)
    assert len(read_as(tmp_path / "text.txt", 8, 0)) == 400


# ---------------------------------------------------------------------------------------------------------------- rows


HEAD = Head("layers", "models/tiny", "tiny", 1000, "data/a.txt", {"length": 8, "limit": 0}, {"processor": "one"})


def rows_of(window: int) -> list[Row]:
    """Of the window numbered so; some have none."""
    return [{"window": window, "position": i, "value": [short(i / 3), window]} for i in range((3, 1, 0, 2)[window % 4])]


def go_on(folder: Path, head: Head = HEAD, count: int = 6) -> list[int]:
    """Run an analysis of `count` windows to its end; the windows that were measured."""
    writer, measured = Writer(folder, head), list[int]()
    if not writer.finished:
        for window in range(writer.begun, count):
            measured.append(window)
            writer.write(rows_of(window))
        writer.end({"windows": count})
    writer.close()
    return measured


def test_a_file_cut_anywhere_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed at every byte behind the first line: the same file in the end, no finished window but one done again."""
    monkeypatch.setattr("foretoken.study.rows.os.fsync", lambda _: None)  # waits for the disk, thousands of times
    assert go_on(tmp_path / "whole") == list(range(6))
    whole = file_of(tmp_path / "whole", HEAD).read_bytes()
    ends = [i for i, byte in enumerate(whole, 1) if byte == ord("\n")]
    path = file_of(tmp_path / "cut", HEAD)
    path.parent.mkdir()
    for cut in range(ends[0], len(whole)):
        path.write_bytes(whole[:cut])
        begun = [json.loads(one)["window"] for one in whole[ends[0] : max(e for e in ends if e <= cut)].splitlines()]
        assert go_on(tmp_path / "cut") == list(range(max(begun, default=0), 6))
        assert path.read_bytes() == whole
    assert go_on(tmp_path / "cut") == []
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no draft of it is left


def test_rows_come_back(tmp_path: Path):
    go_on(tmp_path)
    file = read(file_of(tmp_path, HEAD))
    assert (file.head, file.end) == (HEAD, {"windows": 6})
    assert file.rows == [row for window in range(6) for row in rows_of(window)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "other/tiny"}, r"another model \('models/tiny', now 'other/tiny'\); give --out another folder"),
        ({"data": "b/a.jsonl"}, r"another data \('data/a.txt', now 'b/a.jsonl'\)"),
        ({"parameters": 1001}, r"another parameters \(1000, now 1001\)"),
        ({"settings": {"length": 8, "limit": 9}}, r"another settings \(limit: 0, now 9\)"),
        ({"settings": {"length": 8, "limit": 0, "seed": 1}}, r"another settings \(seed: None, now 1\)"),
        ({"settings": {"length": 8}}, r"another settings \(limit: 0, now None\)"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_file_of_another_analysis_is_left_as_it_is(
    tmp_path: Path, changes: dict[str, Any], said: str, finished: bool
):
    go_on(tmp_path)
    path = file_of(tmp_path, HEAD)
    if not finished:
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    before, other = path.read_bytes(), replace(HEAD, **changes)
    assert file_of(tmp_path, other) == path
    with pytest.raises(UserError, match=f"{path.name}' was begun with {said}"):
        Writer(tmp_path, other)
    assert path.read_bytes() == before


def test_another_machine_may_go_on(tmp_path: Path):
    go_on(tmp_path, count=3)
    path = file_of(tmp_path, HEAD)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    go_on(tmp_path, replace(HEAD, machine={"processor": "another"}))
    assert read(path).head.machine == {"processor": "one"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json\n",
        "{}\n",
        "[]\n",
        '{"head": {"kind": "layers"}}\n',
        json.dumps({"head": {"kind": "layers", "more": 1}}) + "\n",
    ],
)
def test_files_of_others_are_refused(tmp_path: Path, text: str):
    path = tmp_path / "layers-x.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=r"layers-x\.jsonl' is no file that this version of `foretoken analyze` wrote"):
        read(path)


def test_files_of_other_versions_and_torn_ones(tmp_path: Path):
    go_on(tmp_path)
    path = file_of(tmp_path, HEAD)
    head, *rest = path.read_text().splitlines(keepends=True)
    refused = r"is no file that this version of `foretoken analyze` wrote; remove it and analyse again\.$"
    for broken in (
        head.replace(f'"format":{FORMAT}', f'"format":{FORMAT + 1}') + "".join(rest),
        head[:-10],  # killed within the first line
        head + '{"position":1}\n',  # of no window
        head + "[1,2]\n",
        head + rest[0][:-3] + "\n" + rest[1],  # not at the end, so no kill tore it
    ):
        path.write_text(broken)
        with pytest.raises(UserError, match=refused):
            read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"cannot be read .*; remove it and analyse again\.$"):
        read(path)
    with pytest.raises(UserError, match=r"cannot be read .*No such file.*; remove it"):
        read(tmp_path / "nothing")
    path.write_text(head + rest[0] + rest[1][:-1])  # a whole row, but its line is not ended
    assert len(read(path).rows) == 1


def test_folders_that_cannot_be_written_to_are_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=rf"^'{folder}' cannot be written to \(.*\); give --out another folder\.$"):
            Writer(folder, HEAD)


def test_an_empty_file_is_begun(tmp_path: Path):
    file_of(tmp_path, HEAD).write_text("")
    assert go_on(tmp_path) == list(range(6))


def test_names_of_files_are_plain():
    head = replace(HEAD, label="a b/c:d", data="../text/some text.tar.gz")
    assert file_of(Path("out"), head) == Path("out/layers-a_b_c_d-some_text.tar.jsonl")


def test_finished_files_are_found_by_text_and_size(tmp_path: Path):
    heads = [
        replace(HEAD, label=label, parameters=parameters, data=data)
        for label, parameters, data in (("a", 30, "x"), ("b", 4, "x"), ("c", 100, "w"), ("d", 1, "x"))
    ]
    for head in heads[:3]:
        go_on(tmp_path, head)
    Writer(tmp_path, heads[3]).close()  # begun
    go_on(tmp_path, replace(HEAD, kind="heads"))
    assert [f.head.label for f in found(tmp_path, "layers")] == ["c", "b", "a"]


def test_numbers_are_short():
    assert [short(1 / 3), short(123456.789, 3), short(2.5e-9), short(7), short(0.0)] == [0.333333, 123e3, 2.5e-9, 7, 0]
    assert isinstance(short(7), int)


# -------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("tokens", [0, 1, 6, 7, 40])
def test_paths_are_read_in_groups_of_one_length(tokens: int):
    draw = random.Random(tokens)
    paths = [[0] * draw.randrange(1, 5) for _ in range(50)]
    groups = of_one_length(paths, tokens)
    assert sorted(i for group in groups for i in group) == list(range(50))
    for group in groups:
        (length,) = {len(paths[i]) for i in group}
        assert len(group) == 1 or len(group) * length <= tokens
    for length in range(1, 5):
        count, fitting = sum(len(p) == length for p in paths), max(1, tokens // length)
        assert sum(len(paths[g[0]]) == length for g in groups) == -(-count // fitting)  # no more forwards than needed


def test_a_file_has_one_writer(tmp_path: Path):
    """A second command would replace the file, and what the first writes afterwards would be lost."""
    writer = Writer(tmp_path, HEAD)
    writer.write([{"window": 0, "x": 1}])
    with pytest.raises(UserError, match="is being written by another command"):
        Writer(tmp_path, HEAD)
    writer.write([{"window": 1, "x": 2}])
    writer.close()
    assert [row["x"] for row in read(writer.path).rows] == [1, 2]
    with pytest.raises(UserError, match="another settings"):
        Writer(tmp_path, replace(HEAD, settings={}))
    Writer(tmp_path, HEAD).close()  # neither of the refused ones holds it
