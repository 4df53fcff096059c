"""`--compile` and `--quantize` on the command line."""

import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from foretoken import compiled, kernels
from foretoken.commands.bench import bench
from foretoken.commands.bench_step import bench_step
from foretoken.commands.chat import chat
from foretoken.commands.check import check
from foretoken.commands.explain import explain
from foretoken.commands.generate import generate
from foretoken.commands.tune import tune
from foretoken.compiled import CompiledTarget
from tests.models import STORIES
from tests.test_cli import PROMPT, ask, ok, refused


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[CompiledTarget]:
    """The targets that commands compile, as traces that are run, which are there at once."""
    found: list[CompiledTarget] = []

    class Traced(CompiledTarget):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings, inductor=False)
            found.append(self)

    monkeypatch.setattr("foretoken.graphs.CompiledTarget", Traced)
    return found


@pytest.fixture
def unfinished(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Processes that would compile and are only noted."""
    kernels.load_kernels()
    monkeypatch.setenv("FORETOKEN_CACHE", str(tmp_path))
    started: list[list[str]] = []

    class Idle:
        def __init__(self, command: list[str], **_: object) -> None:
            started.append(command)

        def poll(self) -> None:
            return None

    monkeypatch.setattr(compiled.subprocess, "Popen", Idle)
    return started


def test_generate_compiles_and_says_the_same(traced: list[CompiledTarget], tmp_path: Path):
    page = tmp_path / "page.html"
    options = ("--json", "--dtype", "float64", "--prompt", PROMPT, "--drafter", "lookahead")
    eager = json.loads(ask(*options).stdout)
    assert not traced
    step = json.loads(ask(*options, "--compile", "--html", str(page)).stdout)
    assert traced[0].programs
    assert step["token_ids"] == eager["token_ids"]
    assert step["tokens_per_forward"] == eager["tokens_per_forward"]
    assert "compiled" in page.read_text()


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_answers_do_not_wait_for_the_compiler(command: str, unfinished: list[list[str]]):
    """They come eagerly, and a line on stderr says what goes on."""
    if command == "generate":
        eager, result = ask("--prompt", PROMPT), ask("--prompt", PROMPT, "--compile")
    else:
        talk: Callable[..., Any] = partial(ok, "chat", STORIES, "--max-new-tokens", "12", stdin=PROMPT + "\n")
        eager, result = talk(), talk("--compile")
    assert result.stdout == eager.stdout
    assert "The step was still being compiled, which goes on; decoded without. The next run finds it." in result.stderr
    assert "compiled" not in eager.stderr
    assert [command[3] for command in unfinished] == [STORIES]


def test_check_and_explain_look_at_the_compiled_step(traced: list[CompiledTarget], monkeypatch: pytest.MonkeyPatch):
    widths: list[int] = []
    judged = CompiledTarget.judge

    def judge(self: CompiledTarget, draft: Any, *args: Any) -> Any:
        widths.append(draft.width)
        return judged(self, draft, *args)

    monkeypatch.setattr(CompiledTarget, "judge", judge)
    report = json.loads(ok("check", STORIES, "--dtype", "float64", "--compile", "--json").stdout)
    assert report["ok"] is True
    assert traced[0].programs and widths == [10, 10, 10]
    ok("explain", STORIES, "--prompt", PROMPT, "--b", "lookahead", "--max-new-tokens", "12", "--compile")
    assert traced[1].programs


def test_every_command_has_the_same_option():
    """Or at least the same flag and, where models are loaded to be decoded, the same words."""
    helps = {
        command.__name__: inspect.signature(command).parameters["compiled"].annotation.__metadata__[0]
        for command in (generate, chat, check, explain, tune, bench, bench_step)
    }
    assert {tuple(option.param_decls) for option in helps.values()} <= {("--compile",), ()}
    assert len({helps[name].help for name in ("generate", "chat", "check", "explain", "tune", "bench")}) == 1


def test_rounded_weights_are_not_compiled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("foretoken.quantize.find_spec", lambda name: name)
    sentence = refused("generate", STORIES, "--prompt", PROMPT, "--quantize", "int8", "--compile")
    assert sentence == "A step over int8 weights is not compiled; give quantize or compile, not both."
    assert "'int4' is no way to round weights" in refused("check", STORIES, "--quantize", "int4")
