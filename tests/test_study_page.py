"""The page of `foretoken analyze`: its numbers against slow sums over the same rows, and a page that is whole."""

import json
import math
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from random import Random

import numpy as np
import pytest
from matplotlib.figure import Figure

from foretoken.analysis.summary import Estimate, binned, chains, columns, edges, estimate, within
from foretoken.errors import UserError
from foretoken.report import drawing as drawings
from foretoken.report.drawing import Key, chart, drawing, save
from foretoken.report.layout import body
from foretoken.report.tables import DASH, TIMES, Section, Table
from foretoken.study import page
from foretoken.study.rows import Head, Rows, Writer, found
from foretoken.study.views import ceiling, marginal
from foretoken.study.views.guesses import floor
from foretoken.study.views.series import data_labels, magnitudes, panels, sizes, slugs, spread

MACHINE = {"processor": "A CPU (AVX512)", "threads": 2}
MODELS = {"tiny-70M": 70_000_000, "tiny-160M": 162_000_000, "tiny-410M": 405_000_000}
TEXTS = {"translation": 0.85, "data/stories.jsonl": 0.5}
K = 4


def rows_of(random: Random, skill: float, documents: int = 12, positions: int = 25) -> list[dict]:
    """Rows of a model that is right more often the greater `skill` is; guesses overlap more than is proved."""

    def rank(depth: int) -> int:
        return 0 if random.random() < skill**depth else int(random.expovariate(0.15 * skill))

    found: list[dict] = []
    for document in range(documents):
        for position in range(positions):
            entropy = random.expovariate(1 / (4.5 - 4 * skill))
            information = random.random() * entropy / 2
            overlap = [1 - math.sqrt(min(information, 2) / 2) * random.uniform(0.2, 0.9) for _ in range(K - 1)]
            peak = [max(o, math.exp(-entropy * random.random())) for o in overlap]
            found.append(
                {
                    **{"window": document, "document": document // 2, "position": position, "context": position + 1},
                    **{"nucleus": [1 + int(9 * entropy**2), 1 + int(3 * entropy)], "entropy": entropy},
                    **{"leaves": [3, 7, 12], "mass": [0.99**k * random.uniform(0.99, 1) for k in range(1, K)]},
                    **{"rank": [rank(k) for k in range(1, K + 1)], "greedy": [0, *(rank(k) for k in range(2, K + 1))]},
                    **{"chance": [random.uniform(0.01, 1) * skill**k for k in range(1, K + 1)]},
                    **{"information": information, "overlap": overlap, "peak": peak},
                    **{"ratio": [min(1.0, o * random.uniform(0.7, 1.4)) for o in overlap]},
                    **{"top": [o * random.uniform(0.5, 1) for o in overlap]},
                    **{"hit": [random.random() < o for o in overlap], "sure": [random.random() < p for p in peak]},
                }
            )
    return found


def head_of(kind: str = "marginal", model: str = "tiny-70M", data: str = "translation", **changes: object) -> Head:
    settings = {"horizon": K, "top_p": 0.99, "least": 1e-4}
    known = Head(kind, f"models/{model}", model, MODELS.get(model, 10**6), data, settings, MACHINE)
    return replace(known, **changes)


def end_of(rows: list[dict], scale: float = 1.0) -> dict:
    return {"seconds": 0.02 * scale * len(rows), "positions": len(rows), "nodes": 22 * len(rows), "forwards": 120}


def put(folder: Path, head: Head, rows: list[dict], end: dict | None) -> Path:
    writer = Writer(folder, head)
    writer.write(rows)
    if end is not None:
        writer.end(end)
    writer.close()
    return writer.path


def ceiling_of(model: str = "tiny-410M") -> dict:
    def at(s: float) -> dict:
        return {
            "independent": [s**i for i in range(1, 9)],
            "independent_likeliest": [(0.9 * s) ** i for i in range(1, 9)],
            "sequential": [1.0] * 8,
            "sequential_likeliest": [(0.6 + 0.4 * s) ** i for i in range(1, 9)],
            "lookup": {"tokens_per_forward": 1.4, "survival": [0.3, 0.2, 0.1]},
        }

    def predicted(tau: float) -> dict:
        return {
            "independent": {"tokens_per_forward": tau, "speedup": 0.9 * tau, "length": 3},
            "sequential": {"tokens_per_forward": 2 * tau, "speedup": 1.1 * tau, "length": 6},
            "lookup": {"tokens_per_forward": 1.4, "speedup": 1.25, "length": 4},
        }

    return {
        "head": asdict(head_of("ceiling", model)),
        "depths": list(range(1, 9)),
        "temperatures": {"0": at(0.7), "1": at(0.5)},
        "times": {"v": {"1": 1.0, "2": 1.02, "4": 1.1, "8": 1.31}, "head": 0.021, "layer": 0.105, "own": 0.03},
        "predicted": {"0": predicted(2.31), "1": predicted(1.77)},
        "verdict": "Sequential drafters can gain 2.54 times here, heads 2.08 times.",
    }


def plausible(folder: Path) -> Path:
    """Three models on two texts, and a ceiling."""
    random = Random(0)
    for text, ease in TEXTS.items():
        for i, model in enumerate(MODELS):
            rows = rows_of(random, ease * (0.8 + 0.1 * i))
            put(folder, head_of(model=model, data=text), rows, end_of(rows, 1 + i))
    (folder / "ceiling-tiny-410M-translation.json").write_text(json.dumps(ceiling_of()))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plausible(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def files(folder: Path) -> list[Rows]:
    return found(folder, "marginal")


@pytest.fixture(scope="module")
def made(folder: Path) -> tuple[list[Path], list[Section]]:
    """What the page's files are, and the sections of the marginals that they were written from; PNGs are coarse."""
    kept, make, write = list[Section](), marginal.sections, Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Figure, "savefig", lambda f, to, **how: write(f, to, **how | ({"dpi": 20} if "dpi" in how else {}))
        )
        patch.setattr(marginal, "sections", lambda files: kept.extend(make(files)) or kept)
        return page.write(folder), kept


@pytest.fixture(scope="module")
def parts(made: tuple[list[Path], list[Section]]) -> dict[str, Section]:
    return {s.title: s for s in made[1]}


@pytest.fixture(scope="module")
def written(made: tuple[list[Path], list[Section]]) -> list[Path]:
    return made[0]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, and no SVG of them."""
    monkeypatch.setattr(drawings, "svg", lambda figure, name: "")


# statistics


def test_the_error_of_a_mean_whose_values_are_independent_is_the_usual_one():
    values = np.random.default_rng(0).normal(size=50)
    got = estimate(values, np.arange(50))
    assert got is not None
    assert got.mean == pytest.approx(values.mean())
    assert got.error == pytest.approx(values.std(ddof=1) / math.sqrt(50))


def test_the_error_of_a_mean_is_that_of_repeated_draws():
    """3000 data sets of 8 documents, whose values have much in common: the mean's spread is what the error says."""
    random = np.random.default_rng(1)
    groups = np.repeat(np.arange(8), 20)
    draws = [random.normal(size=8)[groups] + 0.5 * random.normal(size=160) for _ in range(3000)]
    found = [e for e in (estimate(d, groups) for d in draws) if e and e.error]
    spread = np.std([e.mean for e in found])
    assert math.sqrt(np.mean([e.error**2 for e in found if e.error])) == pytest.approx(spread, rel=0.05)
    naive = math.sqrt(np.mean([d.var(ddof=1) / 160 for d in draws]))
    assert naive < spread / 3  # what positions taken for independent would claim


def test_values_that_are_missing_do_not_count():
    values, groups = np.array([1.0, np.nan, 3.0, np.nan]), np.array([0, 0, 1, 2])
    assert estimate(values, groups) == estimate(np.array([1.0, 3.0]), np.array([0, 1]))
    assert estimate(np.array([np.nan]), np.array([0])) is None
    assert estimate(np.array([1.0, 2.0]), np.array([5, 5])) == Estimate(1.5, None, 2)
    assert columns(np.array([[1.0, np.nan]]), np.array([0])) == [Estimate(1.0, None, 1), None]
    assert within(np.array([0.0, 4.0, 5.0, np.nan]), 5).tolist()[:3] == [1, 1, 0]
    assert np.isnan(within(np.array([np.nan]), 5)).all()


def test_bins_hold_every_value_once():
    random = np.random.default_rng(2)
    x = np.round(random.exponential(size=300), 1)  # with ties
    y = random.random(300)
    limits = edges(x, 6)
    bins = binned(x, y, np.arange(300), limits)
    assert (limits[0], limits[-1]) == (x.min(), x.max())
    assert sum(b.y.count for b in bins) == 300
    for b in bins:
        inside = [i for i in range(300) if b.low <= x[i] < b.high or b.high == limits[-1] == x[i]]
        assert b.y.mean == pytest.approx(sum(y[i] for i in inside) / len(inside))
        assert b.x == pytest.approx(sum(x[i] for i in inside) / len(inside))
    assert edges(np.zeros(5), 4) == [0.0, 0.0]
    (single,) = binned(np.zeros(5), np.arange(5.0), np.arange(5), [0.0, 0.0])
    assert (single.y.mean, single.y.count) == (2.0, 5)


def test_the_mean_of_chains_is_the_chance_that_the_first_guesses_are_accepted():
    """Against enumeration: two guesses by q, drawn paths by p, three tokens."""
    random = np.random.default_rng(3)
    p1, q1, q2 = random.dirichlet(np.ones(3)), random.dirichlet(np.ones(3)), random.dirichlet(np.ones(3))
    p2 = random.dirichlet(np.ones(3), size=3)
    first = float(np.minimum(p1, q1).sum())
    second = sum(min(p1[a], q1[a]) * np.minimum(p2[a], q2).sum() for a in range(3))
    through = np.array([[min(1, q1[a] / p1[a]), 0.3] for a in range(3)])
    at = np.array([[first, np.minimum(p2[a], q2).sum()] for a in range(3)])
    assert p1 @ chains(through, at) == pytest.approx([first, second])


# the tables


def slow_mean(rows: list[dict], value) -> tuple[float, float]:
    """Mean and standard error, documents summed one by one."""
    values = [value(r) for r in rows]
    mean = sum(values) / len(values)
    sums = [
        sum(value(r) - mean for r in some) for _, some in groupby(rows, key=lambda r: r["document"])
    ]  # rows come document by document
    return mean, math.sqrt(len(sums) / (len(sums) - 1) * sum(s * s for s in sums)) / len(rows)


def row_of(table: Table, *names: str) -> list[str]:
    (row,) = [r for r in table.rows if tuple(map(str, r[: len(names)])) == names]
    return [str(c) for c in row[len(names) :]]


def numbers(cell: str) -> list[float]:
    return [float(n) for n in cell.split(" ± ")]


def check(cells: list[str], rows: list[dict], values: list, digits: int = 3) -> None:
    """Each cell is mean ± error of one of the values."""
    assert len(cells) == len(values)
    for cell, value in zip(cells, values, strict=True):
        assert numbers(cell) == pytest.approx(slow_mean(rows, value), abs=0.51 * 10**-digits)


def test_accuracy_is_counted_against_the_text_and_against_the_model_apart(files: list[Rows], parts: dict[str, Section]):
    for title, key in (
        ("What the text says further ahead", "rank"),
        ("What the model itself says further ahead", "greedy"),
    ):
        (table,) = parts[title].tables
        assert len(table.rows) == 2 * len(files)
        for file in files:
            names = file.head.label, Path(file.head.data).stem
            for name, best in (("top-5", 5), ("top-1", 1)):
                values = [lambda r, k=k, best=best, key=key: r[key][k] < best for k in range(K)]
                check(row_of(table, *names, name), file.rows, values)


def test_models_are_compared_by_size(files: list[Rows], parts: dict[str, Section]):
    (table,) = parts["Models of different size"].tables
    for file in files:
        cells = row_of(table, file.head.label, Path(file.head.data).stem)
        check(cells[2:4], file.rows, [lambda r: r["nucleus"][0], lambda r: r["nucleus"][1]], 2)
        values = [lambda r: r["entropy"], lambda r: r["rank"][1] < 5, lambda r: r["rank"][2] < 5]
        check(cells[4:], file.rows, values)
    assert row_of(table, "tiny-160M", "stories")[:2] == ["162M", "300"]


def test_bins_of_entropy_hold_every_position(files: list[Rows], parts: dict[str, Section]):
    (table,) = parts["Where the next token is sure"].folded
    pooled = sorted(r["entropy"] for f in files for r in f.rows)
    for file in files:
        names = file.head.label, Path(file.head.data).stem
        bins = [[str(c) for c in row[2:]] for row in table.rows if tuple(row[:2]) == names]
        assert sum(int(b[1]) for b in bins) == len(file.rows)
        for span, count, x, text, own in bins:
            low, high = map(float, span.split(DASH))
            inside = [r for r in file.rows if low - 6e-4 <= r["entropy"] < high + 6e-4]
            assert int(count) == pytest.approx(len(inside), abs=2)  # borders are rounded for the table
            assert float(x) == pytest.approx(slow_mean(inside, lambda r: r["entropy"])[0], abs=0.02)
            assert numbers(text)[0] == pytest.approx(slow_mean(inside, lambda r: r["rank"][1] == 0)[0], abs=0.06)
            assert numbers(own)[0] == pytest.approx(slow_mean(inside, lambda r: r["greedy"][1] == 0)[0], abs=0.06)
    shares = [
        sum(int(row[3].replace(",", "")) for row in table.rows if str(row[2]) == s) for s in {r[2] for r in table.rows}
    ]
    assert all(share == pytest.approx(len(pooled) / 8, abs=2) for share in shares)


def test_accuracy_by_tokens_read_is_that_of_the_rows_there(files: list[Rows], parts: dict[str, Section]):
    shown = parts["How much of the text is read"]
    for table, depth in zip(shown.folded, (0, 1), strict=True):
        assert table.head[2:5] == ("1 to 15", "16 to 31", "32 to 63")
        for row, file in zip(table.rows, files, strict=True):
            for cell, low, high in zip(row[2:4], (1, 16), (16, 32), strict=True):
                rows = [r for r in file.rows if low <= r["context"] < high]
                right = sum(r["rank"][depth] == 0 for r in rows) / len(rows)
                assert numbers(str(cell))[0] == pytest.approx(right, abs=6e-4)
            assert {str(cell) for cell in row[4:]} == {DASH}  # no document is longer


def test_a_terminal_shows_the_first_table_without_what_is_everywhere_the_same(tmp_path: Path, folder: Path):
    found = page.brief(folder, "marginal")[1]
    assert [len(t.rows) for t in found] == [len(found[0].rows)] and "±" not in str(found[0].rows)
    assert found[0].head[0] == "model" and found[0].is_text(1)
    said, tables = page.brief(folder, "ceiling")
    assert [str(s) for s in said] == [c.verdict for c in ceiling.found(folder)]
    assert [t.head[0] for t in tables] == ["drafter"] * 2
    assert page.brief(tmp_path, "heads") == ([], [])


def test_nats_are_renormalised_from_depth_two_on(files: list[Rows], parts: dict[str, Section]):
    table, mass = parts["Chance of the text's tokens"].folded
    for file in files:
        names = file.head.label, Path(file.head.data).stem
        raw = [lambda r, k=k: -math.log(r["chance"][k]) for k in range(K)]
        whole = [
            raw[0],
            *(lambda r, k=k: -math.log(r["chance"][k] / r["mass"][k - 1]) for k in range(1, K)),
        ]
        check(row_of(table, *names, "as summed"), file.rows, raw)
        check(row_of(table, *names, "renormalised"), file.rows, whole)
        masses = row_of(mass, *names, "mass")
        assert masses[0] == "1.000 ± 0.000"
        check(masses[1:], file.rows, [lambda r, k=k: r["mass"][k] for k in range(K - 1)])


def slow_chain(rows: list[dict], through: str, at: str, i: int) -> tuple[float, float]:
    def value(row: dict) -> float:
        chance = float(row[at][i])
        for j in range(i):
            chance *= row[through][j]
        return chance

    return slow_mean(rows, value)


def test_guesses_are_accepted_as_often_as_chains_of_them_survive(files: list[Rows], parts: dict[str, Section]):
    (table,) = parts["Guesses that would be accepted"].tables
    kinds = {
        "T=1, heads draw from the marginal": ("ratio", "overlap"),
        "T=1, heads say the marginal's likeliest": ("hit", "top"),
        "T=1, sequential drafter says the likeliest": ("sure", "peak"),
    }
    for file in files:
        names = file.head.label, Path(file.head.data).stem
        for name, (through, at) in kinds.items():
            *cells, tau = row_of(table, *names, name)
            expected = [slow_chain(file.rows, through, at, i) for i in range(K - 1)]
            for cell, one in zip(cells, expected, strict=True):
                assert numbers(cell) == pytest.approx(one, abs=6e-4)
            assert float(tau) == pytest.approx(1 + sum(e[0] for e in expected), abs=0.006)
        *cells, _ = row_of(table, *names, "T=0, heads say the marginal's likeliest")
        values = [lambda r, i=i: all(rank == 0 for rank in r["greedy"][1 : i + 2]) for i in range(K - 1)]
        check(cells, file.rows, values)


def test_the_floor_of_the_overlap_is_below_it(files: list[Rows], parts: dict[str, Section]):
    section = parts["What the token between tells"]
    (table,) = section.folded
    assert len(table.rows) > 4 * len(files)
    for row in table.rows:
        overlap, least = numbers(str(row[5]))[0], float(str(row[6]))
        assert overlap >= least > 0
    assert floor(np.array([0.0, 0.5, 2.0, 8.0, -1e-9])).tolist() == [1.0, 0.5, 0.0, 0.0, 1.0]
    assert [k.style for k in section.charts[0].keys][-1] == -2


def test_costs_are_totals_over_positions(parts: dict[str, Section]):
    (table,) = parts["Cost of marginalising"].tables
    assert row_of(table, "tiny-160M", "stories") == ["162M", "300", "6,600", "22", "120", "12.0", "0.04"]


@pytest.mark.usefixtures("undrawn")
def test_what_the_timing_does_not_cover_is_said(tmp_path: Path):
    rows = rows_of(Random(1), 0.7, documents=4, positions=3)
    put(tmp_path, head_of(), rows, {**end_of(rows[:5]), "note": "read as sequences."})
    section = marginal.sections(found(tmp_path, "marginal"))[-1]
    assert section.notes[1:] == [
        "tiny-70M: read as sequences.",
        "tiny-70M, translation: timed over 5 of 12 positions; the others were read before.",
    ]
    put(tmp_path, head_of(data="other"), rows, {**end_of([]), "nodes": 0})
    section = marginal.sections(found(tmp_path, "marginal"))[-1]
    assert row_of(section.tables[0], "tiny-70M", "other") == ["70M", "0", "0", DASH, "120", "0.0", DASH]


@pytest.mark.usefixtures("undrawn")
def test_ranks_that_a_window_s_end_cuts_off_are_left_out(tmp_path: Path):
    """The last position of a window has no second token ahead: its lists are shorter, or hold null."""
    rows = rows_of(Random(1), 0.7, documents=4, positions=3)
    for row in rows:
        if row["position"] == 2:
            row["rank"], row["chance"] = row["rank"][:1], [*row["chance"][:1], None, None, None]
    put(tmp_path, head_of(), rows, end_of(rows))
    parts = {s.title: s for s in marginal.sections(found(tmp_path, "marginal"))}
    nats = row_of(parts["Chance of the text's tokens"].folded[0], "tiny-70M", "translation", "as summed")
    check(nats[1:2], [r for r in rows if r["position"] < 2], [lambda r: -math.log(r["chance"][1])])
    cells = row_of(parts["What the text says further ahead"].tables[0], "tiny-70M", "translation", "top-1")
    check(cells[:1], rows, [lambda r: r["rank"][0] == 0])
    check(cells[1:], [r for r in rows if r["position"] < 2], [lambda r, k=k: r["rank"][k] == 0 for k in (1, 2, 3)])


# names and panels


def test_many_files_are_drawn_text_by_text():
    heads = [head_of(model=f"m{i}", data=d, parameters=i) for d in ("a/x.jsonl", "b/x.jsonl", "c y") for i in range(10)]
    assert data_labels(heads)[::10] == ["a/x.jsonl", "b/x.jsonl", "c y"]
    first, second, third = panels(heads)
    assert (first.name, second.name, third.name) == ("-a_x.jsonl", "-b_x.jsonl", "-c_y")
    assert [i for i, _ in second.members] == [10, 11, 13, 14, 15, 16, 18, 19]
    assert [label for _, label in second.members] == ["m0", "m1", "m3", "m4", "m5", "m6", "m8", "m9"]
    assert third.where == "; c y; 8 of 10 models"
    assert spread(3) == [0, 1, 2]
    assert slugs(["a b", "a_b", "a/b"]) == ["a_b", "a_b-1", "a_b-2"]


def test_lines_are_called_by_what_tells_them_apart():
    two, one = [head_of(model=m) for m in ("a", "b")], [head_of(model="a", data=d) for d in ("x", "y")]
    for heads, labels in (
        (two, ["a", "b"]),
        (one, ["x", "y"]),
        ([*two, one[0]], ["a, translation", "b, translation", "a, x"]),
    ):
        (panel,) = panels(heads)
        keys = panel.keys()
        assert [key.label for key in keys] == labels


# the page


class Tags(HTMLParser):
    """The ids of a page and its words; every tag must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.ids, self.words = [], set(), [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.open += [tag] if tag not in ("meta", "wbr") else []
        self.ids += [v for k, v in attrs if k == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.remove(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_has_every_caption_and_every_figure_its_files(
    folder: Path, parts: dict[str, Section], written: list[Path]
):
    text = (folder / "index.html").read_text("utf-8")
    seen, prose = Tags(text), (folder / "index.md").read_text("utf-8")
    words = "".join(seen.words)
    sections = [*parts.values(), *ceiling.sections(ceiling.found(folder))]
    charts = [c for s in sections for c in s.charts]
    assert len(charts) == 19
    for section in sections:
        assert section.title in words
        assert f"## {section.title}" in prose
        assert not section.charts or section.tables or section.folded
    for c in charts:
        assert c.caption in words
        assert (folder / "figures" / f"{c.name}.svg").read_text("utf-8").startswith("<?xml")
        assert (folder / "figures" / f"{c.name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"](figures/{c.name}.svg)" in prose
    assert len(written) == 2 + 2 * len(charts)
    assert all(path.is_file() for path in written)
    assert not seen.tags & {"script", "link", "img", "iframe", "image"}
    assert len(seen.ids) == len(set(seen.ids))
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}", drawn)  # all colours are the page's


def test_tables_of_the_markdown_are_whole(folder: Path, written: list[Path]):
    blocks = re.findall(r"(?:^\|.*\n)+", (folder / "index.md").read_text("utf-8"), re.MULTILINE)
    assert len(blocks) > 10
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


@pytest.fixture
def unsaved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn for the page, and not saved."""
    monkeypatch.setattr(page, "save", lambda chart, folder: [folder / f"{chart.name}.svg"])


def test_the_same_rows_give_the_same_bytes(folder: Path, written: list[Path], unsaved: None):
    before = {path: path.read_bytes() for path in written[:2]}
    assert {path: path.read_bytes() for path in page.write(folder)[:2]} == before


@pytest.mark.usefixtures("unsaved", "undrawn")
def test_one_model_makes_a_page_without_figures_over_size(tmp_path: Path):
    rows = rows_of(Random(2), 0.6, documents=2, positions=4)
    put(tmp_path, head_of(), rows, end_of(rows))
    names = {path.name for path in page.write(tmp_path)}
    assert "text-top5.svg" in names
    assert not any(name.startswith(("size", "cost", "entropy", "information")) for name in names)  # eight positions
    assert "needs more of them (--models)" in (tmp_path / "index.md").read_text()


@pytest.mark.usefixtures("unsaved", "undrawn")
def test_what_is_not_finished_is_left_out_and_named(tmp_path: Path):
    rows = rows_of(Random(2), 0.6, documents=3, positions=4)
    put(tmp_path, head_of(), rows, end_of(rows))
    left = put(tmp_path, head_of(model="tiny-160M"), rows, None)
    page.write(tmp_path)
    text = (tmp_path / "index.md").read_text()
    assert f"**{left.name} is not complete and left out.**" in text
    assert "| tiny-160M |" not in text


def test_a_folder_without_finished_rows_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"holds no finished analysis; run `foretoken analyze marginal"):
        page.write(tmp_path / "nothing")
    put(tmp_path, head_of(), rows_of(Random(0), 0.5, documents=1), None)
    with pytest.raises(
        UserError, match=r"no finished analysis \(marginal-tiny-70M-translation.jsonl is not complete\)"
    ):
        page.write(tmp_path)
    assert not (tmp_path / "index.html").exists()


