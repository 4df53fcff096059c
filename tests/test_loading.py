"""Loading: what transformers would load, bit for bit, in the memory of the weights alone; and sessions do not grow."""

import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import foretoken
from foretoken import UserError
from foretoken.decode import Request, Session
from foretoken.drafters import make_drafter
from foretoken.generation import decode_all
from foretoken.loading import read_config, to_convert
from foretoken.rules import Match
from tests.families import make
from tests.models import STORIES, asset

FAMILIES = {
    "llama": "nothing special",
    "mixtral": "experts fused from several tensors",
    "deepseek_v3": "a bias of routers stays in float32",
    "gemma2": "a scale that is made in the dtype asked for",
    "gpt2": "other names, tied embeddings",
}


def tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_converted_weights_are_transformers_own(family: str, saved: torch.dtype, asked: str, tmp_path: Path):
    """Every parameter and buffer, bit for bit, from one file and from shards."""
    make(family, saved).model.save_pretrained(tmp_path, max_shard_size="20KB" if family == "mixtral" else "1GB")
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=asked)
    ours = foretoken.load(tmp_path, dtype=asked, device="cpu").model
    want, found = tensors(theirs), tensors(ours)
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert ours.dtype == theirs.dtype == ours.config.dtype
    assert ours.name_or_path == theirs.name_or_path == ours.config.name_or_path
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert not ours.training
    assert bool(to_convert(str(tmp_path), read_config(str(tmp_path)), ours.dtype)) == (ours.dtype != saved)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of a model, to be damaged."""
    return Path(shutil.copytree(STORIES, tmp_path / "model"))


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_incomplete_weights_are_refused_in_every_dtype(copy: Path, dtype: str | None):
    file = copy / "model.safetensors"
    whole = load_file(file)
    save_file({k: v for k, v in whole.items() if "layers.2.mlp.up" not in k}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors, 'model\.layers\.2\.mlp\.up_proj\.weight' first; the check"):
        foretoken.load(copy, dtype=dtype, device="cpu")
    save_file({**whole, "model.norm.weight": torch.ones(3)}, file, {"format": "pt"})
    with pytest.raises(UserError, match="cannot be read"):
        foretoken.load(copy, dtype=dtype, device="cpu")
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"cannot be read .* cut short"):
        foretoken.load(copy, dtype=dtype, device="cpu")


def test_end_tokens_come_with_converted_weights(copy: Path):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "bos_token_id": 1}))
    assert foretoken.load(copy, dtype="float64", device="cpu").model.generation_config.eos_token_id == [7, 9]


# memory

PROBE = """
import re, sys
from pathlib import Path
import torch, foretoken.loading
from foretoken.kernels import load_kernels
from foretoken.lowering import Source, tensors
from transformers import LlamaForCausalLM

def held(what):
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

def packed(path):
    model = foretoken.loading.load(path, device="cpu").model
    groups = "self_attn.q self_attn.k self_attn.v", "self_attn.o", "mlp.gate mlp.up", "mlp.down"
    layers = [[f"model.layers.{i}.{n}_proj.weight" for n in g.split()] for i in range(4) for g in groups]
    sources = [Source("packed", tuple(names)) for names in [*layers, ["lm_head.weight"]]]
    model.packed = tensors(sources, model, {})
    return model

how, model, warm = sys.argv[1:]
if how == "transformers":
    load = lambda path: LlamaForCausalLM.from_pretrained(path, dtype="float16")
elif how == "packed":
    load_kernels()
    load = packed
else:
    load = lambda path: foretoken.loading.load(path, dtype=how.strip("-") or None, device="cpu").model
load(warm)  # libraries are in memory
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
before, own = held("VmRSS"), held("RssAnon")
model = load(model)
weights = sum(p.nbytes for p in model.parameters())
print((held("VmHWM") - before) / weights, (held("RssAnon") - own) / weights)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 190 MiB, most of it in two matrices."""
    folder = tmp_path_factory.mktemp("big")
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 16}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **sizes))  # pyright: ignore
    model.to_empty(device="cpu").to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.02)
    model.save_pretrained(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says what a process held at most")
@pytest.mark.parametrize(
    ("how", "least", "most", "kept"),
    [
        ("-", 0.0, 0.1, 0.0),  # as saved: not a byte is read before it is used, nor copied then
        ("float16", 0.9, 1.1, 1.0),
        ("float32", 0.9, 1.1, 1.0),
        ("packed", 1.3, 1.5, 0.7),  # all but the embedding of inputs: once as a file, once packed, and no third time
        ("transformers", 1.5, 2.2, 1.0),  # maps all of the file while it converts: what ours is for
    ],
)
def test_loading_holds_the_weights_once(how: str, least: float, most: float, kept: float, big: Path):
    command = [sys.executable, "-c", PROBE, how, str(big), STORIES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    peak, own = map(float, done.stdout.split())
    assert least <= peak <= most
    assert own == pytest.approx(kept, abs=0.1)


# growth


@pytest.fixture
def few_objects() -> Generator[None]:
    """The collector knows nothing made before, so that to count is quick."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live() -> tuple[int, int]:
    """(number, bytes) of all tensors made since `few_objects`."""
    gc.collect()
    found = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
    return len(found), sum({x.data_ptr(): x.nbytes for x in found}.values())


def leaks(drafter: str, held: "list[Any] | None" = None) -> bool:
    """Whether tensors grew over some hundred steps of rows that join and leave; `held` gets something of each step."""
    target = asset(STORIES, torch.float32)
    method = make_drafter(drafter, target, {"path": target} if drafter == "draft_model" else {})
    requests = [Request([1, 5 + i, 9], number=i, max_new_tokens=30 + i % 7) for i in range(36)]
    seen: list[tuple[int, int]] = []

    def on_step(session: Session) -> None:
        if held is not None:
            held.append(session.last.emitted)
        seen.append(live())

    decode_all(target, method, requests, Match(), batch_size=3)  # what is made once for each size of batch
    decode_all(target, method, requests, Match(), batch_size=3, on_step=on_step)
    half = len(seen) // 2
    assert half > 30
    return any(max(x[i] for x in seen[half:]) > max(x[i] for x in seen[:half]) for i in range(2))


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("drafter", ["none", "suffix", "draft_model"])
def test_sessions_do_not_grow(drafter: str):
    assert not leaks(drafter)


@pytest.mark.usefixtures("few_objects")
def test_a_session_that_grows_is_noticed():
    assert leaks("none", [])
