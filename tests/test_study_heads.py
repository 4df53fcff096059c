"""Judged heads against laws written out token by token, and the figures' numbers against rows made by hand."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from foretoken.analysis import heads as analysis
from foretoken.drafters import module_of
from foretoken.errors import UserError
from foretoken.report.tables import DASH, Section, Table
from foretoken.saved import Saved, identity, save
from foretoken.study import heads as study
from foretoken.study import rows as store
from foretoken.study.asked import Asked, parsed
from foretoken.study.heads import Judge, offsets_of, rows_of, run, told
from foretoken.study.rows import Head, Rows, file_of, read
from foretoken.study.views import heads as views
from foretoken.study.views.places import borders
from foretoken.study.windows import Window
from foretoken.target import Target
from foretoken.training.recipe import Lora
from foretoken.training.trunk import Trunk
from tests import test_feedback, test_heads, tiny
from tests.families import make

SIZE = tiny.NUMBERS


def judge_of(drafter: Any) -> Judge:
    target = drafter.target
    return Judge(Trunk(target, "frozen", Lora()), drafter, offsets_of(drafter, target))


def drafter_of(key: str, target: Target) -> Any:
    """One of the small drafters of the other tests, all weights random."""
    return (test_feedback if key in test_feedback.NETWORKS else test_heads).drafter_of(key, target)


# ------------------------------------------------------------------------------------------------- rows, written out


def laws(drafter: Any, text: list[int], t: int, offset: int) -> tuple[list[float], list[float]]:
    """(q, p) of token t + offset: nothing is read but the tokens before it."""
    target, before = drafter.target, text[: t + offset]
    tokens = torch.tensor([before])
    with torch.no_grad():
        features = test_feedback.features_of(target, tokens, drafter.needs.features)
        stages = test_heads.hiddens(drafter.stages(test_heads.batch_of(tokens)), features)
        p = target.model(input_ids=tokens).logits[0, -1].softmax(-1).tolist()
    logits = stages[offset][0, t].tolist()
    known = getattr(drafter.heads, "vocabulary", None)
    names = range(len(logits)) if known is None else known.tolist()
    total = sum(math.exp(x) for x in logits)
    q = [0.0] * target.vocab
    for token, x in zip(names, logits, strict=True):
        q[token] = math.exp(x) / total
    return q, p


def written_out(q: list[float], p: list[float], token: int) -> tuple[int | None, float, int, float]:
    """Rank, overlap, agreement and divergence, one token after the other."""
    order = sorted(range(len(q)), key=lambda v: (-q[v], v))
    rank = order.index(token) if q[token] > 0 else None
    overlap = sum(min(a, b) for a, b in zip(p, q, strict=True))
    agrees = max(range(len(p)), key=p.__getitem__) == order[0]
    inside = sum(a for a, b in zip(p, q, strict=True) if b > 0)
    kl = sum(a / inside * math.log(a / inside / b) for a, b in zip(p, q, strict=True) if b > 0)
    return rank, overlap, int(agrees), kl


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize(
    "key",
    ["mtp parallel", "mtp causal", "weighted", "medusa", "blockwise", "three modules", "draft vocabulary", "eagle 3"],
)
def test_rows_are_the_laws_written_out(key: str, chunk: int, monkeypatch: pytest.MonkeyPatch):
    """Every guess at every position, whatever the chunks; no guess sees what comes after it."""
    target = make("llama")
    monkeypatch.setattr(analysis, "BUDGET", chunk * 4 * target.vocab)
    drafter = drafter_of(key, target)
    text = torch.randint(0, target.vocab, (11,), generator=torch.Generator().manual_seed(5)).tolist()
    judge = judge_of(drafter)
    rows = rows_of(judge, Window(3, 1, 40, text))
    deepest = judge.offsets[-1]
    assert [(r["window"], r["document"], r["position"], r["context"]) for r in rows] == [
        (3, 1, 40 + t, t + 1) for t in range(11 - deepest)
    ]
    agreed = set[int]()
    for t, row in enumerate(rows):
        for k, offset in enumerate(judge.offsets):
            rank, overlap, agrees, kl = written_out(*laws(drafter, text, t, offset), text[t + offset])
            assert (row["rank"][k], row["agrees"][k]) == (rank, agrees)
            assert row["overlap"][k] == pytest.approx(overlap, rel=6e-5)
            assert row["kl"][k] == pytest.approx(kl, rel=6e-5, abs=1e-9)
            agreed.add(agrees)
    if "vocabulary" in key:
        assert any(r is None for row in rows for r in row["rank"])


def test_equal_logits_are_ranked_as_argmax_takes_them():
    law = torch.zeros(4, 3, dtype=torch.float64)
    label = torch.tensor([0, 1, 2, 1])
    found = analysis.compared(law.log_softmax(-1), law, None, label)
    assert found.rank.tolist() == [0, 1, 2, 1]
    some = analysis.compared(law.log_softmax(-1), law[:, :2], torch.tensor([1, 2]), label)
    assert some.rank.tolist() == [analysis.NOWHERE, 0, 1, 0]
    assert some.agrees.tolist() == [False] * 4  # the target's first is token 0, the guess's token 1
    torch.testing.assert_close(some.overlap, torch.full((4,), 2 / 3, dtype=torch.float64))
    torch.testing.assert_close(some.kl, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("key", [*test_heads.HEADS, *test_feedback.NETWORKS])
def test_drafters_that_are_told_the_tokens_before(key: str):
    """Heads on one state are not, even where each reads the head before it; networks of guesses are."""
    assert told(judge_of(drafter_of(key, make("llama")))) == (key in test_feedback.NETWORKS)


def test_mixtures_are_the_shares_of_layers():
    target = make("llama")
    drafter = drafter_of("weighted", target)
    found = study.mixture_of(drafter)
    assert found is not None
    for row, head in zip(found, drafter.heads.heads, strict=True):
        weights = [math.exp(x) for x in head.mixture.tolist()]
        assert row == pytest.approx([w / sum(weights) for w in weights], rel=6e-5)
    assert len(found[0]) == target.config.num_hidden_layers + 1
    assert study.mixture_of(drafter_of("final", target)) is None
    assert study.mixture_of(drafter_of("medusa", target)) is None


# ------------------------------------------------------------------------------------------------ a text, from a folder


def counter(folder: Path, step: int = 1) -> Path:
    """A target that says, after every number, the one `step` further on; of another step, weights differ all over."""
    tiny.save(folder, torch.float64)
    model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.q_proj.weight.mul_(step)  # of no effect, but seen
            layer.mlp.up_proj.weight.mul_(step)
        model.model.embed_tokens.weight.copy_(torch.eye(32)[: SIZE + 1])
        model.lm_head.weight.copy_(successors(model.lm_head.weight, step))
    model.save_pretrained(folder)
    return folder


def successors(like: Tensor, step: int) -> Tensor:
    """[V, H]: an output head that says the number `step` further on."""
    weight = torch.zeros_like(like)
    for number in range(SIZE):
        weight[(number + step) % SIZE, number] = 5.0
    return weight


def counting_heads(folder: Path, target: Target, wrong: int = 0) -> Path:
    """Heads of three guesses whose output heads say the numbers 2, 3 and 4 further on; `wrong`: and more."""
    module = module_of("medusa")
    heads = module.fresh(target, module.Architecture(heads=3))
    for k, output in enumerate(heads.outputs):
        output.data.copy_(successors(output, k + 2 + wrong))
    save(folder, Saved("medusa", {"heads": 3}, identity(target)), heads)
    return folder


@pytest.fixture
def place(tmp_path: Path) -> dict[str, str]:
    """Paths: a counting model, its heads, heads that are wrong, and a text."""
    import foretoken

    model = counter(tmp_path / "counter")
    target = foretoken.load(model)
    text = tiny.counting(tmp_path / "text.txt", documents=5, length=30)
    return {
        "model": str(model),
        "heads": f"medusa:{counting_heads(tmp_path / 'counter-medusa', target)}",
        "wrong": f"medusa:{counting_heads(tmp_path / 'wrong', target, 1)}",
        "text": str(text),
        "out": str(tmp_path / "out"),
    }


def measured(place: dict[str, str], *heads: str, **settings: Any) -> list[Rows]:
    names = [place[name] for name in heads or ("heads",)]
    given = {"length": 12, "limit": 96} | settings
    return [read(file) for file in run(place["model"], names, place["text"], Path(place["out"]), **given)]


def test_heads_that_say_what_the_target_says(place: dict[str, str]):
    """On a counting text: every guess agrees and overlaps wholly; those that count on by one too much never."""
    right, wrong = measured(place, "heads", "wrong")
    assert right.head.label == "counter medusa"
    assert wrong.head.label == "counter medusa wrong"
    assert right.end is not None and right.end["positions"] == len(right.rows) == 96 - 4 * right.end["windows"]
    tokens = {(w, r["position"]): r for w, r in ((row["document"], row) for row in right.rows)}
    assert len(tokens) == len(right.rows)
    for row in right.rows:
        assert row["overlap"] == pytest.approx([1.0] * 3, abs=1e-6)
        assert row["kl"] == pytest.approx([0.0] * 3, abs=1e-6)
        assert row["agrees"] == [1, 1, 1]
        last = 30 - row["position"]  # of the document's tokens 0 to 30, the last is its end
        assert [r == 0 for r in row["rank"]] == [o != last for o in (2, 3, 4)]
    assert all(row["agrees"] == [0, 0, 0] and max(row["overlap"]) < 0.01 for row in wrong.rows)


def test_a_killed_run_is_gone_on_with(place: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    """Killed in the middle of a line of the fourth window: the same rows in the end, and nothing is measured twice."""
    whole = measured(place)[0]
    path = file_of(Path(place["out"]), whole.head)
    complete = path.read_text().splitlines()
    cut = next(i for i, text in enumerate(complete) if '"window":3' in text) + 2
    path.write_text("\n".join(complete[:cut]) + "\n" + complete[cut][:25])
    seen = list[int]()

    def counted(judge: Judge, window: Window) -> list[store.Row]:
        seen.append(window.number)
        return rows_of(judge, window)

    monkeypatch.setattr(study, "rows_of", counted)
    again = measured(place)[0]
    assert path.read_text().splitlines()[:-1] == complete[:-1]
    assert whole.end is not None and again.end is not None
    assert seen == list(range(3, whole.end["windows"]))
    assert again.end["measured_from_window"] == 3
    kept = ("windows", "positions", "told", "mixture")
    assert [again.end[k] for k in kept] == [whole.end[k] for k in kept]
    assert measured(place)[0] == again
    assert len(seen) == whole.end["windows"] - 3
    with pytest.raises(UserError, match="begun with another settings"):
        measured(place, length=13)


def test_drift(place: dict[str, str], tmp_path: Path):
    """A target that counts by two: the heads say what they said, the target agrees no more, and tables say how much."""
    other = counter(tmp_path / "tuned", step=2)
    own, away = measured(place, on=[str(other)])
    assert (own.head.label, away.head.label) == ("counter medusa", "tuned medusa")
    assert own.head.settings["trained_on"] == away.head.settings["trained_on"] == "counter"
    assert [r["rank"] for r in own.rows] == [r["rank"] for r in away.rows]
    # after token t + o - 1 it says t + o + 1, and the head of offset o says t + o
    assert all(row["agrees"] == [0, 0, 0] and max(row["overlap"]) < 0.01 for row in away.rows)
    *_, drift = views.sections([away, own])
    rows = [r for r in drift.tables[0].rows if r[1] == "tuned"]
    assert [r[3] for r in rows] == ["1", "2", "3"]
    head = list(drift.tables[0].head)
    assert all(str(r[head.index("agreement, difference")]).startswith("-1.000") for r in rows)
    assert all(str(r[head.index("top-1, difference")]).startswith("+0.000") for r in rows)
    kinds = ("overlap", "agreement", "top1")
    assert [c.name for c in drift.charts] == [f"heads-drift-{kind}-tuned-counter-text" for kind in kinds]


def test_what_cannot_be_analysed_is_said(place: dict[str, str], tmp_path: Path):
    def refused(match: str, heads: str, **settings: Any) -> None:
        with pytest.raises(UserError, match=match):
            run(place["model"], [heads], place["text"], tmp_path / "refused", **settings)

    refused("suffix has nothing to train; name a drafter with heads", "suffix")
    refused("is no drafter", "medsua:x")
    refused("write NAME:PATH,key=value", f"{place['heads']},{place['wrong']}")
    refused("has no trained heads", f"{place['heads']},adaptive=true")
    refused("the model holds 256; give --length 256", place["heads"], length=257)
    deeper = tiny.save(tmp_path / "deeper", num_hidden_layers=3)
    refused("has number of layers 3 and .* has 2", place["heads"], on=[str(deeper)])
    with pytest.raises(UserError, match="trained on other weights"):
        run(str(tiny.save(tmp_path / "other")), [place["heads"]], place["text"], tmp_path / "refused")
    with pytest.raises(UserError, match="called the same"):
        measured(place, "heads", "heads")
    (tmp_path / "short.txt").write_text("1 2 3")
    with pytest.raises(UserError, match="has 4 tokens and 5 are needed"):
        run(place["model"], [place["heads"]], str(tmp_path / "short.txt"), tmp_path / "refused")
    assert not list(tmp_path.glob("refused/*medsua*"))


def test_labels(place: dict[str, str]):
    """The method, and what the folder's name adds to the target's; settings behind it."""
    heads = Path(place["heads"].partition(":")[2])
    assert parsed(f"{place['heads']},depth=2").label(place["model"]) == "medusa depth=2"
    assert parsed(f"{place['heads']},other_target=true").label(place["model"]) == "medusa"
    assert Asked("eagle:a/b/m-eagle3", {}).label("m") == "eagle3"
    assert Asked("mtp:x/m/", {}).label("x/m") == "mtp"
    assert Asked("deepseek_mtp", {"depth": "3"}).label("m") == "deepseek_mtp depth=3"
    assert Asked("medusa", {"path": str(heads)}).path == str(heads)


# --------------------------------------------------------------------------------------------------------------- views


def file(kind: str, rows: list[dict[str, Any]], model: str = "x/m", **settings: Any) -> Rows:
    given = {"drafter": "h", "trained_on": "m", "elsewhere": False, "offsets": [2, 3], "heads": "h:p"} | settings
    numbered = [{"window": i, "document": i // 2, "position": 0, "context": 1} | r for i, r in enumerate(rows)]
    label = f"{Path(model).name} {given['drafter']}" if kind == "heads" else "m"
    return Rows(Head(kind, model, label, 10, "t.txt", given), numbered, {"told": False, "mixture": None})


def row(rank: list[int | None], agrees: list[int], overlap: list[float], **fields: Any) -> dict[str, Any]:
    return {"rank": rank, "agrees": agrees, "overlap": overlap, "kl": [0.5, 1.5]} | fields


ROWS = [
    row([0, 6], [1, 1], [0.9, 0.7], position=7, context=8),
    row([3, None], [0, 1], [0.5, 0.3], position=8, context=9),
    row([0, 0], [1, 0], [0.7, 0.2], position=99, context=9),
    row([9, 4], [1, 1], [0.3, 0.4], position=100, context=3),
]


def means(table: Table, drafter: str = "h") -> list[str]:
    """The cells of a drafter behind its name, without their errors."""
    return [str(c).split(" ")[0] for r in table.rows if r[0] == drafter for c in r[1:]]


def captioned(section: Section, start: str) -> Table:
    return next(t for t in (*section.tables, *section.folded) if t.caption.startswith(start))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, and no page's SVG of them: `test_drift` and `test_the_heat_map` draw it."""
    monkeypatch.setattr("foretoken.report.drawing.svg", lambda figure, name: "")