HOSTILE = "</script><img src=x onerror=alert(1)>|`*_x_*`[a](b)$\\frac$\x1b[31m"


def test_hostile_names_stay_text(tmp_path: Path, unsaved: None):
    hostile = HOSTILE
    rows = rows_of(Random(2), 0.6, documents=2, positions=4)
    for i, model in enumerate((hostile, "other")):  # two sizes, so that every figure is there
        put(tmp_path, head_of(model=model, parameters=10 ** (6 + i), data=hostile), rows, end_of(rows))
    record = ceiling_of()
    record |= {"verdict": hostile, "head": {**record["head"], "label": hostile, "data": hostile}}
    (tmp_path / "ceiling-x.json").write_text(json.dumps(record))
    page.write(tmp_path)
    html, text = (tmp_path / "index.html").read_text("utf-8"), (tmp_path / "index.md").read_text("utf-8")
    assert not Tags(html).tags & {"script", "img", "a"}
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", html + text)
    assert not re.search(r"<(?!/?(?:details|summary))", text)


# ceilings


def test_ceilings_are_tabled_by_temperature(folder: Path):
    (section,) = ceiling.sections(ceiling.found(folder))
    zero, one = section.tables
    assert (zero.caption, one.caption) == ("Temperature 0", "Temperature 1")
    name = "tiny-410M", "translation"
    assert row_of(zero, *name, "independent heads") == ["2.31", f"2.08{TIMES}", "3"]
    assert row_of(one, *name, "sequential drafter") == ["3.54", f"1.95{TIMES}", "6"]
    assert section.notes[0] == ceiling_of()["verdict"]
    survival, widths, times = section.folded
    assert row_of(survival, *name, "0", "independent heads")[:3] == ["0.700", "0.490", "0.343"]
    assert row_of(survival, *name, "1", "prompt lookup") == ["0.300", "0.200", "0.100", *[DASH] * 5]
    assert widths.rows == [(*name, "1.00", "1.02", "1.10", "1.31")]
    assert times.rows == [(*name, "0.021", "0.105", "0.030")]
    assert [k.label for k in section.charts[0].keys] == [*list(ceiling.KINDS.values())[:5]]


