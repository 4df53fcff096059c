"""What inductor makes of a step: the same bits for a node whatever stands beside it, and one program on disk for all.

Each program takes half a minute to compile, so the tests share a few of them.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig

import foretoken
from foretoken import compiled, kernels, program
from foretoken.attention import adopt
from foretoken.background import main
from foretoken.cache import SlotCache
from foretoken.compiled import CompiledTarget, key_of
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.generation import requests_for
from foretoken.sampling import Sampling
from foretoken.target import Target, model_class_of
from foretoken.tree import Draft, chain, tree
from tests.families import BASE, VOCAB, quietly, randomise

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]
"""torch's own, while inductor is imported and works."""

CONFIGS = {
    # odd sizes of heads, grouped; no window: across the border of a chunk of 512 positions
    "grouped": lambda: LlamaConfig(
        **BASE | {"num_key_value_heads": 2, "head_dim": 20, "max_position_embeddings": 1024}
    ),
    # the ring of a window wraps
    "sliding": lambda: MistralConfig(**BASE | {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 24}),
}
CASES = {"grouped": torch.bfloat16, "sliding": torch.float32}
PARENTS = torch.tensor([[-1, 0, 0, 1, 3, 3, 2, 4, 7, 7]])
LENGTHS = {"grouped": [508, 3, 100], "sliding": [150, 20, 87]}


