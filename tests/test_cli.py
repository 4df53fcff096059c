"""The command line: what it prints, and that bad input gets one sentence and exit code 2."""

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import foretoken
from foretoken import Sampling
from foretoken.cli import COMMANDS, app, chat, generate, out_of_memory
from foretoken.commands.group import Group
from foretoken.drafters import METHODS, module_of
from tests.models import BITSTORIES, STORIES, asset
from tests.signals import listening

PROMPT = "Once upon a time"


def run(*args: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, list(args), input=stdin, prog_name="foretoken")


def ok(*args: str, stdin: str | None = None) -> Result:
    result = run(*args, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result


def ask(*args: str, model: str = STORIES, stdin: str | None = None) -> Result:
    return ok("generate", model, "--max-new-tokens", "12", *args, stdin=stdin)


def refused(*args: str, stdin: str | bytes | None = None) -> str:
    """The one sentence that the command answered with."""
    result = run(*args, stdin=stdin)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("foretoken: ")
    sentence = result.stderr.removeprefix("foretoken: ")
    assert re.fullmatch(r"[^\n]+[.?]\n", sentence)
    return sentence.strip()


def usage_error(*args: str) -> str:
    """What a misspelt command line is answered with, without the box around it."""
    result = run(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


def subprocess_of(*args: str, **keywords: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=60, check=False, **keywords)


# starting


SLOW = {"torch", "transformers", "numpy", "huggingface_hub", "safetensors", "pydantic"}
"""What `--help` of anything must not import; help of a group draws itself, and needs no reader of Markdown either."""
READERS = {"rich.markdown", "rich.syntax", "markdown_it", "pygments"}


@pytest.mark.parametrize(
    ("args", "unwanted"),
    [
        (["--help"], SLOW | READERS),
        (["plan", "--help"], SLOW | READERS),
        (["analyze", "--help"], SLOW | READERS),
        (["generate", "--help"], SLOW),
        (["plan", "speed", "-h"], SLOW),
    ],
    ids=["all", "plan", "analyze", "generate", "plan speed"],
)
def test_help_imports_nothing_slow(args: list[str], unwanted: set[str]):
    done = subprocess_of("-X", "importtime", "-m", "foretoken.cli", *args)
    assert done.returncode == 0
    assert "Usage: foretoken" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"typer", "rich.console"} <= imported
    assert imported.isdisjoint(unwanted)


def test_help_shows_every_command():
    shown = ok("--help").stdout
    assert [line.split()[1] for line in shown.splitlines() if re.match("│ [a-z]", line)] == [
        *(command.__name__.replace("_", "-") for command in COMMANDS),
        *("plan", "analyze"),
    ]


@pytest.mark.parametrize("group", [[], ["plan"], ["analyze"]], ids=["all", "plan", "analyze"])
def test_help_of_groups_looks_like_typers(group: list[str], monkeypatch: pytest.MonkeyPatch):
    """The same lines, but for the options: typer gives `--help` a type."""

    def shown() -> list[str]:
        return [line for line in ok(*group, "--help").stdout.splitlines() if not line.startswith("│ --help")]

    ours = shown()
    monkeypatch.delattr(Group, "format_help")
    assert shown() == ours
    assert sum(line.startswith("│ ") for line in ours) > 1


def test_the_package_imports_nothing_until_it_is_used():
    """And then `generate` and `load` are the functions, not the modules of their names."""
    code = """
import sys, foretoken
assert "torch" not in sys.modules
assert set(foretoken.__all__) <= set(dir(foretoken))
from foretoken.generation import stream
from foretoken.loading import DTYPES
assert foretoken.stream is stream
for name in foretoken.__all__:
    assert getattr(foretoken, name).__name__ == name
try:
    foretoken.nothing
except AttributeError as error:
    print(error)
"""
    done = subprocess_of("-c", code)
    assert done.stderr == ""
    assert done.stdout == "module 'foretoken' has no attribute 'nothing'\n"


def test_defaults_are_the_library_s():
    for command in (generate, chat):
        defaults = {name: p.default for name, p in inspect.signature(command).parameters.items()}
        for name, value in {k: v for k, v in defaults.items() if hasattr(Sampling(), k)}.items():
            assert value == getattr(Sampling(), name), name
        library = inspect.signature(foretoken.generate).parameters
        assert defaults["drafter"] == library["drafter"].default
        assert defaults["rule"] == library["rule"].default
    assert inspect.signature(generate).parameters["max_new_tokens"].default == library["max_new_tokens"].default


# generate


def test_the_installed_command_streams_text_and_sums_up():
    """A real process: only the text on stdout, only the summary on stderr, no warning of any library."""
    out = foretoken.generate(asset(STORIES, torch.float32), PROMPT, drafter="none", max_new_tokens=40)
    args = ["generate", STORIES, "--prompt", PROMPT, "--max-new-tokens", "40", "--drafter", "lookahead"]
    done = subprocess_of("-m", "foretoken.cli", *args)
    assert done.returncode == 0
    assert done.stdout == out.text + "\n"
    assert re.fullmatch(r"40 tokens, \d+ forwards, \d\.\d\d tokens per forward, \d+\.\d\d s, exact\n", done.stderr)


def test_json_is_the_output_of_the_library():
    out = foretoken.generate(
        asset(STORIES, torch.float32), PROMPT, drafter="jacobi", settings={"length": 3}, max_new_tokens=12
    )
    found = json.loads(ask("--prompt", PROMPT, "--json", "--drafter", "jacobi", "--set", "length=3").stdout)
    assert found["text"] == out.text
    assert found["token_ids"] == out.token_ids
    assert found["drafted"] == out.drafted
    assert found["forwards"] == out.forwards
    assert found["tokens_per_forward"] == out.tokens_per_forward
    assert found["accepted_per_depth"] == out.accepted_per_depth
    assert found["seconds"] > 0
    assert found["exact"] is True
    assert (found["finish"], found["drafter"], found["rule"], found["prompt"]) == ("length", "jacobi", "match", PROMPT)
    assert "logprobs" not in found


def test_json_has_log_probabilities_when_asked():
    out = foretoken.generate(asset(STORIES, torch.float32), PROMPT, max_new_tokens=12, logprobs=True)
    found = json.loads(ask("--prompt", PROMPT, "--json", "--logprobs").stdout)
    assert found["logprobs"] == pytest.approx(out.logprobs, abs=1e-4)


HOT = {"temperature": 2.0, "seed": 11}


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 3},
        {"top_p": 0.4},
        {"min_p": 0.3},
        {"repetition_penalty": 4.0},
        {"presence_penalty": 6.0},
        {"frequency_penalty": 6.0},
        {"seed": 12},
        {"temperature": 0.5},
    ],
)
def test_sampling_options_reach_the_sampler(settings: dict[str, float]):
    """Each changes the sample as it changes the library's."""
    target = asset(STORIES, torch.float64)
    want = foretoken.generate(target, PROMPT, max_new_tokens=40, **HOT | settings).token_ids
    assert want != foretoken.generate(target, PROMPT, max_new_tokens=40, **HOT).token_ids
    options = [part for k, v in (HOT | settings).items() for part in ("--" + k.replace("_", "-"), str(v))]
    args = ["--prompt", PROMPT, "--json", "--dtype", "float64", "--max-new-tokens", "40", *options]
    assert json.loads(ask(*args).stdout)["token_ids"] == want