@pytest.mark.usefixtures("undrawn")
def test_an_early_exit_and_several_models_are_shown_too(tmp_path: Path):
    for model in MODELS:
        record = ceiling_of(model)
        record["temperatures"]["0"]["early_exit"] = [0.6, 0.2]
        record["predicted"]["0"]["early_exit"] = {"tokens_per_forward": 1.8, "speedup": 0.97}
        (tmp_path / f"ceiling-{model}.json").write_text(json.dumps(record))
    (section,) = ceiling.sections(ceiling.found(tmp_path))
    assert row_of(section.tables[0], "tiny-70M", "translation", "early exit") == ["1.80", f"0.97{TIMES}", DASH]
    assert len({c.name for c in section.charts}) == 6
    assert str(section.notes[0]).startswith("tiny-70M, translation: Sequential")


def test_a_broken_ceiling_is_named(tmp_path: Path, unsaved: None):
    for text in ("{", "[]", '{"head": {}}', json.dumps({**ceiling_of(), "more": 1})):
        (tmp_path / "ceiling-a.json").write_text(text)
        with pytest.raises(UserError, match=r"ceiling-a.json' is no file that this version"):
            ceiling.found(tmp_path)


# drawing


def test_a_saved_figure_grows_by_its_caption_and_its_keys(tmp_path: Path):
    """The plot keeps its height, whatever stands above and below it."""

    def plot(caption: str, keys: list[Key]) -> float:
        figure, axes = drawing(3.0)
        axes.plot([0, 1], [0, 1])
        save(chart("one", figure, caption, keys), tmp_path)
        figure.draw_without_rendering()
        return axes.get_position().height * figure.get_figheight()

    least = plot("short", [])
    styles = [*range(8), -1, -2, -3, -4]
    assert plot(
        "a long caption " * 20, [Key(f"a label of some words, number {i}", i) for i in styles]
    ) == pytest.approx(least, abs=0.35)
    names = re.findall(r"number -?\d+", (tmp_path / "one.svg").read_text())
    assert len(set(names)) == len(styles)


