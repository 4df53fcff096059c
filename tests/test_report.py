"""The report: its figures against sums done by hand, and a page that nothing in the results can break."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import pytest

from foretoken.bench.report import charts
from foretoken.bench.report import page as report
from foretoken.bench.report.contents import sections
from foretoken.bench.report.figures import Acceptance, Overall, Place, Spread
from foretoken.bench.report.samples import samples
from foretoken.bench.report.summary import foretold, foretold_by_method, summarize, within
from foretoken.bench.report.versus import versus
from foretoken.bench.rows import FILE, Cost, Results, Row, Run, Skip, Writer, read
from foretoken.errors import UserError
from foretoken.report.tables import Table, amount, escaped, html, markdown, size
from tests.models import BITSTORIES

MACHINE = {"processor": "A CPU (AVX512)", "threads": 2, "memory_gib": 31.2, "python": "3.11.2", "torch": "2.11.0"}
RUN = Run(
    *("r1", "foretoken bench model --out out", "2026-11-21T12:00:00", str(BITSTORIES), 3_000_000, 180_000_000),
    *("bfloat16", "cpu", 30.0, MACHINE, {"seed": 0}),
)
TRUTH = {  # τ, seconds of a token over plain's at batch 1, extra parameters
    "none": (1.0, 1.0, 0),
    "suffix": (2.2, 0.6, 0),
    "eagle3": (3.6, 0.42, 400_000),
    "medusa": (2.1, 0.65, 900_000),
    "jacobi": (1.1, 1.4, 0),
    "medusa, typical": (2.6, 0.5, 900_000),
    "vllm": (1.0, 0.8, 0),
    "vllm:ngram": (2.0, 0.5, 0),
}
TASKS = {"stories": 0.9, "code": 1.2, "chat": 1.0}


def no_prediction(*_: object) -> None:
    return None


def row(method: str = "none", rate: float = 100.0, **changes: object) -> Row:
    """A row of 10 tokens, all else the least that a row can be."""
    known = {
        **{"run": "r1", "round": "1", "method": method, "drafter": method.partition(":")[0], "settings": {}},
        **{"rule": "match", "exact": True, "peer": ":" in method or method == "vllm", "requires": ""},
        **{"task": "code", "prompt": "code-0", "prompt_tokens": 5, "temperature": 0.0, "seed": 0, "batch": 1},
        **{"group": 0, "repeat": 0, "tokens": 10, "seconds": 10 / rate, "tokens_per_second": rate},
        **changes,
    }
    return Row(**known)


def plausible() -> Results:
    """3 tasks, 6 methods and 2 peers, batches 1, 4, 8, temperatures 0, 1, 4 groups, 3 repeats."""
    random, rows = Random(0), list[Row]()
    for batch in (1, 4, 8):
        for temperature in (0.0, 1.0):
            for task in TASKS:
                for repeat in range(3):
                    for group in range(4):
                        measured = [cell_rows(random, m, task, temperature, batch, group, repeat) for m in TRUTH]
                        rows += [r for some in measured for r in some]
    costs = [
        Cost(
            "r1",
            b,
            widths=[1, 2, 4, 8, 16, 32, 64],
            seconds=[8e-3 * (1 + b * w / 40) for w in (1, 2, 4, 8, 16, 32, 64)],
        )
        for b in (1, 4, 8)
    ]
    skips = [
        Skip("r1", "deepseek_mtp", "the model has no modules of its own, and no folder was given"),
        Skip("r1", "llama.cpp:draft", "llama-server is not installed; put it on the path or give --peer-path", 8, 1.0),
    ]
    return Results([RUN, replace(RUN, id="r2", date="2026-11-21T13:00:00")], rows, costs, skips)


def cell_rows(
    random: Random, method: str, task: str, temperature: float, batch: int, group: int, repeat: int
) -> list[Row]:
    """One group of one method, measured once."""
    tau, share, extra = TRUTH[method]
    tau = 1 + (tau - 1) * TASKS[task] * (0.6 if temperature else 1.0)
    share = 1 + (share / TASKS[task] - 1) / batch**0.4 if method != "none" else 1.0
    seconds = 64 * 0.01 * share * random.uniform(0.95, 1.05)
    forwards = round(63 / tau)
    peer, lossy = method.startswith("vllm"), method.endswith("typical")
    ids, drafted = [300 + i % 150 for i in range(64)], "".join(random.choice("011") for _ in range(63)) + "0"
    accepted = [] if tau == 1 or peer else [round(forwards * min(0.9, (tau - 1) / 2) ** i) for i in range(1, 6)]
    same = None if lossy and temperature else not (lossy and group == 1)
    return [
        row(
            method,
            64 * batch / seconds,
            round=f"{task} {temperature} {batch} {group} {repeat}",
            rule="typical" if lossy else "match",
            exact=not lossy,
            requires="trained heads" if extra else "",
            task=task,
            prompt=f"{task}-{group * batch + i}",
            temperature=temperature,
            batch=batch,
            group=group,
            repeat=repeat,
            tokens=64,
            seconds=seconds,
            first=None if peer else seconds * 0.1,
            draft=None if peer else seconds * 0.2,
            verify=None if peer else seconds * 0.6,
            own=None if peer else seconds * 0.1,
            forwards=None if peer else forwards,
            accepted=accepted,
            tokens_per_forward=None if peer else 63 / forwards,
            read_gb_s=None if peer else 21.0,
            peak_memory=600 << 20,
            extra_parameters=extra,
            extra_memory=2 * extra,
            same_as_plain=same,
            differs=None if same is not False else {"position": 17, "tokens": [301, 302], "gap": 0.4},
            ids=ids if repeat == 0 else None,
            drafted=None if repeat else "0" * 64 if method == "none" else None if peer else drafted,
        )
        for i in range(batch)
    ]


def guessed(results: Results, method: str, temperature: float, batch: int, task: str) -> float:
    """A prediction that is sometimes right."""
    return 1 / (1 + (TRUTH[method][1] / TASKS[task] - 1) / batch**0.35)


@pytest.fixture(scope="module")
def everything() -> Results:
    return plausible()


def made(folder: Path, results: Results) -> Path:
    writer = Writer(folder)
    writer.write([*results.runs, *results.rows, *results.costs, *results.skips])
    writer.close()
    return folder


# the figures


def cells_of(rows: list[Row], runs: list[Run] | None = None):
    return summarize(Results(runs or [RUN], rows, [], []), no_prediction)


def speedup(rows: list[Row], method: str = "suffix", task: str = "code") -> Spread | None:
    return cells_of(rows).cells[Place(method, task, 0.0, 1)].speedup


def test_a_method_is_compared_with_the_plain_row_of_its_own_round():
    """2, 3 and 4 times; plain rows of other rounds would give 200/100, 600/100, 120/100."""
    rows = [
        *(row("none", 100, round="a"), row("suffix", 200, round="a")),
        *(row("none", 200, round="b", repeat=1), row("suffix", 600, round="b", repeat=1)),
        *(row("none", 30, round="c", repeat=2), row("suffix", 120, round="c", repeat=2)),
    ]
    assert speedup(rows) == Spread(3.0, 2.5, 3.5, 3)


@pytest.mark.parametrize(
    "change",
    [{"round": "b"}, {"run": "r2"}, {"task": "chat"}, {"temperature": 1.0}, {"batch": 4}, {"group": 1}, {"repeat": 1}],
)
def test_without_a_plain_row_of_the_same_prompts_in_its_round_nothing_is_compared(change: dict[str, object]):
    summary = cells_of([row("suffix", 200), row("none", 100, **change)])
    assert all(c.speedup is None for c in summary.cells.values() if c.place.method == "suffix")
    assert summary.unmatched == 1
    assert ("suffix", 0.0, 1) not in summary.overall


def test_unmatched_rows_are_counted_and_the_others_compared():
    rows = [row("none", 100), row("suffix", 200), row("suffix", 900, round="2", repeat=1), row("jacobi", 1, round="3")]
    summary = cells_of(rows)
    assert summary.unmatched == 2
    assert speedup(rows) == Spread(2.0, 2.0, 2.0, 1)


def test_a_group_counts_once_however_many_prompts_it_has():
    """Group 0 has three prompts and is 2 times as fast, groups 1 and 2 one prompt and 4 and 6 times."""
    rows = [row(m, rate, prompt=f"code-{i}") for m, rate in (("none", 100), ("suffix", 200)) for i in range(3)]
    for group, rate in ((1, 400), (2, 600)):
        rows += [row("none", 100, group=group), row("suffix", rate, group=group)]
    assert speedup(rows) == Spread(4.0, 3.0, 5.0, 3)


def test_outputs_of_different_length_are_compared_by_tokens_per_second():
    """Half of the tokens in half of the time is no speed-up."""
    rows = [row("none", 100, tokens=64, seconds=0.64), row("suffix", 100, tokens=32, seconds=0.32)]
    assert speedup(rows) == Spread(1.0, 1.0, 1.0, 1)


def test_quartiles_are_interpolated():
    assert Spread.of([4.0, 1.0, 2.0, 3.0]) == Spread(2.5, 1.75, 3.25, 4)
    assert Spread.of([5.0]) == Spread(5.0, 5.0, 5.0, 1)
    assert Spread.of([]) is None


def test_over_tasks_is_the_geometric_mean_of_medians():
    rows = [
        *(row("none", 100, task="code"), row("suffix", 200, task="code")),
        *(row("none", 100, task="chat"), row("suffix", 800, task="chat")),
    ]
    found = cells_of(rows).overall["suffix", 0.0, 1]
    assert found.mean == pytest.approx(4.0)  # not 5, the arithmetic mean
    assert (found.least, found.most, found.tasks) == (2.0, 8.0, 2)
    spread = Overall.of([Spread(2.0, 1.0, 4.0, 3), Spread(8.0, 4.0, 9.0, 3)])
    assert spread is not None
    assert (spread.low, spread.high) == pytest.approx((2.0, 6.0))
    assert Overall.of([]) is None


def test_a_peer_is_compared_with_our_plain_and_with_its_own():
    rows = [row("none", 100), row("vllm", 160), row("vllm:ngram", 400), row("llama.cpp", 300)]
    summary = cells_of(rows)
    ngram, alone = (summary.cells[Place(name, "code", 0.0, 1)] for name in ("vllm:ngram", "vllm"))
    assert (ngram.speedup, ngram.own) == (Spread(4.0, 4.0, 4.0, 1), Spread(2.5, 2.5, 2.5, 1))
    assert (alone.speedup, alone.own) == (Spread(1.6, 1.6, 1.6, 1), None)
    assert summary.own["vllm:ngram", 0.0, 1].mean == pytest.approx(2.5)


def test_a_name_with_a_colon_is_no_peer():
    """`medusa:folder` has no plain decoding of its own called `medusa`."""
    rows = [row("none", 100), row("medusa", 200, peer=False), row("medusa:folder", 300, peer=False)]
    assert cells_of(rows).cells[Place("medusa:folder", "code", 0.0, 1)].own is None


def test_tokens_per_forward_leaves_out_the_first_token_and_sums_before_dividing():
    """(9 + 99) / (9 + 11): the mean of the rows' own quotients would be 5."""
    rows = [row("suffix", tokens=10, forwards=9), row("suffix", tokens=100, forwards=11, group=1), row("vllm")]
    summary = cells_of(rows)
    assert summary.cells[Place("suffix", "code", 0.0, 1)].tau == pytest.approx(5.4)
    assert summary.cells[Place("vllm", "code", 0.0, 1)].tau is None
    assert summary.methods[0].tau == {0.0: pytest.approx(5.4)}