def test_stop_strings_end_the_text():
    text = ask("--prompt", PROMPT).stdout.rstrip("\n")
    stop = text.split()[-2]
    stopped = ask("--prompt", PROMPT, "--stop", stop, "--stop", "never to be found").stdout
    assert stopped == text[: text.index(stop)] + "\n"


def test_prompts_come_from_files_and_pipes_too(tmp_path: Path):
    """With one final line break taken off, so that `echo` and editors change nothing."""
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    want = ask("--prompt", PROMPT).stdout
    assert ask("--prompt-file", str(file)).stdout == want
    assert ask("--prompt", "-", stdin=PROMPT + "\n").stdout == want


def test_a_batch_is_its_prompts_one_by_one(tmp_path: Path):
    prompts = [PROMPT, "The dog\u2028was", "Tom"]
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text(f"\ufeff{prompts[0]}\n\n{prompts[1]}\r\n{prompts[2]}")
    records = [{"prompt": prompts[0]}, {"turns": [prompts[1], "more"]}, {"prompt": prompts[2], "turns": ["x"]}]
    lines.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records))
    single = [json.loads(ask("--prompt", p, "--json").stdout)["token_ids"] for p in prompts]
    for file in (text, lines):
        shown = ask("--batch-file", str(file), "--json", "--batch-size", "2").stdout.splitlines()
        found = [json.loads(line) for line in shown]
        assert [f["prompt"] for f in found] == prompts
        assert [f["token_ids"] for f in found] == single