def test_hostile_names_stay_text_in_a_saved_figure(tmp_path: Path):
    figure, axes = drawing(3.0)
    axes.plot([0, 1], [0, 1])
    text = save(chart("one", figure, HOSTILE, [Key(HOSTILE, 0), Key(HOSTILE * 3, -1)]), tmp_path)[0].read_text("utf-8")
    assert "&lt;img src=x" in text and "\\frac$" in text
    assert not re.search(r"<(?:img|/?script)|[\x00-\x08\x0b-\x1f]", text)


def test_a_saved_figure_is_the_same_every_time(tmp_path: Path):
    found: list[list[bytes]] = []
    for _ in range(2):
        figure, axes = drawing(3.0)
        axes.plot([0, 1], [0, 1])
        found.append([f.read_bytes() for f in save(chart("one", figure, "caption", [Key("a", 0)]), tmp_path)])
    assert found[0] == found[1]


def test_axes_are_labelled_where_labels_fit():
    _, axes = drawing(3.0)
    axes.plot([70e6, 1e9, 1.1e9, 1.4e9, 12e9], [0.021, 0.022, 0.023, 0.024, 0.026])
    sizes(axes, [70_000_000, 1_000_000_000, 1_100_000_000, 1_400_000_000, 12_000_000_000])
    magnitudes(axes)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["70M", "1B", "", "", "12B"]
    low, high = axes.get_ylim()
    seen = [t for t in axes.get_yticks() if low <= t <= high]
    assert [axes.yaxis.get_major_formatter()(t, 0) for t in seen] == ["0.01", "0.02", "0.05"]


def test_free_html_stands_in_its_section():
    text = body([Section("Strips", free="<b>free</b>"), Section("Other")])
    assert text.index("Strips") < text.index("<b>free</b>") < text.index("Other")