@pytest.mark.usefixtures("undrawn")
def test_tables_by_depth():
    depth = views.sections([file("heads", ROWS)])[0]
    assert means(captioned(depth, "Overlap")) == ["no", "4", "0.600", "0.400"]
    assert means(captioned(depth, "Agreement")) == ["no", "4", "0.750", "0.750"]
    assert means(captioned(depth, "Survival")) == ["no", "4", "0.750", "0.500", "2.250"]
    assert means(captioned(depth, "Top-1")) == ["no", "4", "0.500", "0.250"]
    assert means(captioned(depth, "Top-5")) == ["no", "4", "0.750", "0.500"]  # a token out of reach is a miss
    assert means(captioned(depth, "KL")) == ["no", "4", "0.500", "1.500"]
    assert any("12.5% of the text's tokens" in str(note) for note in depth.notes)
    assert any("was not measured" in str(note) for note in depth.notes)


@pytest.mark.usefixtures("undrawn")
def test_the_marginal_beside_the_heads():
    """Guess i beside the marginal of depth i + 1 and its overlap i, at the same places only."""
    marginal = [
        {"rank": [0, 0, 0], "overlap": [0.1, 0.1], "information": 0.0, "position": 1, "context": 2},
        {"rank": [5, 0, 7], "overlap": [0.8, 0.6], "information": 0.5, "position": 7, "context": 8},
        {"rank": [0, 2, 3], "overlap": [0.6, 0.5], "information": 8.0, "position": 8, "context": 9},
    ]
    law = file("marginal", marginal)
    law.rows[1]["document"] = law.rows[2]["document"] = 0
    other = file("marginal", marginal, model="x/another")
    depth = views.sections([file("heads", ROWS)], [other, law])[0]
    table = captioned(depth, "Heads and the marginal")
    found = [[str(c).split(" ")[0] for c in r] for r in table.rows]
    assert found == [
        # guess, places, top-1, marginal's, top-5, marginal's, overlap, marginal's, floor: 1 - sqrt(.25) and max(0, -1)
        ["h", "no", "1", "2", "0.500", "0.500", "1.000", "1.000", "0.700", "0.700", "0.250"],
        ["h", "no", "2", "2", "0.000", "0.000", "0.000", "0.500", "0.500", "0.550", DASH],
    ]
    drawn = next(c for c in depth.charts if c.name.startswith("heads-overlap"))
    assert [k.label for k in drawn.keys] == ["h", "marginal law", "floor: 1 - sqrt(I/2)"]
    assert drawn.figure is not None
    lines = [[float(y) for y in line.get_ydata()] for line in drawn.figure.axes[0].lines if len(line.get_xdata()) == 2]
    assert [pytest.approx(y) for y in lines[:2]] == [[0.6, 0.4], [0.5, 0.4]]
    elsewhere = replace(law, head=replace(law.head, data="u.txt"))
    assert views.sections([file("heads", ROWS)], [other, elsewhere])[0].tables[1:] == []


