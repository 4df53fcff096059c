"""Sums over the tokens between: against enumeration, read as a tree and sequence by sequence."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM
from typer.testing import CliRunner

from foretoken.analysis import enumeration
from foretoken.analysis.lens import rank
from foretoken.analysis.marginals import information, overlap
from foretoken.analysis.summary import chains
from foretoken.cli import app
from foretoken.errors import UserError
from foretoken.marginal import law_of, nucleus
from foretoken.report import drawing
from foretoken.report.drawing import Chart
from foretoken.study import ceiling
from foretoken.study.ceiling import Times, foretold, survivals
from foretoken.study.futures import Cut, Future, Size, futures, size_for
from foretoken.study.marginal import Settings, columns_of, run
from foretoken.study.reading import SequenceReader, TreeReader, of_one_length, open_reader
from foretoken.study.rows import read
from foretoken.target import Target, norm_of
from tests.families import VOCAB, make
from tests.tiny import NUMBERS, save, tokenizer, walking

BRANCHING = ("llama", "gpt2", "mistral", "gemma2", "qwen3_moe", "gpt_neox", "deepseek_v3", "cohere2")
"""Full and sliding layers, learnt positions, experts, latent attention."""
FLAT = {"gpt2": 10.0, "gemma2": 10.0, "cohere2": 160.0}
"""Tied embeddings, which are small in these models: what the final norm is multiplied by, so that laws are not flat."""
SIZE = Size(4, 5)


def text(length: int, vocab: int = VOCAB, seed: int = 1) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def small(seed: int = 0, spread: float = 0.45) -> Target:
    """A model of seven tokens whose laws are far from flat, the further the larger `spread`."""
    torch.manual_seed(seed)
    size: dict[str, Any] = {"vocab_size": 7, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, max_position_embeddings=64, **size)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=spread)
    return Target(model)


@torch.no_grad()
def laws_behind(target: Target, prefix: list[int], depth: int) -> Tensor:
    """[V, ..., V]: the law of the token behind every sequence of `depth` tokens, each read from its beginning."""
    V = target.vocab
    ids = torch.tensor([[*prefix, *path] for path in itertools.product(range(V), repeat=depth)])
    law = target.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, 0].softmax(-1)
    return law.reshape([V] * (depth + 1))


def measured(target: Target, tokens: list[int], rows: list[int], cut: Cut, size: Size = SIZE) -> list[Future]:
    return list(futures(TreeReader(target), tokens, rows, cut, size))


def joined(found: list[Future], name: str) -> Tensor:
    """A field of all chunks, positions on its second axis but for those that have one axis."""
    parts = [getattr(f, name) for f in found]
    return torch.cat(parts, 0 if parts[0].ndim == 1 or name == "law" else 1)


# --------------------------------------------------------------------------------------------------------------- nuclei


@pytest.mark.parametrize("mass", [0.3, 0.9, 0.99, 1.0])
def test_nuclei_are_the_smallest_sets(mass: float):
    laws = (3 * torch.randn(20, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).softmax(-1)
    laws[3] = torch.eye(9, dtype=torch.float64)[4]
    found = nucleus(laws, mass)
    for law, tokens, chance, count in zip(laws, found.tokens, found.chance, found.count, strict=True):
        kept = sorted(law.tolist(), reverse=True)
        n = next(i for i in range(1, 10) if sum(kept[:i]) >= mass - 1e-12 or kept[i] == 0)
        assert int(count) == n
        assert chance[n:].eq(0).all() and torch.allclose(chance[:n], law[tokens[:n]])
        assert chance[:n].tolist() == kept[:n]
    assert nucleus(laws, mass, 2).count.tolist() == [min(2, n) for n in found.count.tolist()]


def test_law_of_is_at_least_float32():
    assert law_of(torch.zeros(3, dtype=torch.bfloat16)).dtype == torch.float32
    assert law_of(torch.zeros(3, dtype=torch.float64)).dtype == torch.float64


# -------------------------------------------------------------------------------------------------- against enumeration


def test_whole_sums_are_exact():
    """With mass 1 the laws of depth 2, 3 and 4 are those of enumerating every path."""
    target, tokens, rows = small(), text(9, 7), [0, 1, 4, 5, 8]
    found = measured(target, tokens, rows, Cut(4, 1.0))
    for i, t in enumerate(rows):
        joint = torch.ones((), dtype=torch.float64)
        for depth in range(3):
            law = laws_behind(target, tokens[: t + 1], depth)
            joint = joint[..., None] * law
            behind = laws_behind(target, tokens[: t + 1], depth + 1)
            exact = (joint[..., None] * behind).flatten(0, depth).sum(0)
            assert torch.allclose(joined(found, "total")[depth, i], exact, atol=1e-12)
            assert int(joined(found, "leaves")[depth, i]) == 7 ** (depth + 1)
    assert torch.allclose(joined(found, "mass"), torch.ones(3, len(rows), dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("mass", [0.5, 0.9, 0.99])
def test_cut_sums_keep_their_bound(mass: float):
    """L1 is 1 - m, divided sums are at most 1 - m away in total variation; both from the same leaves as by hand."""
    target, tokens, rows = small(1), text(8, 7), [0, 3, 7]
    exact, found = (measured(target, tokens, rows, Cut(3, m)) for m in (1.0, mass))
    whole, total, kept = joined(exact, "total"), joined(found, "total"), joined(found, "mass")
    assert torch.allclose((whole - total).abs().sum(-1), 1 - kept, atol=1e-12)
    assert (kept[0] >= mass).all() and (kept[1] >= mass**2 - 1e-12).all() and (kept < 1).any()
    assert ((whole - total / kept[..., None]).abs().sum(-1) / 2 <= 1 - kept + 1e-12).all()
    for i, t in enumerate(rows):
        first, behind = laws_behind(target, tokens[: t + 1], 0), laws_behind(target, tokens[: t + 1], 1)
        assert torch.allclose(total[0, i], enumeration.marginal(first, behind, mass), atol=1e-12)


def test_at_099_divided_sums_are_within_a_hundredth():
    target, tokens = small(2, 1.0), text(12, 7, seed=3)
    rows = list(range(12))
    exact, found = (measured(target, tokens, rows, Cut(2, m)) for m in (1.0, 0.99))
    law = joined(found, "total")[0] / joined(found, "mass")[0][:, None]
    assert float((joined(exact, "total")[0] - law).abs().sum(-1).max() / 2) <= 0.01
    assert joined(found, "leaves").float().mean() < 7


def test_unlikely_paths_are_not_followed_and_are_missed():
    """Of two tokens or more only paths of `least` or more, counted by hand; the likeliest one always."""
    target, tokens = small(3), text(5, 7)
    (found,) = measured(target, tokens, [4], Cut(3, 1.0, 0.05), Size(8, 3))
    first, second = (laws_behind(target, tokens, depth) for depth in (0, 1))
    pairs = [(x, y) for x in range(7) for y in range(7) if first[x] * second[x, y] >= 0.05]
    assert found.leaves[:, 0].tolist() == [7, len(pairs)] and 1 < len(pairs) < 30
    assert torch.allclose(found.mass[1, 0], torch.stack([first[x] * second[x, y] for x, y in pairs]).sum())
    (alone,) = measured(target, tokens, [4], Cut(4, 1.0, 0.999), Size(8, 3))
    assert alone.leaves[:, 0].tolist() == [7, 1, 1]
    path = alone.greedy[:, 0].tolist()
    last = laws_behind(target, [*tokens, *path[:3]], 0)
    assert torch.allclose(alone.total[2, 0] / alone.mass[2, 0], last, atol=1e-12)


def test_information_is_the_enumerated():
    target, tokens, rows = small(4), text(7, 7), [0, 2, 6]
    (whole,) = measured(target, tokens, rows, Cut(2, 1.0), Size(8, 4))
    (cut,) = measured(target, tokens, rows, Cut(2, 0.8), Size(8, 4))
    for i, t in enumerate(rows):
        first, behind = laws_behind(target, tokens[: t + 1], 0), laws_behind(target, tokens[: t + 1], 1)
        assert float(whole.information[i]) == pytest.approx(enumeration.information(first, behind), abs=1e-10)
        kept = nucleus(first, 0.8)
        n = int(kept.count)
        some = kept.chance[:n] / kept.chance[:n].sum()
        expected = enumeration.information(some, behind[kept.tokens[:n]])
        assert float(cut.information[i]) == pytest.approx(expected, abs=1e-10)
    assert (information(torch.eye(3), torch.ones(3), torch.zeros(3)) == 0).all()


def test_floor_holds_for_every_context():
    """β >= 1 - sqrt(I / 2) where the guess is drawn from the marginal (methods.md 8.2)."""
    target, tokens = small(5), text(10, 7, seed=8)
    for t in range(10):
        (found,) = measured(target, tokens, [t], Cut(2, 1.0), Size(16, 16))
        first, behind = laws_behind(target, tokens[: t + 1], 0), laws_behind(target, tokens[: t + 1], 1)
        beta = enumeration.head_overlap(first, behind, found.total[0, 0])
        assert beta >= enumeration.head_floor(float(found.information[0])) - 1e-12


def test_rank_counts_as_argmax_chooses():
    law = torch.tensor([[0.2, 0.3, 0.3, 0.2]] * 4)
    assert rank(law, torch.arange(4)).tolist() == [2, 0, 1, 3]


def test_estimate_of_chains_is_unbiased():
    """Over every continuation, weighed by the model's probability, the rows' estimates are the exact survivals."""
    target, tokens = small(6), text(4, 7)
    (found,) = measured(target, tokens, [3], Cut(3, 1.0), Size(8, 8))
    laws = [laws_behind(target, tokens, depth) for depth in range(3)]
    q = [found.total[0, 0], found.total[1, 0]]
    expected = np.zeros(2)
    for x in range(7):
        p = [laws[1][x], laws[2][x]]
        inner = [q[0].expand(7), q[1].expand(7, 7)]
        survived = enumeration.chain_survival(p, inner)
        expected += float(laws[0][x]) * np.array(survived)
    estimated = np.zeros(2)
    for path in itertools.product(range(7), repeat=3):
        drawn = torch.tensor(path)[:, None]
        behind = torch.stack([laws[1][path[0]], laws[2][path[:2]]])[:, None]
        fake = Future(
            found.row, found.law, found.total, found.mass, found.leaves, found.information, drawn, drawn, behind
        )
        columns = columns_of(fake, drawn)
        weight = float(laws[0][path[0]] * laws[1][path[:2]] * laws[2][path])
        through, at = (columns[name][:, :1].T.numpy() for name in ("ratio", "overlap"))
        estimated += weight * chains(through, at)[0]
    assert estimated == pytest.approx(expected, abs=1e-10)


# -------------------------------------------------------------------------------------------------- trees and sequences


def sharp(name: str) -> Target:
    """A model of that family in float32 whose laws are neither flat nor sure."""
    target, shift = make(name, torch.float32), float(name == "gemma2")  # whose norm multiplies by its weight + 1
    with torch.no_grad():
        for parameter in norm_of(target)[1].parameters():
            parameter.copy_((parameter + shift) * FLAT.get(name, 1.0) - shift)
    return target


@pytest.mark.parametrize("name", BRANCHING)
def test_tree_equals_sequences(name: str):
    """In float32, to 1e-5, past sliding windows and across chunks and parts."""
    target = sharp(name)
    tokens, rows, cut = text(40), [0, 15, 16, 38], Cut(3, 1.0, 0.004)
    tree = list(futures(TreeReader(target), tokens, rows, cut, Size(8, 13)))
    slow = list(futures(SequenceReader(target.model, None), tokens, rows, cut, Size(16, 50)))
    assert 20 < joined(tree, "leaves")[1].float().mean() < 80
    for field in ("law", "total", "mass", "information"):
        assert torch.allclose(joined(tree, field), joined(slow, field), atol=1e-5), field
    assert joined(tree, "row").tolist() == rows
    assert torch.equal(joined(tree, "greedy"), joined(slow, "greedy"))
    for at, t in enumerate(rows):  # the greedy continuation is the model's
        ids = [*tokens[: t + 1], *joined(tree, "greedy")[:2, at].tolist()]
        with torch.no_grad():
            own = target.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()
        assert int(own) == joined(tree, "greedy")[2, at]


def test_continuations_are_drawn_from_the_model():
    """Many draws behind one text: their joint law by chi-square, and the laws behind them."""
    target, tokens, count = small(7), text(4, 7), 4000
    laws = [laws_behind(target, tokens, depth) for depth in range(2)]
    expected = (laws[0][:, None] * laws[1]).flatten()
    counts = torch.zeros(49, dtype=torch.float64)
    reader = TreeReader(target)
    for seed in range(count // 100):
        many = [3] * 100
        for found in drawn(reader, tokens, many, seed):
            pairs = found.drawn[0] * 7 + found.drawn[1]
            counts += torch.bincount(pairs, minlength=49).double()
            assert torch.allclose(found.behind[0], laws[1][found.drawn[0]], atol=1e-12)
    assert int(counts.sum()) == count
    large = expected * count >= 5
    rest = torch.stack([counts[~large].sum(), expected[~large].sum() * count])
    terms = (counts[large] - expected[large] * count) ** 2 / (expected[large] * count)
    statistic = float(terms.sum() + (rest[0] - rest[1]) ** 2 / rest[1].clamp(min=1e-9))
    degrees = int(large.sum())
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5  # five deviations


def drawn(reader: TreeReader, tokens: list[int], rows: list[int], seed: int) -> list[Future]:
    """A chunk in which the same row stands many times."""
    return list(futures(reader, tokens, rows, Cut(2, 0.01), Size(128, 128), seed))


def test_no_call_holds_more_than_its_part():
    """Memory: no forward reads more than a part of leaves, nor keeps more nodes than chunk and parts together."""
    target, size, cut = make("llama", torch.float32), Size(6, 6), Cut(4, 0.9, 0.003)
    seen: list[tuple[int, int]] = []

    class Watched(TreeReader):
        def read(self, tokens: Tensor, depth: Tensor, sees: Tensor) -> Tensor:
            seen.append((len(tokens), sees.shape[1]))
            return super().read(tokens, depth, sees)

    found = list(futures(Watched(target), text(12), list(range(12)), cut, size))
    assert joined(found, "leaves").max() > 10 * size.part  # nuclei are far larger than a part
    assert max(n for n, _ in seen) == size.part
    assert max(before for _, before in seen) == size.rows + 2 * size.part


@pytest.mark.parametrize(("vocab", "horizon"), [(512, 2), (32_000, 4), (256_000, 3)])
def test_size_fits_the_memory(vocab: int, horizon: int):
    whole = size_for(vocab, horizon, 8 * 2**30)
    assert whole.rows > 1 and whole.part > 1
    with pytest.raises(UserError, match=r"single position and 0\.0 MiB were given; give --memory .* or more"):
        size_for(vocab, horizon, 1000.0)
    fitting = [m for m in range(1, 10**9, 10**5) if fits(vocab, horizon, m)]
    assert not fits(vocab, horizon, fitting[0] - 10**5)
    least = size_for(vocab, horizon, fitting[0])
    assert least.rows == 1 and least.part < whole.part


def fits(vocab: int, horizon: int, memory: float) -> bool:
    try:
        return size_for(vocab, horizon, memory).rows > 0
    except UserError:
        return False


# ---------------------------------------------------------------------------------------------- models without branches


def without_branches(folder: Path, kind: str) -> Path:
    """A tiny model that `load` refuses: ALiBi positions, or a recurrent state."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": NUMBERS + 1, "hidden_size": 32}
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if kind == "bloom":
        model: Any = BloomForCausalLM(BloomConfig(n_layer=2, n_head=2, **size, **ends))
    else:
        model = MambaForCausalLM(MambaConfig(num_hidden_layers=2, state_size=4, **size, **ends))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_models_without_branches_read_sequences(tmp_path: Path, kind: str):
    notes: list[str] = []
    reader = open_reader(str(without_branches(tmp_path, kind)), say=notes.append)
    assert isinstance(reader, SequenceReader) and kind in notes[0] and "cannot read trees" in notes[0]
    tokens = text(7, NUMBERS)
    (found,) = futures(reader, tokens, [5], Cut(2, 1.0), Size(8, 16))
    with torch.no_grad():
        first = reader.model(input_ids=torch.tensor([tokens[:6]])).logits[0, -1].softmax(-1)
        behind = [reader.model(input_ids=torch.tensor([[*tokens[:6], x]])).logits[0, -1].softmax(-1) for x in range(17)]
    assert torch.allclose(found.total[0, 0], (first[:, None] * torch.stack(behind)).sum(0), atol=1e-5)


