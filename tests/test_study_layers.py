"""Layers read through the output head: against the model cut after that layer, and sums done slowly."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM
from typer.testing import CliRunner

from foretoken.analysis import lens
from foretoken.commands.analyze.layers import layers
from foretoken.errors import UserError
from foretoken.report.drawing import MOST
from foretoken.report.tables import Section
from foretoken.study import layers as study
from foretoken.study import rows
from foretoken.study.layers import chunk_rows, pieces, read, readable, rows_of, run
from foretoken.study.rows import Head, Rows
from foretoken.study.views.layers import sections, strip_html
from foretoken.study.windows import Window
from foretoken.target import Target
from tests.families import VOCAB, make, quietly
from tests.models import STORIES, asset
from tests.tiny import save, walking

FAMILIES = ("llama", "qwen3", "gpt2", "gemma2", "phi", "gpt_neox", "granite", "cohere", "opt", "gemma3_vision")
"""Norms before and after, scaled embeddings, bounded, multiplied and divided logits, head biases, learnt positions."""


def text(length: int = 24, seed: int = 1) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / math.fsum(weights) for w in weights]


def slowly(layer: list[float], final: list[float], following: int) -> dict[str, float]:
    """A position's measures from their definitions."""
    q, p = softmax(layer), softmax(final)
    order = sorted(range(len(layer)), key=lambda v: (-layer[v], v))
    return {
        "kl_layer_final": math.fsum(a * math.log(a / b) for a, b in zip(q, p, strict=True) if a),
        "kl_final_layer": math.fsum(b * math.log(b / a) for a, b in zip(q, p, strict=True) if b),
        "entropy": -math.fsum(a * math.log(a) for a in q if a),
        "overlap": 1 - math.fsum(abs(a - b) for a, b in zip(q, p, strict=True)) / 2,
        "agrees": int(order[0] == min(range(len(p)), key=lambda v: (-final[v], v))),
        "rank": order.index(following),
    }


def own_logits(target: Target, tokens: list[int]) -> Tensor:
    """[T, V] of the model itself."""
    with torch.no_grad():
        return target.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


# ---------------------------------------------------------------------------------------------------------- measures


@pytest.mark.parametrize("seed", range(3))
def test_measures_are_those_of_the_definitions(seed: int):
    draw = torch.Generator().manual_seed(seed)
    layer, final = (torch.randn(7, 11, generator=draw, dtype=torch.float64) * 3 for _ in range(2))
    layer[2], layer[3] = final[2], layer[3].round()  # the same law; equal logits
    following = torch.randint(11, (7,), generator=draw)
    found = lens.likeness(layer, final, following)
    for i in range(7):
        for name, value in slowly(layer[i].tolist(), final[i].tolist(), int(following[i])).items():
            assert float(getattr(found, name)[i]) == pytest.approx(value, abs=1e-12), name
    assert found.kl_layer_final[2] == found.kl_final_layer[2] == 0
    assert bool((found.kl_layer_final[:2] != found.kl_final_layer[:2]).all())  # else no direction is tested


def test_of_equal_logits_the_first_is_likeliest():
    """As bfloat16 has them often: rank 0 and argmax are the same token."""
    logits = torch.tensor([1.0, 5.0, 5.0, 2.0, 5.0], dtype=torch.bfloat16).expand(5, 5)
    assert lens.rank(logits, torch.arange(5)).tolist() == [4, 0, 1, 3, 2]
    assert int(logits[0].argmax()) == 1