@pytest.mark.usefixtures("undrawn")
def test_tables_by_context_and_position():
    """Bins 1-8, 9-16, ...; a position counts from 1."""
    assert borders(8) == [1, 9]
    assert borders(9) == [1, 9, 17]
    assert borders(512)[-2:] == [257, 513]
    place = views.sections([file("heads", ROWS)])[1]
    context, position = place.folded
    law = {"rank": [0, 0, 0], "overlap": [0.8, 0.6], "information": 0.5, "position": 30, "context": 17}
    beside = views.sections([file("heads", ROWS)], [file("marginal", [law])])[1]
    assert [[str(c).split(" ")[0] for c in r[1:]] for r in beside.folded[0].rows[2:]] == [
        [f"17{DASH}32", "1", "0.800", "0.600"],
        [f"17{DASH}32", "1", "0.500", DASH],
    ]
    assert [[str(c).split(" ")[0] for c in r] for r in context.rows] == [
        ["h", f"1{DASH}8", "2", "0.600", "0.550"],
        ["h", f"9{DASH}16", "2", "0.600", "0.250"],
    ]
    assert [[str(c).split(" ")[0] for c in r] for r in position.rows] == [
        ["h", f"1{DASH}8", "1", "0.900", "0.700"],
        ["h", f"9{DASH}16", "1", "0.500", "0.300"],
        ["h", f"65{DASH}128", "2", "0.500", "0.300"],
    ]