def test_groups_are_of_one_length():
    paths = [[1, 2], [3], [4, 5], [6, 7], [8]]
    assert of_one_length(paths, 4) == [[0, 2], [3], [1, 4]]
    assert of_one_length(paths, 0) == [[0], [2], [3], [1], [4]]


# ------------------------------------------------------------------------------------------------------------ the files


def analysed(folder: Path, model: Path, data: Path, **settings: Any) -> list[dict[str, Any]]:
    asked = Settings(**({"horizon": 3, "limit": 120, "length": 30, "least": 0.01} | settings))
    run([str(model)], str(data), folder, asked, None, "cpu")
    (file,) = folder.glob("marginal-*.jsonl")
    return read(file).rows


def test_rows_say_what_the_model_says(tmp_path: Path):
    """Every field of a row from forwards of whole sequences, one at a time."""
    model, data = save(tmp_path / "model", torch.float64), walking(tmp_path / "text.txt")
    rows = analysed(tmp_path / "out", model, data, every=5, top_p=1.0, least=0.0, horizon=2)
    target = open_reader(str(model), device="cpu").model
    assert {(r["position"]) % 5 for r in rows} == {0} and len(rows) > 10
    row = next(r for r in rows if r["context"] > 10)
    assert row["context"] == row["position"] % 30 + 1
    ids = window_of(model, data, row)
    with torch.no_grad():
        laws = target(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
        t = row["context"] - 1
        every = torch.cat([torch.tensor([ids[: t + 1]]).expand(17, -1), torch.arange(17)[:, None]], 1)
        behind = target(input_ids=every).logits[:, -1].softmax(-1)
        marginal = laws[t] @ behind
        best = int(laws[t].argmax())
    assert row["truth"] == ids[t + 1 : t + 3]
    ordered = [laws[t].argsort(descending=True).tolist(), marginal.argsort(descending=True).tolist()]
    assert row["rank"] == [order.index(x) for order, x in zip(ordered, row["truth"], strict=True)]
    assert row["chance"] == pytest.approx([float(laws[t][row["truth"][0]]), float(marginal[row["truth"][1]])], rel=1e-5)
    assert row["greedy"] == [0, ordered[1].index(int(behind[best].argmax()))]
    assert row["entropy"] == pytest.approx(float(-(laws[t] * laws[t].log()).sum()), rel=1e-5)
    falling = laws[t].sort(descending=True).values.cumsum(0)
    assert row["nucleus"] == [int((falling < m).sum()) + 1 for m in (0.99, 0.9)]
    overlaps = [float(torch.minimum(p, marginal).sum()) for p in behind]
    assert any(row["overlap"][0] == pytest.approx(x, rel=1e-5) for x in overlaps)
    assert any(row["peak"][0] == pytest.approx(float(p.max()), rel=1e-5) for p in behind)


def window_of(model: Path, data: Path, row: dict[str, Any]) -> list[int]:
    """The tokens of the row's window."""
    from foretoken.loading import read_config, read_tokenizer
    from foretoken.study.windows import documents
    from foretoken.training.encode import Encoder

    found = read_tokenizer(str(model), read_config(str(model)))
    assert found is not None
    tokens = list(documents(Encoder(found), str(data)))[row["document"]]
    start = row["position"] - row["context"] + 1
    return tokens[start : start + 30]


def test_interrupted_runs_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, data = save(tmp_path / "model"), walking(tmp_path / "text.txt")
    whole = analysed(tmp_path / "a", model, data)
    folder = tmp_path / "b"
    analysed(folder, model, data)
    (file,) = folder.glob("*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    assert len({r["window"] for r in whole}) >= 4
    torn = next(i for i, text in enumerate(lines) if '"window":2' in text) + 4
    file.write_text("".join(lines[:torn]) + lines[torn][:20])  # killed while it wrote window 2
    calls: list[int] = []
    from foretoken.study import marginal

    monkeypatch.setattr(marginal, "measured", recording(marginal.measured, calls))
    assert analysed(folder, model, data) == whole
    assert calls and min(calls) == 2
    calls.clear()
    assert analysed(folder, model, data) == whole and not calls  # nothing left to do
    with pytest.raises(UserError, match="begun with another settings"):
        analysed(folder, model, data, horizon=2)
    file.write_text("{}\n")
    with pytest.raises(UserError, match="no file that this version"):
        analysed(folder, model, data)


def recording(measured: Any, calls: list[int]) -> Any:
    def wrapped(reader: Any, window: Any, *rest: Any) -> Any:
        calls.append(window.number)
        return measured(reader, window, *rest)

    return wrapped


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["analyze", *arguments])


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def one(chart: Chart, folder: Path) -> list[Path]:
        """Figures take long to write."""
        return drawing.save(chart, folder) if chart.name.startswith("text-top5") else []

    monkeypatch.setattr("foretoken.study.page.save", one)
    monkeypatch.setattr(drawing, "svg", lambda figure, name: "<svg></svg>")
    model, data, out = save(tmp_path / "model"), walking(tmp_path / "text.txt"), tmp_path / "out"
    given = [str(model), "--data", str(data), "--out", str(out), "--limit", "90", "--device", "cpu"]
    result = invoke("marginal", *given, "--horizon", "3", "--least", "0.02")
    assert result.exit_code == 0, result.output
    assert (out / "index.html").is_file() and (out / "index.md").is_file() and list((out / "figures").glob("*.png"))
    assert "index.html" in result.output
    result = invoke("ceiling", *given[:3], "--out", str(tmp_path / "other"), *given[5:], "--depth", "2", "--every", "3")
    assert result.exit_code == 0, result.output
    (file,) = (tmp_path / "other").glob("ceiling-*.json")
    found = json.loads(file.read_text())
    rows = read(next((tmp_path / "other").glob("marginal-*.jsonl"))).rows
    right = np.cumprod([[r == 0 for r in row["greedy"][1:]] for row in rows], axis=1).mean(0)
    assert found["temperatures"]["0"]["independent"] == pytest.approx(right.tolist(), abs=1e-6)
    through, at = (np.array([row[name] for row in rows]) for name in ("ratio", "overlap"))
    expected = [float(at[:, 0].mean()), float((through[:, 0] * at[:, 1]).mean())]
    assert found["temperatures"]["1"]["independent"] == pytest.approx(expected, abs=1e-6)
    best = found["predicted"]["1"]["independent"]
    assert best["tokens_per_forward"] == pytest.approx(1 + sum(expected[: int(best["length"])]), abs=1e-3)
    assert found["verdict"] in (tmp_path / "other" / "index.md").read_text().replace("\\", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--horizon", "3", "--top-p", "0"], "top_p is 0.0; it must be above 0 and at most 1"),
        (["--least", "1.5"], "least is 1.5; it is a probability"),
        (["--horizon", "70"], "71 are needed; give longer texts or look less far ahead"),
        (["--length", "9999"], "the model holds 256; give --length 256"),
        (["--memory", "0.000001"], "for a single position"),
        (["--data", "nowhere.txt"], "There is no file"),
    ],
)
def test_user_errors(tmp_path: Path, arguments: list[str], said: str):
    model, data = save(tmp_path / "model"), walking(tmp_path / "text.txt")
    given = [str(model), "--data", str(data), "--out", str(tmp_path / "out"), "--limit", "90", "--device", "cpu"]
    result = invoke("marginal", *given, *arguments)
    assert result.exit_code == 2, result.output
    sentence = " ".join(result.output.split())
    assert said in sentence and sentence.count("foretoken:") == 1