def test_a_batch_in_words_names_each_prompt(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\nTom")
    texts = [ask("--prompt", p).stdout.rstrip("\n") for p in (PROMPT, "Tom")]
    result = ask("--batch-file", str(file))
    assert result.stdout == f"{PROMPT}{texts[0]}\n\nTom{texts[1]}\n\n"
    assert result.stderr.startswith("24 tokens, ")


def test_show_explains_its_colours_and_keeps_the_text():
    plain, shown = ask("--prompt", PROMPT), ask("--prompt", PROMPT, "--show")
    assert shown.stdout == PROMPT + plain.stdout
    assert shown.stderr.splitlines()[0].startswith("drafted and accepted  emitted by the target")


def test_lossy_rules_are_called_lossy():
    args = ["--prompt", PROMPT, "--drafter", f"draft_model:{STORIES}", "--rule", "lossy_top_k"]
    assert ask(*args, model=BITSTORIES).stderr.endswith(", LOSSY (lossy_top_k)\n")
    assert json.loads(ask(*args, "--json", model=BITSTORIES).stdout)["exact"] is False


def test_html_holds_text_and_settings(tmp_path: Path):
    file = tmp_path / "page.html"
    args = ["--drafter", "jacobi", "--set", "length=3", "--stop", "<never>", "--html", str(file), "--dtype", "float64"]
    ask("--prompt", PROMPT, *args)
    page = file.read_text()
    rows = dict(re.findall(r"<tr><th>(\w+)</th><td>(.*?)</td></tr>", page))
    assert rows["model"] == STORIES
    assert rows["drafter"] == "jacobi length=3"
    assert rows["stop"] == "&#x27;&lt;never&gt;&#x27;"
    assert (rows["max_new_tokens"], rows["dtype"], rows["device"], rows["temperature"]) == (
        "12",
        "float64",
        "cpu",
        "0.0",
    )
    assert "top_k" not in rows
    assert f'<span class="prompt">{PROMPT}</span>' in page
    assert [f.name for f in tmp_path.iterdir()] == ["page.html"]


# bad input


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--temperature", "-1"], "temperature is -1.0; it must be 0 or more"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top-p", "0"], "top_p is 0.0; it must be above 0"),
        (["--frequency-penalty", "inf"], "frequency_penalty is inf; it must be a finite number"),
        (["--drafter", "sufix"], "'sufix' is no drafter; .* did you mean 'suffix'?"),
        (
            ["--drafter", f"draft_model:{STORIES}", "--set", "depht=3"],
            "'depht' is no setting of 'draft_model'; .*'depth'",
        ),
        (["--drafter", "jacobi", "--set", "length=three"], "jacobi: length is 'three'; it must be a whole number"),
        (["--drafter", "jacobi", "--set", "length=0"], "jacobi: length is 0; it must be 1 or more"),
        (["--set", "nonsense"], "--set 'nonsense' has no key and value; write it as key=value"),
        (["--set", "=3"], "--set '=3' has no key and value"),
        (["--drafter", "draft_model"], "draft_model needs a smaller model"),
        (["--drafter", "draft_model:/no/such/model"], "'/no/such/model' is no model, since there is no such folder"),
        (["--rule", "mach"], "'mach' is no acceptance rule; .* did you mean 'match'?"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0; ask for at least 1"),
        (["--dtype", "float23"], "'float23' is no dtype; .* did you mean 'float32'?"),
        (["--device", "abacus"], "torch has no device 'abacus' here"),
        (["--attention", "eagre"], "'eagre' is no attention implementation .* did you mean 'eager'?"),
        (["--logprobs"], "--logprobs are part of the JSON only; add --json"),
        (["--json", "--show"], "give one of them"),
        (["--prompt-file", "x"], "--prompt and --prompt-file both came"),
        (["--batch-file", "x"], "--batch-file came with another prompt"),
        (["--html", "/no/such/folder/page.html"], "'/no/such/folder' is no folder"),
    ],
)
def test_bad_options_get_one_sentence(args: list[str], says: str):
    assert re.search(says.replace("?", r"\?"), refused("generate", STORIES, "--prompt", PROMPT, *args))


