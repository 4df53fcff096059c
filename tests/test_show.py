"""Who said what: spans of tokens, their colours, and the page."""

from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.segment import Segment
from rich.style import Style

import foretoken
from foretoken import Output, UserError
from foretoken.decode import Session
from foretoken.page import DARK, LIGHT, STYLE, Answer, page, write_page
from foretoken.progress import batch_progress, progress
from foretoken.show import Span, Spans, coloured, counts, legend, spans_of, visible
from tests.models import BITSTORIES, STORIES, asset

TARGET = asset(BITSTORIES)
TOKENIZER = TARGET.tokenizer
assert TOKENIZER is not None
PROMPT = "Once upon a time, there was a"
IDS = list(TOKENIZER(PROMPT)["input_ids"])


def answered(**keywords: object) -> Output:
    settings = {"drafter": f"draft_model:{STORIES}", "max_new_tokens": 60, **keywords}
    return foretoken.generate(TARGET, PROMPT, **settings)


def byte_tokens(text: str) -> list[int]:
    """The byte tokens of a text that the vocabulary lacks."""
    return [TOKENIZER.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]


def steps_of(drafted: list[bool]) -> list[int]:
    """Which forward brought each token: the slow, obvious count."""
    return [sum(not d for d in drafted[:i]) for i in range(len(drafted))]


# spans


def test_spans_are_the_tokens_with_their_forwards():
    """On a text whose tokens are whole characters, one span per token, flagged and numbered as the output says."""
    out = answered()
    spans = spans_of(TOKENIZER, IDS, out)
    assert "".join(s.text for s in spans) == out.text
    assert [s.drafted for s in spans] == out.drafted
    assert [s.step for s in spans] == steps_of(out.drafted)
    assert spans[-1].step == out.forwards
    assert any(out.drafted)


@pytest.mark.parametrize("keywords", [{"stop": ["Lily"]}, {"temperature": 1.0, "seed": 3}, {"max_new_tokens": 7}])
def test_spans_end_with_the_text(keywords: dict[str, object]):
    out = answered(**keywords)
    spans = spans_of(TOKENIZER, IDS, out)
    assert "".join(s.text for s in spans) == out.text
    assert {s.step for s in spans} <= set(range(out.forwards + 1))


def test_a_streamed_text_has_the_same_spans():
    out = answered(stop=["park"])
    spans = Spans(TOKENIZER, IDS)
    found: list[Span] = []
    for piece in foretoken.stream(TARGET, PROMPT, drafter=f"draft_model:{STORIES}", max_new_tokens=60, stop=["park"]):
        spans.push(piece.token_ids, piece.drafted)
        if piece.output is not None:
            spans.finish()
        found += spans.take(len(piece.text))
    whole = spans_of(TOKENIZER, IDS, out)
    per_character = [[(c, s.drafted, s.step) for s in some for c in s.text] for some in (found, whole)]
    assert per_character[0] == per_character[1]


@pytest.mark.parametrize(
    ("drafted", "kind", "step"),
    [
        ([True, True, True, True], True, 0),
        ([True, True, True, False], False, 0),
        ([True, False, True, True], False, 1),
        ([False, False, False, True], False, 3),
    ],
)
def test_a_character_of_several_tokens_is_one_span(drafted: list[bool], kind: bool, step: int):
    """It counts as drafted only if all of it was, and belongs to the forward that completed it."""
    spans = Spans(TOKENIZER, IDS)
    tokens = byte_tokens("😀")
    spans.push(tokens[:2], drafted[:2])
    assert spans.take(9) == []
    spans.push(tokens[2:], drafted[2:])
    assert spans.take(9) == [Span("😀", kind, step)]


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    spans = Spans(TOKENIZER, IDS)
    spans.push(byte_tokens("é"), [False, True])
    spans.push(byte_tokens("😀")[:2], [True, False])
    spans.finish()
    first, rest = spans.take(1), spans.take(9)
    assert first == [Span("é", False, 1)]
    assert {(s.drafted, s.step) for s in rest} == {(False, 1)}
    assert set("".join(s.text for s in rest)) == {"\ufffd"}


def test_special_tokens_leave_no_mark():
    """An end token in the middle has no text, and does not make the character behind it the target's."""
    spans = Spans(TOKENIZER, IDS)
    letter = TOKENIZER.convert_tokens_to_ids("z")
    spans.push([TOKENIZER.eos_token_id, letter], [False, True])
    assert spans.take(9) == [Span("z", True, 1)]