# ------------------------------------------------------------------------------------------------------------- ceilings


def test_survivals_of_ideal_drafters():
    """Three positions, two guesses, counted by hand; what the text says does not matter."""
    columns: dict[str, list[list[float]]] = {
        "rank": [[3, 3, 3], [3, 3, 3], [3, 3, 3]],
        "greedy": [[0, 0, 0], [0, 2, 0], [0, 0, 1]],
        "ratio": [[0.5, 0.1], [1.0, 0.1], [0.2, 0.1]],
        "overlap": [[0.9, 0.8], [0.6, 0.4], [0.3, 0.5]],
        "hit": [[1, 0], [0, 0], [1, 1]],
        "top": [[0.7, 0.6], [0.5, 0.9], [0.3, 0.3]],
        "sure": [[0, 1], [1, 1], [1, 0]],
        "peak": [[0.8, 0.9], [0.7, 0.6], [0.6, 0.3]],
    }
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    zero, one = survivals(rows, 0.0), survivals(rows, 1.0)
    assert {k: pytest.approx(v, abs=1e-6) for k, v in zero.items()} == {
        "independent": [2 / 3, 1 / 3],
        "sequential": [1, 1],
    }
    assert {k: pytest.approx(v, abs=1e-6) for k, v in one.items()} == {
        "independent": [1.8 / 3, (0.5 * 0.8 + 1.0 * 0.4 + 0.2 * 0.5) / 3],
        "independent_likeliest": [1.5 / 3, (0.6 + 0.3) / 3],
        "sequential": [1, 1],
        "sequential_likeliest": [2.1 / 3, (0.6 + 0.3) / 3],
    }