def test_laws_in_half_precision_are_taken_in_float32():
    logits = (torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    wide = logits.double().log_softmax(-1)
    assert lens.log_law(logits).dtype == torch.float32
    assert float((lens.log_law(logits) - wide).abs().max()) < 1e-5


@pytest.mark.parametrize("number", range(2**5))
def test_settled_and_first_for_every_pattern(number: int):
    agrees = [bool(number >> i & 1) for i in range(5)]
    settled = [layer for layer in range(6) if all(agrees[layer:])]
    first = [layer for layer in range(6) if layer == 5 or agrees[layer]]
    assert (lens.settled_of(agrees), lens.first_of(agrees)) == (min(settled), min(first))


# ------------------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_the_laws_of_the_model_cut_there(name: str):
    """With the norm, layer l is the model without its later layers; the last layer is the model itself."""
    target, tokens = make(name), text()
    L = readable(target)
    found = rows_of(target, Window(3, 2, 40, tokens))
    final = own_logits(target, tokens)
    cut = [own_logits(target.shallow(layer), tokens) for layer in range(1, L)] + [final]
    assert [row["context"] for row in found] == list(range(1, len(tokens)))
    for t, row in enumerate(found):
        assert (row["window"], row["document"], row["position"]) == (3, 2, 40 + t)
        assert (row["token"], row["next"]) == (tokens[t], tokens[t + 1])
        expected = [slowly(law[t].tolist(), final[t].tolist(), tokens[t + 1]) for law in cut]
        for layer, one in enumerate(expected, 1):
            for measure, value in one.items():
                assert row["normed"][measure][layer] == pytest.approx(value, rel=1e-4, abs=1e-6), (layer, measure)
        assert row["normed"]["kl_layer_final"][L] == row["normed"]["kl_final_layer"][L] == 0
        assert row["normed"]["overlap"][L] == pytest.approx(1, abs=1e-12) and row["normed"]["agrees"][L] == 1
        assert row["entropy"] == pytest.approx(expected[-1]["entropy"], rel=1e-4)
        agrees = row["normed"]["agrees"]
        assert row["settled"] == min(layer for layer in range(L + 1) if all(agrees[layer:]))
        assert row["first"] == agrees.index(1)
    spread = {tuple(row["normed"]["agrees"]) for row in found}
    assert len(spread) > 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox", "granite"])
def test_without_the_norm_the_head_reads_what_the_blocks_write(name: str):
    """States caught at each block's output, multiplied by the head by hand."""
    target, tokens = make(name), text(9)
    blocks = next(m for m in target.decoder.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    caught: list[Tensor] = []
    hooks = [blocks[0].register_forward_pre_hook(lambda _, given: caught.append(given[0]))]
    hooks += [
        b.register_forward_hook(lambda _, __, out: caught.append(out[0] if isinstance(out, tuple) else out))
        for b in blocks
    ]
    final = own_logits(target, tokens)
    for hook in hooks:
        hook.remove()
    assert len(caught) == 4
    head, found = target.model.get_output_embeddings(), rows_of(target, Window(0, 0, 0, tokens))
    scale = 1 / getattr(target.config, "logits_scaling", 1.0)
    bound = getattr(target.config, "final_logit_softcapping", 0)
    for layer, state in enumerate(caught):
        logits = head(state[0]).detach() * scale
        logits = torch.tanh(logits / bound) * bound if bound else logits
        for t, row in enumerate(found):
            for measure, value in slowly(logits[t].tolist(), final[t].tolist(), tokens[t + 1]).items():
                assert row["raw"][measure][layer] == pytest.approx(value, rel=1e-4, abs=1e-6), (layer, measure)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "gpt2"])
def test_the_last_layers_law_is_the_models_own(name: str):
    target, tokens = make(name), text()
    with torch.no_grad():
        states = read(target, tokens)
        normed = target.unembed(study.norm_of(target)[1](states.layers[-1]))
    assert torch.equal(normed, own_logits(target, tokens))
    assert torch.equal(target.unembed(states.final), normed)


def test_chunks_of_positions_change_nothing(monkeypatch: pytest.MonkeyPatch):
    target, window = make("qwen3"), Window(0, 0, 0, text())
    whole = rows_of(target, window)
    shapes: list[tuple[int, ...]] = []
    likeness = study.likeness
    monkeypatch.setattr(study, "LOGITS", 5 * VOCAB)
    monkeypatch.setattr(study, "likeness", lambda *given: shapes.append(tuple(given[0].shape)) or likeness(*given))
    parts = rows_of(target, window)
    assert {n for n, _ in shapes} == {5, 3}  # 23 positions, never more than five laws at a time
    for one, other in zip(whole, parts, strict=True):
        assert flat(one) == pytest.approx(flat(other), rel=1e-4, abs=1e-9)


def flat(record: object) -> list[float]:
    if isinstance(record, dict):
        return [x for v in record.values() for x in flat(v)]
    return [x for v in record for x in flat(v)] if isinstance(record, list) else [float(record)]  # type: ignore[arg-type]