def test_take_splits_a_span():
    spans = Spans(TOKENIZER, IDS)
    spans.push(TOKENIZER.convert_tokens_to_ids(["▁little"]), [True])
    assert spans.take(3) == [Span(" li", True, 0)]
    assert spans.take(0) == []
    assert spans.take(100) == [Span("ttle", True, 0)]


# the terminal


def test_control_characters_become_pictures():
    assert visible("a\x1b[31m\r\x00\x7f\x9b b\n\tc") == "a␛[31m␍␀␡\ufffd b\n\tc"


def test_colours_say_how_a_token_came():
    parts = [Span("ab", True, 1), Span("c\nd", False, 2)]
    ab, c, newline, d = coloured(parts).segments
    assert [s.text for s in (ab, c, newline, d)] == ["ab", "c", "\n", "d"]
    assert ab.style is not None
    assert c.style is not None
    assert (ab.style.bold, ab.style.underline) == (None, True)
    assert ab.style.color != c.style.color
    assert (c.style.bold, c.style.underline) == (True, False)
    assert newline == Segment("\n")
    assert d.style == c.style


def test_terminal_gets_codes_and_a_pipe_gets_text():
    parts = [Span(" ab " * 40, True, 1), Span("c\n", False, 2)]
    written = {}
    for terminal in (True, False):
        file = StringIO()
        console = Console(file=file, force_terminal=terminal, color_system="standard" if terminal else None, width=60)
        console.print(coloured(parts), end="", soft_wrap=True)
        written[terminal] = file.getvalue()
    assert written[False] == " ab " * 40 + "c\n"
    assert "\x1b[4;32m ab " in written[True]
    assert "\x1b[1;33mc" in written[True]


def test_the_legend_is_painted_as_the_text_is():
    styles = {s.text: s.style for s in legend().segments}
    drafted, target = coloured([Span("x", True, 0), Span("y", False, 0)]).segments
    off = Style(underline=False)
    assert drafted.style == styles["drafted and accepted"] + off
    assert target.style == styles["emitted by the target"] + off
    assert coloured([Span("x", True, 1)]).segments[0].style.underline
    assert styles["every other forward"].underline


def test_counts_add_up():
    outs = [answered(), answered(max_new_tokens=20)]
    tokens, forwards = 80, sum(o.forwards for o in outs)
    assert counts(outs) == (
        f"80 tokens, {forwards} forwards, {(tokens - 2) / forwards:.2f} tokens per forward, "
        f"{max(o.seconds for o in outs):.2f} s"
    )
    assert counts([answered(max_new_tokens=1)]).startswith("1 token, 0 forwards, 0.00 tokens per forward")


# the page