@pytest.mark.parametrize("head", [0.01, 0.3])
@pytest.mark.parametrize("layer", [0.02, 0.4, 2.0])
@pytest.mark.parametrize("own", [0.0, 0.5])
def test_predictions_are_the_best_of_all_lengths(head: float, layer: float, own: float):
    """In forwards over one token: a plain step takes 1 + own, one of n guesses what all its parts take."""
    v = {1: 1.0, 2: 1.05, 3: 1.2, 4: 1.7}
    said = {"tokens_per_forward": 1.5, "survival": [0.3, 0.2]}
    rates = {"independent": [0.7, 0.4, 0.2], "sequential_likeliest": [0.8, 0.75, 0.7]}
    found = foretold(rates | {"lookup": said}, Times(v, head, layer, own))
    for kind, survival in rates.items():
        tried = [(1.0, 1.0, 0)]
        for n in range(1, 4):
            tokens, drafting = 1 + sum(survival[:n]), head if kind == "independent" else n * layer
            tried.append((tokens * (1 + own) / (v[n + 1] + own + drafting), tokens, n))
        fast, tokens, length = max(tried)
        expected = {"tokens_per_forward": tokens, "speedup": fast, "length": length}
        assert found[kind] == pytest.approx(expected, abs=1e-4), kind
    fast = 1.5 * (1 + own) / (v[3] + own)
    assert found["lookup"] == pytest.approx({"tokens_per_forward": 1.5, "speedup": fast, "length": 2}, abs=1e-4)