def test_models_that_the_lens_would_misread_are_refused():
    nameless = make("llama")
    nameless.model.model.settled = nameless.model.model.norm
    del nameless.model.model.norm
    with pytest.raises(UserError, match=r"^LlamaModel has no final norm called norm, .*; use another model\.$"):
        readable(nameless)
    scaled = make("granite")
    assert readable(scaled) == 3
    scaled.model.lm_head.register_forward_hook(lambda _, __, logits: logits * 1.01)
    with pytest.raises(UserError, match=r"^The logits of GraniteForCausalLM are not its output head .* use another m"):
        readable(scaled)
    with quietly():
        sizes = {"hidden_size": 48, "word_embed_proj_dim": 24, "ffn_dim": 64}
        config = OPTConfig(**sizes, vocab_size=VOCAB, num_hidden_layers=2, num_attention_heads=4)
        projecting = Target(OPTForCausalLM._from_config(config))
    with pytest.raises(UserError, match=r"^OPTForCausalLM projects its states before its output head"):
        readable(projecting)


def test_logits_beyond_the_dtype_are_refused():
    target = make("llama", torch.float16)
    with torch.no_grad():
        target.model.model.embed_tokens.weight.mul_(3e5)
        target.model.lm_head.weight.mul_(3e2)
    states = read(target, text(4))
    with pytest.raises(UserError, match=r"too large for the model's dtype; give --dtype float32\.$"):
        chunk_rows(target, Window(0, 0, 0, text(4)), states, range(3))


def test_the_strip_is_the_text():
    """Pieces together are the text, special tokens are named, and a character of several tokens has one piece."""
    tokenizer = asset(STORIES).tokenizer
    ids = tokenizer("Once upon a time, 日 was.", add_special_tokens=False)["input_ids"]
    found = pieces(tokenizer, [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id])
    assert "".join(found[:-1]).strip() == "Once upon a time, 日 was." and len(found) == len(ids) + 1
    assert found[-1] == tokenizer.eos_token and found[found.index("日") - 2 :][:2] == ["", ""]


# ------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def ready(tmp_path: Path) -> tuple[str, str]:
    """A random model and a text."""
    model = save(tmp_path / "tiny", num_hidden_layers=3)
    return str(model), str(walking(tmp_path / "walk.txt"))


def lines(path: Path) -> list[dict[str, Any]]:
    """Without what tells when."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    found[-1]["end"] = {k: v for k, v in found[-1]["end"].items() if k not in ("seconds", "measured_from_window")}
    return found


def test_a_run_that_is_killed_goes_on(ready: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed within a window's rows, begun again: the same file; finished: nothing is read again."""
    whole = run(*ready, tmp_path / "whole", limit=300, length=16)
    measure, calls = study.rows_of, list[int]()

    def dies(target: Target, window: Window) -> list[dict[str, Any]]:
        calls.append(window.number)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return measure(target, window)

    monkeypatch.setattr(study, "rows_of", dies)
    with pytest.raises(KeyboardInterrupt):
        run(*ready, tmp_path / "part", limit=300, length=16)
    path = tmp_path / "part" / whole.name
    path.write_text(path.read_text()[:-40])  # torn within a row
    resumed = run(*ready, tmp_path / "part", limit=300, length=16)
    assert calls[:5] == [0, 1, 2, 3, 4] and calls[5] == 3  # window 3 is not known to be complete
    assert lines(resumed) == lines(whole)
    before, held = list(calls), resumed.read_bytes()
    assert run(*ready, tmp_path / "part", limit=300, length=16) == resumed
    assert calls == before and resumed.read_bytes() == held
    with pytest.raises(UserError, match="length: 16, now 12"):
        run(*ready, tmp_path / "part", limit=300, length=12)


def test_a_file_holds_every_position_but_the_windows_last(ready: tuple[str, str], tmp_path: Path):
    found = rows.read(run(*ready, tmp_path / "out", limit=300, length=16))
    assert found.end is not None and found.head.settings["layers"] == 3
    windows: dict[int, int] = {}
    for row in found.rows:
        windows[row["window"]] = windows.get(row["window"], 0) + 1
    assert found.end["positions"] == len(found.rows) == 300 - len(windows) and found.end["windows"] == len(windows)
    assert max(windows.values()) == 15
    kept = found.end["strip"]
    assert kept["window"] == next(number for number, count in windows.items() if count == max(windows.values())) != 1
    text = [r["next"] for r in found.rows if r["window"] == kept["window"]]
    assert [p.strip() for p in kept["text"]] == [str(t) if t < 16 else "<end>" for t in text]
    with pytest.raises(UserError, match=r"Windows of 999 tokens .* the model holds 256; give --length 256\.$"):
        run(*ready, tmp_path / "out", length=999)