def test_acceptance_is_summed_over_rows_of_different_depth():
    rows = [
        row("suffix", forwards=10, accepted=[8, 4, 2]),
        row("suffix", forwards=30, accepted=[12], group=1),
        row("suffix", forwards=0, tokens=1, group=2),
        row("suffix", forwards=100, accepted=[100], batch=4),  # another batch is no part of it
    ]
    found = cells_of(rows).methods[0].acceptance[0.0]
    assert found == Acceptance(40, [20, 4, 2])
    assert found.unconditional == [0.5, 0.1, 0.05]
    assert found.conditional == [0.5, 0.2, 0.5]


def test_conditional_acceptance_is_unknown_behind_a_depth_that_was_never_accepted():
    assert Acceptance(10, [5, 0, 0]).conditional == [0.5, 0.0, None]
    assert Acceptance(0, []).unconditional == []


def test_sameness_counts_prompts_of_the_first_repeat_that_should_be_the_same():
    parts = {"position": 3, "tokens": [1, 2], "gap": 0.01}
    rows = [
        row("suffix", same_as_plain=True),
        row("suffix", same_as_plain=False, differs=parts, prompt="code-1"),
        row("suffix", same_as_plain=None, prompt="code-2"),
        row("suffix", same_as_plain=False, repeat=1),
    ]
    summary = cells_of(rows)
    method, cell = summary.methods[0], summary.cells[Place("suffix", "code", 0.0, 1)]
    assert (method.same, method.judged) == (cell.same, cell.judged) == (1, 2)
    assert [r.prompt for r in summary.differing] == ["code-1"]