def made(name: str, seed: int = 0, dtype: torch.dtype | None = None) -> Target:
    with quietly():
        config = CONFIGS[name]()
        model = model_class_of(config)._from_config(config, dtype=dtype or CASES[name])  # rotary tables in float32
    randomise(model, seed)
    model.generation_config.eos_token_id = None
    adopt(model)
    return Target(model)


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the programs; the kernels are those of every other test."""
    kernels.load_kernels()
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("programs")
        patch.setenv("FORETOKEN_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def steps(kept: Path) -> dict[str, CompiledTarget]:
    found = {name: CompiledTarget(made(name)) for name in CASES}
    for step in found.values():
        assert step.settled() is step
    return found


def prompt(length: int, seed: int) -> Tensor:
    return torch.randint(VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def filled(step: Target, rows: list[int]) -> SlotCache:
    """A cache of prompts of these lengths, the same for each length."""
    cache = None
    for length in rows:
        one = step.cache(1, 560, 16)
        step.eager.read(prompt(length, length), [length], one)  # pyright: ignore
        if cache is None:
            cache = one
        else:
            cache.join(one)
    assert cache is not None
    return cache


def drafted(rows: int, tokens: Tensor) -> Draft:
    return tree(tokens.expand(rows, -1).contiguous(), PARENTS.expand(rows, -1).contiguous())


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_a_node_has_the_bits_of_its_path_decoded_alone(name: str, steps: dict[str, CompiledTarget]):
    """In a ragged batch of trees, in a tree alone, and token by token: bit for bit; another ancestor, other bits."""
    step, lengths = steps[name], LENGTHS[name]
    tokens = prompt(PARENTS.shape[1], 7)
    draft = drafted(len(lengths), tokens)
    together = step.judge(draft, filled(step, lengths)).logits
    for b, length in enumerate(lengths):
        alone = step.judge(drafted(1, tokens), filled(step, [length])).logits
        assert torch.equal(alone[0], together[b])
        for n in range(draft.width):
            path = draft.ancestors[0, n].nonzero().flatten()
            cache = filled(step, [length])
            for i, node in enumerate(path.tolist()):
                last = step.judge(chain(tokens[:, node : node + 1]), cache).logits
                assert torch.equal(last[0, 0], together[b, node]), (length, n, i)
                cache.commit(None, [1])
            wide = step.judge(chain(tokens[:, path].repeat(2, 1)), filled(step, [length, 11])).logits
            assert torch.equal(wide[0, -1], together[b, n])
    changed = tokens.clone()
    changed[0, 1] = (changed[0, 1] + 1) % VOCAB
    other = step.judge(drafted(len(lengths), changed), filled(step, lengths)).logits
    below = draft.ancestors[0, :, 1]
    assert torch.equal(other[:, ~below], together[:, ~below])
    assert (other[:, below] != together[:, below]).any(-1).all()


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_a_program_says_what_the_eager_model_says(name: str, steps: dict[str, CompiledTarget]):
    """Within rounding: a wrong node would differ by the spread of the logits."""
    step, lengths = steps[name], LENGTHS[name]
    draft = drafted(len(lengths), prompt(PARENTS.shape[1], 7))
    got = step.judge(draft, filled(step, lengths)).logits.double()
    want = step.eager.judge(draft, filled(step, lengths)).logits.double()
    exact = made(name, dtype=torch.float64)
    for weight, held in zip(exact.model.parameters(), step.model.parameters(), strict=True):
        weight.copy_(held.double())
    cache = exact.cache(1, 560, 16)
    exact.read(prompt(lengths[0], lengths[0]), [lengths[0]], cache)
    true = exact.judge(drafted(1, prompt(PARENTS.shape[1], 7)), cache).logits
    mine, theirs = (got[0] - true[0]).square().mean().sqrt(), (want[0] - true[0]).square().mean().sqrt()
    assert mine <= 1.2 * theirs  # no further from float64 than the eager model is
    assert theirs < 0.2 * true.std()
    assert (got - want).square().mean().sqrt() <= 2 * theirs


@torch.inference_mode()
def test_a_node_keeps_its_bits_round_the_ring(steps: dict[str, CompiledTarget]):
    """Token by token and in chains of three: two hundred tokens go round the ring of 24 + 63 slots more than twice."""
    step, text = steps["sliding"], prompt(210, 1)
    slow, fast = step.cache(1, 240, 3), step.cache(1, 240, 3)
    for cache in (slow, fast):
        step.read(text[:, :1], [1], cache)
    assert slow.stores[0].shape[2] < 100
    for start in range(1, 205, 3):
        part = text[:, start : start + 3]
        wide = step.judge(chain(part), fast).logits[0]
        fast.commit(None, [3])
        for i in range(3):
            assert torch.equal(step.judge(chain(part[:, i : i + 1]), slow).logits[0, 0], wide[i]), start + i
            slow.commit(None, [1])


@torch.inference_mode()
def test_rows_leave_and_the_cache_in_use_is_the_new_one(steps: dict[str, CompiledTarget]):
    step, lengths = steps["grouped"], LENGTHS["grouped"]
    tokens = prompt(PARENTS.shape[1], 7)
    cache = filled(step, lengths)
    step.judge(drafted(3, tokens), cache)
    cache.select([2, 1])
    want = step.judge(drafted(2, tokens), filled(step, [lengths[2], lengths[1]])).logits
    assert torch.equal(step.judge(drafted(2, tokens), cache).logits, want)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_outputs_are_the_same_with_every_drafter_in_every_batch(
    steps: dict[str, CompiledTarget], temperature: float, monkeypatch: pytest.MonkeyPatch
):
    """Token for token in bfloat16, where eager decoding may part at near-ties."""
    monkeypatch.setattr(CompiledTarget, "reads", True)
    step = steps["grouped"]
    prompts = [prompt(n, n)[0].tolist() * 3 for n in (4, 9, 30)]
    outputs = [
        foretoken.generate(step, prompts, drafter=drafter, max_new_tokens=40, temperature=temperature, batch_size=size)
        for size in (1, 2, 3)
        for drafter in ("none", "lookahead", "suffix")
    ]
    assert len({tuple(tuple(o.token_ids) for o in found) for found in outputs}) == 1
    assert all(any(sum(o.drafted) for o in found) for found in outputs[1::3])  # guesses were accepted


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@torch.inference_mode()
def test_steps_in_a_row_have_the_bits_of_single_ones(
    steps: dict[str, CompiledTarget], temperature: float, monkeypatch: pytest.MonkeyPatch
):
    """Two rows of different length, one of which ends: what is emitted, committed and cached, and none too many."""
    step, sampling = steps["sliding"], Sampling(temperature=temperature, seed=2)
    sessions: list[foretoken.Session] = []
    for times in (8, 1):
        monkeypatch.setattr("foretoken.decode.RUN", times)
        requests = requests_for(step, [prompt(n, n)[0].tolist() for n in (4, 31)], sampling, max_new_tokens=30)
        requests[1] = replace(requests[1], max_new_tokens=5)
        session = foretoken.Session(step, make_drafter("none", step), requests)
        assert [len(new) for new in session.step()] == [min(times, 4)] * 2
        assert session.last.tokens[0].tolist() == session.rows[0].text[4 : 4 + min(times, 4)]
        session.run()
        assert [row.forwards for row in session.rows] == [29, 4]
        assert session.cache.length.tolist() == session.cache.lengths == [4 + 29, 31 + 4]
        sessions.append(session)
    many, one = sessions
    assert [row.output for row in many.rows] == [row.output for row in one.rows]
    assert all(torch.equal(a, b) for a, b in zip(many.cache.stores, one.cache.stores, strict=True))


@torch.inference_mode()
def test_steps_in_a_row_end_when_they_take_long(steps: dict[str, CompiledTarget]):
    """After a tenth of a second no further one begins, however many were asked for."""
    step = steps["grouped"]
    cache = step.cache(64, 900)
    step.eager.read(prompt(300, 1).expand(64, -1), [300] * 64, cache)
    terms = replace(step.nothing(64), limit=torch.full((64,), 550))
    _, told = step.programs[()].repeat(550, *step.given(chain(prompt(1, 2).expand(64, -1)), cache, terms))
    assert 1 <= len(told) // (64 * 8) < 550


def test_packed_weights_take_the_memory_of_the_weights():
    """And nothing else does: at sizes that models have, what a program holds is 1.05 times the weights."""
    config = LlamaConfig(**BASE | {"hidden_size": 256, "intermediate_size": 640, "num_key_value_heads": 2})
    with quietly():
        model = model_class_of(config)(config)
    adopt(model)
    step = CompiledTarget(Target(model.to(torch.bfloat16)), inductor=False)
    assert step.settled() is step
    weights = sum(p.nbytes for p in model.parameters())
    assert weights <= step.programs[()].nbytes <= 1.05 * weights


# The disk


def compiled_again(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages of compiling that begin from now on; compiling itself fails."""
    stages: list[str] = []

    def fails(*args: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(program, "compile_into", fails)
    return stages


@torch.inference_mode()
def test_other_weights_of_the_same_shape_use_the_same_program(
    steps: dict[str, CompiledTarget], monkeypatch: pytest.MonkeyPatch
):
    stages = compiled_again(monkeypatch)
    other = CompiledTarget(made("grouped", seed=5), progress=stages.append)
    assert other.settled() is other
    assert stages == ["kernels", "packing weights"]
    draft = drafted(1, prompt(PARENTS.shape[1], 7))
    mine = other.judge(draft, filled(other, [9])).logits.double()
    eager = other.eager.judge(draft, filled(other, [9])).logits.double()
    first = steps["grouped"].judge(draft, filled(other, [9])).logits.double()
    assert (mine - eager).abs().mean() < 0.1 * eager.std()
    assert (mine - first).abs().mean() > 0.5 * eager.std()


def test_another_shape_dtype_or_feature_makes_another_program(
    steps: dict[str, CompiledTarget], monkeypatch: pytest.MonkeyPatch
):
    compiled_again(monkeypatch)
    with pytest.raises(AssertionError, match="compiled again"):
        CompiledTarget(made("grouped")).settled((-1,))
    with pytest.raises(AssertionError, match="compiled again"):
        CompiledTarget(made("grouped", dtype=torch.float32)).settled()
    thinner = made("grouped")
    thinner.config.rms_norm_eps = 1e-3
    with pytest.raises(AssertionError, match="compiled again"):
        CompiledTarget(thinner).settled()
    elsewhere = made("grouped")
    elsewhere.config._name_or_path = "elsewhere"
    assert CompiledTarget(elsewhere).settled().programs  # pyright: ignore
    mixed = made("grouped")
    mixed.model.lm_head.float()
    assert key_of(mixed, ()) != key_of(made("grouped"), ())


def test_an_interrupted_compilation_is_done_again(
    steps: dict[str, CompiledTarget], kept: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whatever lies in the folder: without inputs.json, which is written last, nothing is used."""
    target = made("grouped")
    path = program.place(key_of(target, ()))
    whole = kept / "whole"
    shutil.copytree(path, whole)
    (path / "inputs.json").unlink()
    (path / "program.pt2").write_bytes(b"half")
    done: list[Path] = []

    def compiles(where: Path, *rest: object) -> None:
        done.append(where)
        for name in ("program.pt2", "constants.safetensors", "inputs.json"):
            shutil.copy(whole / name, where / name)

    monkeypatch.setattr(program, "compile_into", compiles)
    step = CompiledTarget(target)
    assert step.settled() is step
    assert done == [path]
    CompiledTarget(made("grouped")).settled()
    assert done == [path]  # once
    assert json.loads((path / "inputs.json").read_text())


# In the background


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    made("grouped").model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_sessions_do_not_wait_for_a_program_that_is_compiled_beside_them(
    steps: dict[str, CompiledTarget], saved: Path, monkeypatch: pytest.MonkeyPatch
):
    """One that began eagerly ends so, the next one is compiled; the process beside them needs no second one."""
    target = foretoken.load(saved, device="cpu")
    path = program.place(key_of(target, ()))
    (path / "inputs.json").rename(path / "hidden.json")
    started: list[list[str]] = []

    class Idle:
        """A process that is still running, or has failed."""

        code: int | None = None

        def __init__(self, command: list[str], **_: object) -> None:
            started.append(command)

        def poll(self) -> int | None:
            return self.code

    monkeypatch.setattr(compiled.subprocess, "Popen", Idle)
    step = CompiledTarget(target, wait=False)
    assert step.unready is None
    requests = requests_for(step, [prompt(9, 9)[0].tolist()], Sampling(), max_new_tokens=12)
    session = foretoken.Session(step, make_drafter("none", step), requests)
    assert session.target is step.eager
    assert step.settled() is step.eager
    assert started == [[sys.executable, "-m", "foretoken.background", str(saved), "bfloat16"]]
    assert step.unready == ("The step was still being compiled, which goes on; decoded without. The next run finds it.")
    monkeypatch.setattr(Idle, "code", 2)
    (path / "log").write_text("some warning\nNo compiler.\n")
    assert step.unready == "The step could not be compiled (No compiler); decoded without."
    (path / "hidden.json").rename(path / "inputs.json")
    later = foretoken.Session(step, make_drafter("none", step), requests)
    assert later.target is step
    assert step.unready is None
    while session.running or later.running:
        for each in (session, later):
            if each.running:
                each.step()
    assert session.target is step.eager
    assert session.rows[0].output == later.rows[0].output


def test_the_process_beside_compiles_the_same_program(
    steps: dict[str, CompiledTarget], saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Loaded from its path, the model has the key of the model at hand: nothing is compiled twice."""
    monkeypatch.setattr("os.nice", lambda by: 0)
    asked: list[object] = []
    monkeypatch.setattr(program, "compile_into", lambda path, recipe, tell: asked.append(recipe.key))
    assert main([str(saved), "bfloat16"]) == 0
    assert not asked
    assert main([str(saved), "float32", "0", "-1"]) == 0
    assert asked == [key_of(foretoken.load(saved, dtype="float32", device="cpu"), (0, -1))]
    assert main([str(saved), "float16"]) == 2
    assert "and steps are compiled in float32" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_ends_before_its_program_leaves_it_to_the_next(saved: Path, monkeypatch: pytest.MonkeyPatch):
    """The real process, from the start: the first session is eager, the last one compiled, the outputs equal."""
    first = CompiledTarget(foretoken.load(saved, dtype="float32", device="cpu"), wait=False)
    text = prompt(9, 9)[0].tolist()
    eager = foretoken.generate(first, text, drafter="none", max_new_tokens=12)
    assert not first.programs
    (process,) = first.begun.values()
    assert process.wait(300) == 0
    second = CompiledTarget(foretoken.load(saved, dtype="float32", device="cpu"), wait=False)
    assert foretoken.generate(second, text, drafter="none", max_new_tokens=12).token_ids == eager.token_ids
    assert () in second.programs
    assert second.unready is None


def test_a_model_without_a_path_is_waited_for():
    assert CompiledTarget(made("grouped"), wait=False).wait


def test_no_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("FORETOKEN_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(program, "load_kernels", kernels.load_kernels.__wrapped__)
    with pytest.raises(UserError, match=r"^Compiling a step needs the compiler g\+\+ and there is none; "):
        CompiledTarget(made("sliding")).settled()