@pytest.mark.parametrize(
    ("args", "stdin", "says"),
    [
        ([], None, "There is no prompt; give --prompt TEXT"),
        (["--prompt", ""], None, "The prompt from --prompt is empty"),
        (["--prompt", "-"], "\n", "The prompt from standard input is empty"),
        (["--prompt", "-"], b"\xff\xfe\xfd", "is no U"),
        (["--prompt", "a\udcffb"], None, "The prompt from --prompt is no Unicode text"),
        (["--prompt", "dog " * 600], None, "and the model's context is 512; shorten it to 511 or fewer"),
        (["--prompt-file", "/no/such/file"], None, "'/no/such/file' cannot be read (No such file or directory)"),
        (["--prompt-file", "/"], None, "'/' cannot be read (Is a directory)"),
    ],
)
def test_bad_prompts_get_one_sentence(args: list[str], stdin: str | bytes | None, says: str):
    assert says in refused("generate", STORIES, *args, stdin=stdin)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", "holds no prompt; write one per line"),
        ("blank.jsonl", b"\n  \n", "holds no prompt; write one per line"),
        ("bytes.txt", b"\xff\xfe", "is no UTF-8 text; convert it first"),
        ("broken.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"', "line 3 is no JSON"),
        ("fields.jsonl", b'{"text": "a"}', 'line 1 has no text in "prompt" or "turns"[0]'),
        ("list.jsonl", b'["a"]', 'line 1 has no text in "prompt" or "turns"[0]'),
        ("turns.jsonl", b'{"turns": []}', 'line 1 has no text in "prompt" or "turns"[0]'),
        ("number.jsonl", b'{"prompt": 3}', 'line 1 has no text in "prompt" or "turns"[0]'),
        ("surrogate.jsonl", b'{"prompt": "\\ud800"}', "line 1 is no Unicode text"),
    ],
)
def test_bad_batch_files_get_one_sentence(tmp_path: Path, name: str, content: bytes, says: str):
    (tmp_path / name).write_bytes(content)
    assert says in refused("generate", STORIES, "--batch-file", str(tmp_path / name))