def test_the_heat_map():
    """A row per layer, the final state on top; a column per guess."""
    given = file("heads", ROWS)
    assert given.end is not None
    given.end["mixture"] = [[0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]
    found = views.sections([given])[2]
    assert found.title.startswith("What heads read")
    figure = found.charts[0].figure
    assert figure is not None
    axes = figure.axes[0]
    texts = {(t.get_position(), t.get_text()) for t in axes.texts}
    assert ((0.5, 2.5), "0.700") in texts
    assert ((1.5, 0.5), "0.300") in texts
    assert [t.get_text() for t in axes.get_yticklabels()] == ["embedding", "layer 1", "final"]
    assert [list(r) for r in found.folded[0].rows] == [
        ["1", "0.100", "0.200", "0.700"],
        ["2", "0.300", "0.300", "0.400"],
    ]


@pytest.mark.usefixtures("undrawn")
def test_drift_is_paired_by_place():
    """Files that hold other positions, in another order: differences are over what both have."""
    tuned = [
        row([0, 0], [1, 1], [0.1, 0.1], document=0, position=50, context=51),  # not in the other
        row([2, 0], [0, 0], [0.4, 0.6], document=0, position=8, context=9),
        row([0, 3], [0, 1], [0.2, 0.5], document=0, position=7, context=8),
    ]
    section = views.sections([file("heads", ROWS), file("heads", tuned, model="y/tuned", elsewhere=True)])[-1]
    (table,) = section.tables
    found = [[str(c).split(" ")[0] for c in r[4:]] for r in table.rows if r[1] == "tuned"]
    assert list(table.head[4:]) == [
        "positions",
        *(f"{what}{part}" for what in ("overlap", "agreement", "top-1") for part in ("", ", difference")),
    ]
    assert found == [
        ["3", "0.233", "-0.400", "0.333", "-0.500", "0.667", "+0.000"],
        ["3", "0.400", "+0.050", "0.667", "-0.500", "0.667", "+0.500"],
    ]


@pytest.mark.usefixtures("undrawn")
def test_names_of_figures_differ():
    """Several drafters, targets and texts on one page."""
    files = [
        file("heads", ROWS),
        file("heads", ROWS, drafter="g"),
        file("heads", ROWS, model="y/m2", trained_on="m2"),
        file("heads", ROWS, model="z/tuned", elsewhere=True),
        file("heads", ROWS, model="z/more", elsewhere=True),
    ]
    for one in files:
        one.end["mixture"] = [[0.5, 0.5], [0.5, 0.5]]  # pyright: ignore[reportOptionalSubscript]
    names = [c.name for s in views.sections(copy.deepcopy(files)) for c in s.charts]
    assert len(set(names)) == len(names) == 2 * (5 + 4) + 3 + 2 * 3
    assert json.loads(json.dumps(names)) == names