def test_a_method_is_exact_only_if_all_its_rows_are():
    rows = [row("suffix"), row("suffix", exact=False, rule="typical", temperature=1.0)]
    method = cells_of(rows).methods[0]
    assert (method.exact, method.rule) == (False, "typical")


def test_forwards_are_medians_over_runs_and_v_is_over_width_one():
    costs = [
        Cost("r1", 1, widths=[8, 1], seconds=[0.03, 0.01]),
        Cost("r2", 1, widths=[1, 8], seconds=[0.02, 0.05]),
        Cost("r1", 4, widths=[2], seconds=[0.07]),
        Cost("r1", 1, method="suffix", task="code", draft=9.0),
    ]
    summary = summarize(Results([RUN], [row()], costs, []), no_prediction)
    first, second = summary.forwards
    assert (first.batch, first.widths, first.seconds) == (1, [1, 8], [0.015, 0.04])
    assert first.ratios == [1.0, pytest.approx(0.04 / 0.015)]
    assert second.ratios == [None]
    assert summary.floor == pytest.approx(180e6 / 30e9)


def test_a_prediction_counts_within_ten_per_cent_of_the_measured():
    expected = {"code": 2.19, "chat": 1.85, "stories": 2.21}
    rows = [row(m, rate, task=t) for t in expected for m, rate in (("none", 100), ("suffix", 200))]
    summary = summarize(Results([RUN], rows, [], []), lambda results, method, t, batch, task: expected[task])
    assert within(foretold(summary).values()) == (2, 3)
    (pair,) = foretold_by_method(summary).values()
    assert pair == pytest.approx(((2.19 * 1.85 * 2.21) ** (1 / 3), 2.0))
    assert summary.cells[Place("none", "code", 0.0, 1)].predicted is None