def test_a_path_that_is_no_model(tmp_path: Path):
    assert "holds no config.json" in refused("generate", str(tmp_path), "--prompt", "a")
    assert "'./nowhere' is no model, since there is no such folder" in refused("generate", "./nowhere", "--prompt", "a")
    assert "holds no config.json" in refused("check", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert "is no model that can be found" in refused("generate", str(tmp_path), "--prompt", "a")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of a model, to be damaged."""
    return Path(shutil.copytree(STORIES, tmp_path / "model"))


def test_weights_cut_short(copy: Path):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    sentence = refused("generate", str(copy), "--prompt", "a")
    assert "The weights of" in sentence
    assert "cut short" in sentence


def test_a_model_without_tokenizer(copy: Path):
    for file in copy.glob("token*"):
        file.unlink()
    assert "has no tokenizer" in refused("generate", str(copy), "--prompt", "a")


def test_a_draft_model_with_another_tokenizer(copy: Path):
    file = copy / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    a, b = list(vocab)[400:402]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    file.write_text(json.dumps(tokenizer))
    sentence = refused("generate", BITSTORIES, "--prompt", "a", "--drafter", f"draft_model:{copy}")
    assert "tokenizer" in sentence


def test_a_batch_that_memory_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "prompts.txt"
    file.write_text("a\n" * 40)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    sentence = refused("generate", STORIES, "--batch-file", str(file), "--batch-size", "40")
    assert "40 rows" in sentence
    assert "use a smaller batch or fewer new tokens" in sentence


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you ..."
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_running_out_of_memory_is_said_in_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("foretoken.answer.load", raising(error))
    sentence = refused("generate", STORIES, "--prompt", "a")
    assert sentence == "Memory ran out; use a smaller batch, fewer new tokens or a smaller --dtype."


def test_what_torch_says_when_memory_runs_out():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(caught.value)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("foretoken.answer.load", raising(RuntimeError("shapes differ")))
    result = run("generate", STORIES, "--prompt", "a")
    assert isinstance(result.exception, RuntimeError)
    assert result.exit_code == 1


def test_misspelt_names_get_the_nearest():
    assert "--prompt" in usage_error("generate", STORIES, "--promt", "a").partition("No such option: --promt")[2]
    assert "No such command 'genrate'. Did you mean 'generate'" in usage_error("genrate", STORIES)
    assert "missing argument" in usage_error("generate").lower()
    for option, value in (("--max-new-tokens", "x"), ("--batch-size", "0")):
        assert f"Invalid value for '{option}'" in usage_error("generate", STORIES, option, value)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **keywords: Any) -> Any:
        raise error

    return fail


# interrupts


def test_ctrl_c_ends_quietly(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("foretoken.answer.load", raising(KeyboardInterrupt()))
    result = run("generate", STORIES, "--prompt", "a")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "\n")


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_ctrl_c_stops_a_real_answer():
    """What had come is on stdout, nothing but a line break on stderr, and the shell sees 130."""
    command = [sys.executable, "-m", "foretoken.cli", "generate", BITSTORIES, "--prompt", PROMPT]
    with subprocess.Popen(
        [*command, "--max-new-tokens", "500"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=listening,
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == b"\n"
    assert b", there was a little girl named Lily.".startswith((first + rest)[:38])


# the other commands


def test_drafters_lists_every_method_and_setting():
    text = " ".join(ok("drafters").stdout.split())
    for name in METHODS:
        module = module_of(name)
        assert f"{name} {(module.__doc__ or '').splitlines()[0]}" in text
    assert "length 7 guesses per draft" in text
    assert "layers 0 layers that draft (0: half of them)" in text
    assert "prompt_pool True whether the pool starts with the prompt's n-grams" in text


def test_check_of_a_model_that_can_be_decoded():
    result = ok("check", STORIES, "--json")
    assert json.loads(result.stdout)["ok"] is True


def test_check_of_a_model_that_cannot(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("foretoken.check.check", lambda target: SimpleNamespace(ok=False, name=target.name))
    monkeypatch.setattr("foretoken.check.render", lambda report: f"{report.name} differs")
    result = run("check", STORIES)
    assert (result.exit_code, result.stdout) == (1, f"{STORIES} differs\n")


def test_bench_step_and_demo_are_wired(monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr("foretoken.bench.step.run", lambda *args: seen.append(args))
    ok(
        "bench-step",
        "m",
        "--widths",
        "1, 4,16",
        "--context",
        "64",
        "--repeats",
        "2",
        "--dtype",
        "bfloat16",
        "--out",
        "f",
    )
    ok("bench-step", "m", "--widths", "2", "--compile")
    assert seen == [("m", "bfloat16", [1, 4, 16], 64, 2, "f", False), ("m", None, [2], 256, 15, None, True)]
    for widths in ("1,x", "", "0"):
        assert f"--widths is '{widths}'" in refused("bench-step", "m", "--widths", widths)
    for good, code in ((True, 0), (False, 1)):
        monkeypatch.setattr("foretoken.demo.run", lambda good=good: good)
        assert run("demo").exit_code == code


def test_training_commands_are_wired(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen: list[Any] = []
    monkeypatch.setattr("foretoken.training.loop.run", lambda *args: seen.append(args))
    ok("train", "recipe.yaml", "steps=3", "optimizer.lr=0.1")
    ok("train", "recipe.yaml")
    assert seen == [(Path("recipe.yaml"), ["steps=3", "optimizer.lr=0.1"]), (Path("recipe.yaml"), [])]
    out = tmp_path / "said.jsonl"
    (tmp_path / "asked.txt").write_text(f"{PROMPT}\nThe dog\n")
    asked = ("--prompts", str(tmp_path / "asked.txt"))
    ok("distill-data", STORIES, "--out", str(out), *asked, "--max-new-tokens", "5")
    said = [json.loads(line)["completion"] for line in out.read_text().splitlines()]
    target = asset(STORIES, torch.float32)
    assert said == [o.text for o in foretoken.generate(target, [PROMPT, "The dog"], max_new_tokens=5)]
    assert "names no drafter's folder" in refused("calibrate", STORIES, "medusa")
    assert "--temperatures is 'x'" in refused("calibrate", STORIES, "medusa:x", "--temperatures", "x")


def test_training_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "foretoken.training.loop", None)
    assert "foretoken[train]" in refused("train", "recipe.yaml")


# chat


def test_chat_without_a_template_continues_the_text():
    lines = [PROMPT, "Then", "/reset", PROMPT, "/what", "/exit", "never read"]
    result = ok("chat", STORIES, "--max-new-tokens", "8", stdin="\n".join(lines))
    target = asset(STORIES, torch.float32)
    first = foretoken.generate(target, PROMPT, max_new_tokens=8).text
    second = foretoken.generate(target, PROMPT + first + "Then", max_new_tokens=8).text
    assert result.stdout == f"{first}\n{second}\n{first}\n"
    assert "has no chat template: it continues the text" in result.stderr
    assert result.stderr.count("exact") == 3
    assert result.stderr.count("Forgotten.") == 1
    assert result.stderr.count("/reset forgets") == 2


def test_chat_with_a_template_keeps_the_messages(copy: Path):
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}[a]{% endif %}"
    file = copy / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    result = ok("chat", str(copy), "--max-new-tokens", "8", stdin="Hello\nMore\n")
    target = asset(STORIES, torch.float32)
    assert target.tokenizer is not None

    def said(text: str) -> str:
        ids = target.tokenizer(text, add_special_tokens=False)["input_ids"]
        return foretoken.generate(target, ids, max_new_tokens=8).text

    first = said("[user] Hello\n[a]")
    second = said(f"[user] Hello\n[assistant] {first}\n[user] More\n[a]")
    assert result.stdout == f"{first}\n{second}\n"
    assert "chat template" not in result.stderr


def test_chat_goes_on_after_a_line_that_is_too_long():
    result = ok("chat", STORIES, "--max-new-tokens", "8", stdin=f"{'dog ' * 600}\n{PROMPT}\n")
    first = foretoken.generate(asset(STORIES, torch.float32), PROMPT, max_new_tokens=8).text
    assert result.stdout == first + "\n"
    assert "the model's context is 512" in " ".join(result.stderr.split())


def test_ctrl_c_stops_one_answer_of_a_chat(monkeypatch: pytest.MonkeyPatch):
    """What had come stays part of the talk."""
    whole = foretoken.stream

    def interrupted(target: Any, prompt: Any, **keywords: Any) -> Any:
        pieces = whole(target, prompt, **keywords)
        if keywords["number"] > 1:
            yield from pieces
            return
        yield from (next(pieces) for _ in range(3))
        raise KeyboardInterrupt

    monkeypatch.setattr("foretoken.chat.stream", interrupted)
    result = ok("chat", STORIES, "--max-new-tokens", "8", "--drafter", "none", stdin=f"{PROMPT}\nThen\n/exit\n")
    target = asset(STORIES, torch.float32)
    first = foretoken.generate(target, PROMPT, max_new_tokens=3).text
    second = foretoken.generate(target, PROMPT + first + "Then", max_new_tokens=8).text
    assert result.stdout.startswith(f"{first}\n{second}\n")
    assert "Stopped." in result.stderr