# ------------------------------------------------------------------------------------------------------------- views


def file_of(label: str, layers: int = 3, parameters: int = 1000, data: str = "a.txt", tokenizer: str = "t") -> Rows:
    """Made-up rows of two documents."""
    draw = np.random.default_rng(parameters)
    found: list[dict[str, Any]] = []
    for window in range(4):
        for t in range(50):
            one = {name: [*(draw.random(layers) + 0.5).tolist(), 0.0] for name in ("kl_layer_final", "kl_final_layer")}
            far = {name: [3 * value for value in values] for name, values in one.items()}
            shares = {"overlap": draw.random(layers + 1).tolist(), "entropy": draw.random(layers + 1).tolist()}
            ranks = {"rank": draw.integers(9, size=layers + 1).tolist()}
            agrees = {"agrees": [*draw.integers(2, size=layers).tolist(), 1]}
            place = {"window": window, "document": window // 2, "position": t, "context": t + 1, "token": 1, "next": 2}
            found.append(
                {
                    **place,
                    **{"entropy": float(draw.random() * 3), "settled": lens.settled_of(agrees["agrees"]), "first": 0},
                    **{"normed": one | shares | ranks | agrees, "raw": far | shares | ranks | agrees},
                }
            )
    head = Head("layers", f"m/{label}", label, parameters, data, {"layers": layers, "tokenizer": tokenizer})
    words = [f" <w{i}>" for i in range(20)] + ["\n", "$x", "|", "  ", "\x1b[2J", "", "<|end|>"]
    return Rows(head, found, {"strip": {"window": 1, "text": words}})


@pytest.fixture(scope="module")
def shown() -> tuple[list[Rows], list[Section]]:
    """Two models of one tokenizer, and their sections."""
    files = [file_of("small", 3), file_of("large", 4, 2000)]
    return files, sections(files)


def test_tables_hold_the_means(shown: tuple[list[Rows], list[Section]]):
    (file, _), (distance, exits, _) = shown
    for direction, column in (("kl_final_layer", 3), ("kl_layer_final", 4)):
        at_half = np.mean([row["normed"][direction][2] for row in file.rows])
        assert distance.tables[0].head[column].startswith(f"KL({direction[3:].replace('_', ' || ')})")
        assert float(str(distance.tables[0].rows[0][column]).split()[0]) == pytest.approx(at_half, rel=1e-3)
    assert distance.tables[0].rows[0][2] == "layer 2 of 3"
    facts = dict(zip(exits.tables[0].head, map(str, exits.tables[0].rows[0]), strict=True))
    settled = np.array([row["settled"] for row in file.rows])
    expected = {
        "settled at layer": settled.mean(),
        "of depth": settled.mean() / 3,
        "settled by half depth": (settled <= 2).mean(),
        "entropy, nats": np.mean([row["entropy"] for row in file.rows]),
        "next token top-1": np.mean([row["normed"]["rank"][-1] == 0 for row in file.rows]),
        "top-5": np.mean([row["normed"]["rank"][-1] < 5 for row in file.rows]),
    }
    for name, value in expected.items():
        assert float(facts[name].split()[0]) == pytest.approx(value, abs=0.006), name
    by_layer = distance.folded[0]
    assert [row[2] for row in by_layer.rows] == [*"0123", *"01234"]
    agreement = [float(str(row[6]).split()[0]) for row in by_layer.rows[:4]]
    assert agreement == pytest.approx(np.mean([r["normed"]["agrees"] for r in file.rows], 0), abs=0.001)


def points(figure: Any) -> list[tuple[list[float], list[float]]]:
    """The lines of a chart, without bars."""
    found = [line for line in figure.axes[0].get_lines() if line.get_marker() not in ("None", None, "|", "_")]
    return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in found]