def test_the_shares_of_time_are_of_groups_and_not_of_rows():
    times = {"first": 0.1, "draft": 0.2, "verify": 0.6, "own": 0.1}
    rows = [row("suffix", prompt=f"code-{i}", seconds=1.0, **times) for i in range(2)]
    rows.append(row("suffix", group=1, seconds=3.0, first=0.3, draft=2.0, verify=0.6, own=0.1))
    parts = cells_of(rows).methods[0].parts[0.0]
    assert (parts.first, parts.draft, parts.verify, parts.own) == pytest.approx((0.1, 0.55, 0.3, 0.05))
    assert cells_of([row("vllm")]).methods[0].parts == {}


def test_methods_are_sorted_by_speed_and_peers_come_last(everything: Results):
    summary = summarize(everything, guessed)
    names = [m.name for m in summary.methods]
    assert names == ["eagle3", "medusa, typical", "suffix", "medusa", "none", "jacobi", "vllm:ngram", "vllm"]
    for name, (_, share, _) in TRUTH.items():
        if name != "none":
            expected = math.prod(x / share for x in TASKS.values()) ** (1 / 3)
            assert summary.overall[name, 0.0, 1].mean == pytest.approx(expected, rel=0.04)
    assert summary.cells[Place("eagle3", "code", 1.0, 8)].speedup.n == 12  # pyright: ignore[reportOptionalMemberAccess]
    assert summary.unmatched == 0
    assert summary.methods[0].share == pytest.approx(400_000 / 3_000_000)


# the report