class Reader(HTMLParser):
    """Collects the text per innermost class, the attributes that could load something, and unclosed elements."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.found: list[tuple[str, str]] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: set[str] = set()
        self.styles: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        self.styles += [v for k, v in attrs if k == "style" and v]
        if tag != "meta":
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.found.append((self.open[-1][1] if self.open else "", data))

    def text(self, *classes: str) -> str:
        return "".join(text for kind, text in self.found if kind in classes)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_holds_the_whole_text_and_its_numbers():
    out = answered()
    spans = spans_of(TOKENIZER, IDS, out)
    html = page([Answer(PROMPT, out, spans)], {"model": "some/model", "rule": "match", "seed": "7"})
    reader = read(html)
    assert reader.text("prompt") == PROMPT
    legend = {"d": "drafted", "t": "target"}
    for kind, drafted in (("d", True), ("t", False)):
        assert reader.text(kind) == legend[kind] + "".join(s.text for s in spans if s.drafted is drafted)
    plain = "".join(text for _, text in reader.found)
    for number in (f"{out.tokens_per_forward:.2f}", "60", str(out.forwards), f"{sum(out.drafted) / 60:.0%}"):
        assert number in plain
    assert "Exact" in plain
    assert html.count('<span class="step" title="forward ') == out.forwards
    assert reader.styles == [f"width:{share:.1%}" for share in out.accepted_per_depth]
    assert "seed" in plain
    assert "7" in plain


def test_the_page_needs_nothing_else():
    html = page([Answer("a", answered(max_new_tokens=3), [])], {"model": "m"})
    reader = read(html)
    assert reader.tags.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert {k for k, _ in reader.attributes}.isdisjoint({"src", "href", "onclick", "onload"})
    for needle in ("http", "url(", "@import"):
        assert needle not in html
    assert 'name="viewport"' in html
    for needle in ("prefers-color-scheme:dark", "@media print", "white-space:pre-wrap"):
        assert needle in STYLE


def test_the_page_escapes_what_model_and_user_say():
    evil = '<script>alert("&")</script>\x1b\x00'
    out = answered(max_new_tokens=3)
    html = page([Answer(evil, out, [Span("</div> a  b\n<b>", False, 0)])], {"model": evil, "stop": evil})
    assert "<script>" not in html
    assert "<b>" not in html
    reader = read(html)
    assert reader.text("prompt") == '<script>alert("&")</script>␛␀'
    assert reader.text("t") == "target</div> a  b\n<b>"


def test_a_lossy_rule_is_named_on_the_page():
    out = answered(rule="lossy_top_k")
    html = page([Answer(PROMPT, out, [])], {"model": "m", "rule": "lossy_top_k"})
    assert 'class="verdict lossy">LOSSY: the rule <em>lossy_top_k</em>' in html
    assert "Exact" not in html


def test_several_prompts_have_a_section_each_and_a_total():
    outs = [answered(max_new_tokens=9), answered(max_new_tokens=1)]
    html = page([Answer(str(i), o, []) for i, o in enumerate(outs)], {"model": "m"})
    assert "<h2>Prompt 1</h2>" in html
    assert "<h2>Prompt 2</h2>" in html
    assert f"2 prompts: {counts(outs)}" in html
    assert "No guess was accepted." in html


def luminance(colour: str) -> float:
    """WCAG 2 relative luminance of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_is_readable_on_its_ground(colours: dict[str, str]):
    """WCAG AA asks 4.5 for text and 3 for marks."""
    pairs = [("ink", "paper", 7.0), ("ink", "panel", 7.0), ("soft", "paper", 4.5), ("soft", "panel", 4.5)]
    pairs += [("drafted-ink", "drafted", 7.0), ("target-ink", "target", 7.0), ("lossy", "paper", 4.5)]
    pairs += [("bar", "track", 3.0), ("tick", "drafted", 3.0), ("tick", "target", 3.0)]
    for front, ground, least in pairs:
        light, dark = sorted((luminance(colours[front]), luminance(colours[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least, (front, ground)


def test_no_half_page_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "page.html"
    file.write_text("old")

    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match="No space left on device"):
        write_page(file, [Answer("a", answered(max_new_tokens=2), [])], {"model": "m"})
    assert [f.name for f in tmp_path.iterdir()] == ["page.html"]
    assert file.read_text() == "old"


# progress


@pytest.mark.parametrize(("terminal", "after", "seen"), [(True, 0.0, True), (True, 60.0, False), (False, 0.0, False)])
def test_a_bar_only_on_terminals_and_after_a_while(terminal: bool, after: float, seen: bool):
    file = StringIO()
    with progress(Console(file=file, force_terminal=terminal, width=100), after) as update:
        update("reading", 3, 8)
        update("reading", 8, 8)
    assert ("reading" in file.getvalue() and "8/8" in file.getvalue()) is seen
    assert bool(file.getvalue()) is seen


def test_batch_progress_counts_to_the_end():
    """Rows that end early count as whole, rows still running by their tokens."""
    seen: list[tuple[str, int, int]] = []
    report = batch_progress(lambda *args: seen.append(args), 3, 30)
    running: list[int] = []

    def on_step(session: Session) -> None:
        running.append(sum(len(row.output) for row in session.rows if row.finish is None))
        report(session)

    prompts = [PROMPT, "Tom said", "The dog"]
    outs = foretoken.generate(
        TARGET, prompts, max_new_tokens=30, batch_size=2, stop=["Lily"], drafter="none", on_step=on_step
    )
    assert {o.finish for o in outs} == {"stop", "length"}
    done = [d for _, d, _ in seen]
    assert done == sorted(done)
    assert seen[0] == ("0 of 3 prompts, tokens", running[0], 90)
    assert seen[-1] == ("3 of 3 prompts, tokens", 90, 90)


def test_a_long_prompt_reports_what_was_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("foretoken.target.CHUNK", 64)
    seen: list[tuple[int, int]] = []
    prompt = IDS[:1] + [IDS[1]] * 149
    foretoken.generate(TARGET, [prompt, prompt[:70]], max_new_tokens=2, on_read=lambda *a: seen.append(a))
    assert seen == [(64, 150), (128, 150), (150, 150)]
    seen.clear()
    list(foretoken.stream(TARGET, prompt[:65], max_new_tokens=2, on_read=lambda *a: seen.append(a)))
    assert seen == [(64, 65), (65, 65)]