def test_charts_show_each_direction_and_lens_over_depth(shown: tuple[list[Rows], list[Section]]):
    files, parts = shown
    charts = {c.name: c for part in parts for c in part.charts}
    assert len(charts) == sum(len(part.charts) for part in parts) == 9
    for direction in ("kl-final-layer", "kl-layer-final"):
        for through in ("normed", "raw"):
            drawn = charts[f"layers-{direction}-{through}"]
            assert drawn.caption.startswith(f"KL({direction[3:].replace('-', ' || ')})")
            assert drawn.caption.endswith("with the final norm" if through == "normed" else "without the final norm")
            for file, (x, y) in zip(files, points(drawn.figure), strict=True):
                L = file.head.settings["layers"]
                means = np.mean([r[through][direction.replace("-", "_")] for r in file.rows], 0)
                assert x == pytest.approx([layer / L for layer in range(L)])  # 0 has no logarithm
                assert y == pytest.approx(means[:-1])
    (_, small), (_, large) = points(charts["layers-settled"].figure)
    assert small == pytest.approx([np.mean([r["settled"] <= n for r in files[0].rows]) for n in range(4)])
    assert large[-1] == 1
    assert len(points(charts["layers-agreement"].figure)) == 4  # both lenses of both


class Marked(HTMLParser):
    """The tokens of each strip, and whether every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.strips: list[list[tuple[str, str, str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        given = {k: v or "" for k, v in attrs}
        if tag == "p" and given["class"].startswith("strip "):
            self.strips.append([])
        if tag == "b":
            self.strips[-1].append((given["class"], given["title"], ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "b":
            level, title, before = self.strips[-1][-1]
            self.strips[-1][-1] = (level, title, before + data)


def test_strips_colour_each_token_by_the_law_that_foretold_it():
    files = [file_of("small", 2), file_of("large", 4, 2000), file_of("other", 2, 3000, tokenizer="u")]
    html = strip_html(files)
    page = Marked()
    page.feed(html)
    assert not page.open and len(page.strips) == 6  # two shades of three models
    rows_of_strip = [[r for r in f.rows if r["window"] == 1][:27] for f in files]
    most = max(r["entropy"] for some in rows_of_strip[:2] for r in some)  # models of one tokenizer share the scale
    for strip, some in zip(page.strips[:2], rows_of_strip, strict=False):
        assert [title for _, title, _ in strip] == [f"{r['entropy']:.2f} nats" for r in some]
        assert [c for c, _, _ in strip] == [f"c{round(r['entropy'] / most * 15)}" for r in some]
    for strip, some, L in zip(page.strips[2:4], rows_of_strip, (2, 4), strict=False):
        assert [title for _, title, _ in strip] == [f"{r['settled'] / L:.2f} of the layers" for r in some]
    texts = [shown for _, _, shown in page.strips[0]]
    assert texts[:2] == [" <w0>", " <w1>"] and texts[20] == "\N{RETURN SYMBOL}\n" and texts[25] == "\N{MIDDLE DOT}"
    assert "\x1b" not in html and re.search(r"<w\d", html) is None
    assert strip_html([]) == ""
    assert strip_html([file_of(f"m{i}", 2, 1000 + i) for i in range(MOST + 3)]).count("<h4>") == 2 * MOST


def test_figures_of_strips_hold_every_value(shown: tuple[list[Rows], list[Section]]):
    files, parts = shown
    charts = {c.name: c for c in parts[2].charts}
    assert set(charts) == {"layers-strip-entropy", "layers-strip-settled"}
    figure: Any = charts["layers-strip-entropy"].figure
    drawn = np.concatenate([np.asarray(m.get_array()).ravel() for m in figure.axes[0].collections])
    expected = [[r["entropy"] for r in f.rows if r["window"] == 1][:27] for f in files]
    assert drawn == pytest.approx(np.ravel(expected))
    assert "&lt;w0&gt;" in charts["layers-strip-entropy"].svg


def test_the_command_analyses_every_model(ready: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("foretoken.study.page.save", lambda chart, folder: [folder / f"{chart.name}.svg"])  # slow
    monkeypatch.setattr("foretoken.report.drawing.svg", lambda figure, name: "<svg></svg>")  # slow
    other = save(tmp_path / "wide", num_hidden_layers=2, hidden_size=48)
    app = typer.Typer()
    app.command()(layers)
    given = [ready[0], "--data", ready[1], "--out", str(tmp_path / "out"), "--models", str(other), "--limit", "120"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    found = rows.found(tmp_path / "out", "layers")
    assert [(f.head.label, len(f.rows)) for f in found] == [(f.head.label, len(found[0].rows)) for f in found]
    assert {f.head.label for f in found} == {"tiny", "wide"}
    page = (tmp_path / "out" / "index.html").read_text()
    assert "How far each layer is from the final law" in page and 'class="strip entropy"' in page