class Page(HTMLParser):
    """The tags, ids and references of a page; every tag must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.words = [], set(), [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "wbr"):
            self.open.append(tag)
        known = dict(attrs)
        self.ids += [known["id"]] if "id" in known else []
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        assert not any(k.startswith("on") for k in known)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag != "meta":
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if not (self.open and self.open[-1] == "style"):
            self.words.append(data)


def pages(folder: Path, results: Results, predict=no_prediction) -> tuple[str, str]:
    made(folder, results)
    report.run([folder], None, predict)
    return (folder / "report.html").read_text("utf-8"), (folder / "report.md").read_text("utf-8")


@pytest.fixture(scope="module")
def written(everything: Results, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return pages(tmp_path_factory.mktemp("results"), everything, guessed)


def test_a_page_needs_nothing_but_itself(written: tuple[str, str]):
    page = Page(written[0])
    assert not page.tags & {"script", "link", "img", "iframe", "object", "image"}
    assert all(link and link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert all(found in page.ids for found in re.findall(r"url\(#([^)]*)\)", written[0]))
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"url\((?!#)|@import", written[0])


def test_the_figures_use_the_page_s_colours(written: tuple[str, str]):
    """A colour of matplotlib's own would not be readable on a dark page."""
    drawn = "".join(re.findall(r"<svg.*?</svg>", written[0], re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}", drawn)) == set()
    assert "<text" in drawn


def test_every_section_is_in_both(written: tuple[str, str], everything: Results):
    words = "".join(Page(written[0]).words)
    titles = [s.title for s in sections(summarize(everything, guessed))]
    assert len(titles) == 10
    for title in titles:
        assert title in words
        assert f"## {title}" in written[1]
    assert "Which tokens were guessed" in words


def test_every_figure_has_its_numbers_as_a_table(everything: Results):
    found = [s for s in sections(summarize(everything, guessed)) if s.charts]
    assert [len(s.charts) for s in found] == [2, 2, 1, 1, 2]
    assert all(s.folded for s in found)


def test_acceptance_is_drawn_of_those_that_accept_most():
    """Nine methods, the slowest of which emits the most tokens per forward; the others keep their colours."""
    rows = [row()]
    for i in range(9):
        forwards = 9 if i == 0 else 3 if i == 8 else 4  # m0 is the fastest, m8 the slowest
        rows.append(row(f"m{i}", 900 - 50 * i, forwards=forwards, accepted=[1]))
    summary = cells_of(rows)
    style, drawn = charts.styles(summary), charts.most_accepting(summary, 0.0)
    assert list(drawn) == ["m8", *(f"m{i}" for i in range(1, 8))]
    assert {name: i for name, i in drawn.items() if name != "m8"} == {f"m{i}": style[f"m{i}"] for i in range(1, 8)}
    assert sorted(drawn.values()) == list(range(charts.MOST))
    chart = charts.acceptance(summary, 0.0)
    assert chart is not None
    assert [key.label for key in chart.keys] == list(drawn)


def test_lossy_methods_and_what_was_skipped_are_said(written: tuple[str, str]):
    page, text = written
    assert '<span class="lossy">LOSSY: typical</span>' in page
    assert "**LOSSY: typical**" in text
    assert "| llama.cpp:draft | 8 | 1 | llama-server is not installed" in text
    assert "| medusa, typical | 0 | 1 | 3 of 12 | 0.4 |" in text
    assert "90 of 90 single cells" in text


def test_markdown_tables_have_as_many_cells_in_every_row(written: tuple[str, str]):
    for block in re.findall(r"(?:^\|.*\n)+", written[1], re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_the_same_results_give_the_same_bytes(written: tuple[str, str], everything: Results, tmp_path: Path):
    assert pages(tmp_path, everything, guessed) == written


HOSTILE = (
    "</script></style><script>alert(1)</script>--><img src=x onerror=alert(1)>|`*_x_*`[a](b)$\\frac$\x1b[31m\x00\n# h"
)


def test_hostile_names_stay_text(tmp_path: Path):
    rows = [
        row(m, rate, task=HOSTILE, prompt=HOSTILE, requires=HOSTILE, rule=HOSTILE, exact=False, same_as_plain=False)
        for m, rate in (("none", 100.0), (HOSTILE, 200.0))
    ]
    rows = [replace(r, forwards=5, accepted=[3], ids=[1, 2], drafted="10", differs={"tokens": [HOSTILE]}) for r in rows]
    runs = [replace(RUN, model=HOSTILE, command=HOSTILE, machine={HOSTILE: HOSTILE, "processor": HOSTILE})]
    costs = [Cost("r1", 1, widths=[1, 2], seconds=[0.1, 0.2])]
    html, text = pages(tmp_path, Results(runs, rows, costs, [Skip("r1", HOSTILE, HOSTILE)]), lambda *_: 2.0)
    page = Page(html)
    assert not page.tags & {"script", "img", "a"}
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", html + text)
    assert "<script" not in html
    assert not re.search(r"<(?!/?(?:details|summary))", text)
    assert not re.search(r"(?m)^# h|(?<!\\)[`*]x|(?<!\\)\]\(b|(?<!\\)\$", text.replace("**", ""))
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_half_a_character_does_not_stop_the_report(tmp_path: Path):
    html, _ = pages(tmp_path, Results([RUN], [row(), row("suffix", prompt="\ud800", requires="\ud800 中 😀")], [], []))
    assert "? 中 😀" in html


def test_the_least_results_make_a_report(tmp_path: Path):
    """One plain row, or one method without plain: nothing to draw, and every section says so."""
    for i, only in enumerate((row(), row("suffix"))):
        html, text = pages(tmp_path / str(i), Results([RUN], [only], [], []))
        Page(html)
        for words in ("No guess was accepted.", "It was not timed.", "Nothing was predicted", "Only batch 1"):
            assert words in text
    assert "1 row without a plain row" in text


def test_different_machines_are_warned_about():
    other = replace(RUN, id="r2", machine={**MACHINE, "processor": "Another"})
    warned = sections(cells_of([row(), row("suffix", run="r2")], [RUN, other]))[0].notes
    assert len(warned) == 1
    assert "A CPU (AVX512), 2 threads, 31.2 GiB / Another, 2 threads, 31.2 GiB" in str(warned[0])
    assert not sections(cells_of([row()], [RUN, other]))[0].notes  # it left no rows


# texts


def test_texts_are_of_one_prompt_that_most_methods_decoded():
    ids = {"ids": [300, 301], "drafted": "10"}
    rows = [
        row("none", prompt="a", task="chat", **ids),
        *(row(m, prompt="b", temperature=t, **ids) for t in (1.0, 0.0) for m in ("none", "suffix")),
        row("suffix", prompt="c", **{**ids, "drafted": "1"}),  # torn
    ]
    found = samples(cells_of(rows))
    assert found is not None
    assert [(r.method, r.prompt, r.temperature) for r in found.rows] == [("none", "b", 0.0), ("suffix", "b", 0.0)]
    assert found.note == ""
    assert [s.drafted for s in found.spans[0]] == [True, False]
    assert samples(cells_of([row()])) is None


def test_without_the_tokenizer_tokens_are_numbers(tmp_path: Path):
    rows = [row("suffix", ids=[7, 8, 9], drafted="010")]
    found = samples(cells_of(rows, [replace(RUN, model=str(tmp_path))]))
    assert found is not None
    assert [(s.text, s.drafted, s.step) for s in found.spans[0]] == [
        ("7 ", False, 0),
        ("8 ", True, 1),
        ("9 ", False, 1),
    ]
    assert "could not be loaded" in found.note


# two folders


def test_two_folders_side_by_side(everything: Results, tmp_path: Path):
    """B: suffix a fifth faster, jacobi gone, another dtype and torch; medusa told something else."""
    rows = [
        replace(r, tokens_per_second=r.tokens_per_second * 1.2) if r.method == "suffix" else r
        for r in everything.rows
        if r.method != "jacobi" and r.batch == 1
    ]
    rows = [replace(r, settings={"nodes": 9}) if r.method == "medusa" else r for r in rows]
    run = replace(RUN, dtype="float32", machine={**MACHINE, "torch": "2.12"})
    a, b = (summarize(r, guessed) for r in (everything, Results([run], rows, [], [])))
    differs, both, alone = versus(a, b)
    assert [r[0] for r in differs.tables[0].rows] == ["dtype", "versions", "prompts"]
    assert list(map(str, differs.tables[1].rows[0])) == ["medusa", "medusa, rule match", "medusa, nodes 9, rule match"]
    table = both.tables[0]
    assert len(table.rows) == 7 * 3 * 2
    verdicts = {(str(r[0]), str(r[6]), str(r[7]), str(r[11])) for r in table.rows}
    assert {v for v in verdicts if v[0] == "suffix"} == {("suffix", "1.20", "faster", "faster")}
    assert {v[1:] for v in verdicts if v[0] not in ("suffix", "none")} == {("1.00", "the same", "the same")}
    assert {v[1:] for v in verdicts if v[0] == "none"} == {("–", "–", "the same")}  # noqa: RUF001
    assert ("A", "jacobi, in every cell") in alone.tables[0].rows
    made(tmp_path / "a", everything)
    made(tmp_path / "b|", Results([run], rows, [], []))
    report.run([tmp_path / "a", tmp_path / "b|"], None, guessed)
    Page((tmp_path / "a" / "compare_b_.html").read_text("utf-8"))
    assert "# a (A) and b\\| (B)" in (tmp_path / "a" / "compare_b_.md").read_text("utf-8")


def test_overlapping_ranges_are_called_the_same():
    def at(*rates: float) -> list[Row]:
        return [r for i, x in enumerate(rates) for r in (row("none", 1, group=i), row("suffix", x, group=i))]

    def verdict(a: list[Row], b: list[Row]) -> str:
        return next(str(r[7]) for r in versus(cells_of(a), cells_of(b))[1].tables[0].rows if r[0] == "suffix")

    assert verdict(at(1, 2, 3), at(2.4, 2.6, 2.8)) == "the same"  # quartiles 1.5 to 2.5, and 2.5 to 2.7
    assert verdict(at(1, 2, 3), at(2.6, 2.6, 2.8)) == "faster"
    assert verdict(at(2.6, 2.6, 2.8), at(1, 2, 3)) == "slower"


# words


def test_markdown_is_escaped():
    assert escaped("a|b\nc <d> & `e` prompt_lookup _f_ *g* \x1b") == (
        "a\\|b c &lt;d&gt; &amp; \\`e\\` prompt_lookup \\_f\\_ \\*g\\* ␛"
    )


def test_a_table_in_both_languages():
    table = Table("T & U", ("name", "n"), [("a|b", "1"), ("<c>", "2")])
    assert markdown(table).splitlines()[2:] == ["| name | n |", "| --- | ---: |", "| a\\|b | 1 |", "| &lt;c&gt; | 2 |"]
    assert "<caption>T &amp; U</caption>" in html(table)
    assert '<th scope="row" class="w">&lt;c&gt;</th><td>2</td>' in html(table)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (8, "8 B"), (1536, "1.5 KiB"), (3 << 20, "3 MiB"), (5 << 30, "5 GiB")]
)
def test_sizes(count: int, text: str):
    assert size(count) == text