def test_look_ups_are_weighed_by_their_forwards():
    """Two answers, of 4 forwards that accepted 1, 1, 1 and 0 guesses, and of 1 that accepted 2."""
    answers = [
        SimpleNamespace(forwards=4, tokens_per_forward=1.75, accepted_per_depth=[0.75]),
        SimpleNamespace(forwards=1, tokens_per_forward=3.0, accepted_per_depth=[1.0, 1.0]),
        SimpleNamespace(forwards=0, tokens_per_forward=0.0, accepted_per_depth=[]),
    ]
    assert ceiling.said(answers) == {"tokens_per_forward": 2.0, "survival": [0.8, 0.2]}  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("speedups", "said"),
    [
        ((1.05, 1.09, 1.0), "no drafter pays"),
        ((1.3, 1.9, 1.3), "Prompt lookup, which needs no training"),
        ((1.3, 1.9, 1.2), "Independent heads can pay"),
        ((1.05, 1.9, 1.05), "told their own guesses might"),
        ((1.0, 1.05, 1.2), "Prompt lookup"),
    ],
)
def test_what_is_worth_training_is_said(speedups: tuple[float, float, float], said: str):
    """Of the mean over temperatures."""
    names = ("independent", "sequential", "lookup")
    predicted = {
        t: {k: {"tokens_per_forward": 2.0, "speedup": s + by} for k, s in zip(names, speedups, strict=True)}
        for t, by in (("0", 0.2), ("1", -0.2))
    }
    text = ceiling.verdict(predicted)
    assert said in text[text.rindex("times as fast") :]
    assert f"({speedups[2] - 0.2:.2f} times as fast)" in text


def test_overlap_is_what_survives():
    p, q = (torch.rand(2, 6).softmax(-1) for _ in range(2))
    assert overlap(p, q).tolist() == pytest.approx([enumeration.overlap(a, b) for a, b in zip(p, q, strict=True)])