@pytest.mark.parametrize(("count", "text"), [(12, "12"), (894_000, "894k"), (1_720_000, "1.72M"), (7e9, "7B")])
def test_amounts(count: float, text: str):
    assert amount(count) == text


# what cannot work


def test_what_is_no_folder_of_results_is_said_in_one_sentence(tmp_path: Path):
    with pytest.raises(UserError, match=f"holds no {FILE}"):
        report.run([tmp_path / "nothing"], None, no_prediction)
    with pytest.raises(UserError, match="0 folders came"):
        report.run([], None, no_prediction)
    with pytest.raises(UserError, match="3 folders came"):
        report.run([tmp_path] * 3, None, no_prediction)


def test_results_without_rows_are_said(tmp_path: Path):
    made(tmp_path, Results([RUN], [], [], []))
    with pytest.raises(UserError, match="holds no rows yet"):
        report.run([tmp_path], None, no_prediction)


def test_results_of_another_version_are_said(tmp_path: Path):
    made(tmp_path, Results([RUN], [row()], [], []))
    lines = (tmp_path / FILE).read_text().splitlines()
    (tmp_path / FILE).write_text("\n".join([json.dumps({**json.loads(lines[0]), "format": 99}), *lines[1:], ""]))
    with pytest.raises(UserError, match="another version"):
        report.run([tmp_path], None, no_prediction)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path):
    made(tmp_path / "results", Results([RUN], [row()], [], []))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give --out"):
        report.run([tmp_path / "results"], tmp_path / "file" / "out", no_prediction)


def test_out_is_another_folder(tmp_path: Path):
    made(tmp_path / "results", Results([RUN], [row()], [], []))
    report.run([tmp_path / "results"], tmp_path / "out", no_prediction)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "report.md"]
    assert read(tmp_path / "results").rows == [row()]


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    made(tmp_path, Results([RUN], [row(), row("suffix", 200)], [], []))
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'foretoken\[bench\]'"):
        report.run([tmp_path], None, no_prediction)
