"""Trained drafters on disk: what is written is what is read, and what does not fit says so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from foretoken import saved as store
from foretoken.drafters import make_drafter
from foretoken.drafters.medusa import Architecture, fresh
from foretoken.errors import UserError
from foretoken.target import Target
from tests.families import make


def written(folder: Path, target: Target, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """Medusa heads with some noise, saved in `folder`."""
    torch.manual_seed(0)
    heads = fresh(target, Architecture(heads=2))
    for parameter in heads.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    described = store.Saved("medusa", {"heads": 2}, store.identity(target), {"0": [[0], [0, 0]]})
    store.save(folder, described, heads, dtype)
    return heads


def refused(folder: Path, target: Target, name: str = "medusa", **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        make_drafter(f"{name}:{folder}", target, settings)
    return str(error.value)


def test_heads_come_back_as_they_went(tmp_path: Path):
    target = make("llama", torch.float32)
    heads = written(tmp_path, target)
    drafter: Any = make_drafter(f"medusa:{tmp_path}", target)
    for name, value in heads.state_dict().items():
        assert torch.equal(drafter.heads.state_dict()[name], value)
    assert drafter.plan.paths(0.0) == [[0], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_target_is_recognised_in_any_precision(dtype: torch.dtype, tmp_path: Path):
    written(tmp_path, make("llama", torch.float32), torch.bfloat16)
    target = make("llama", torch.float32)
    target.model.to(dtype)
    assert store.same_weights(store.fingerprint(target), store.read(tmp_path).target["fingerprint"])
    make_drafter(f"medusa:{tmp_path}", target)


def test_heads_of_other_weights_are_refused(tmp_path: Path):
    """Unless the user insists; another size is refused in any case."""
    written(tmp_path, make("llama", torch.float32))
    assert "was trained on other weights" in refused(tmp_path, make("llama", torch.float32, seed=1))
    make_drafter(f"medusa:{tmp_path}", make("llama", torch.float32, seed=1), {"other_target": "true"})
    trained = make("llama", torch.float32)  # one step of training is enough to be another model
    for parameter in trained.model.parameters():
        parameter.data += 1e-3 * torch.sign(parameter.data)
    assert "was trained on other weights" in refused(tmp_path, trained)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("hidden", 64, "hidden size 64"), ("vocab", 999, "vocabulary 999"), ("layers", 7, "number of layers 7")],
)
def test_heads_of_another_model_are_refused(key: str, value: int, words: str, tmp_path: Path):
    target = make("llama", torch.float32)
    written(tmp_path, target)
    text = json.loads((tmp_path / store.DESCRIPTION).read_text())
    text["target"][key] = value
    (tmp_path / store.DESCRIPTION).write_text(json.dumps(text))
    assert words in refused(tmp_path, target)


def test_what_does_not_fit_is_named(tmp_path: Path):
    target = make("llama", torch.float32)
    assert "holds no drafter.json" in refused(tmp_path / "nowhere", target)
    written(tmp_path, target)
    assert "holds a medusa drafter, not mtp" in refused(tmp_path, target, "mtp")
    text = json.loads((tmp_path / store.DESCRIPTION).read_text())
    for architecture, words in (
        ({"heads": 3}, "missing ['blocks.2.0.linear.bias', 'blocks.2.0.linear.weight', 'outputs.2']"),
        ({"heads": 1}, "unexpected ['blocks.1.0.linear.bias', 'blocks.1.0.linear.weight', 'outputs.1']"),
        ({"headz": 1}, "'headz' is no architecture setting"),
    ):
        (tmp_path / store.DESCRIPTION).write_text(json.dumps(text | {"architecture": architecture}))
        assert words in refused(tmp_path, target)
    (tmp_path / store.DESCRIPTION).write_text("{")
    assert "cannot be read" in refused(tmp_path, target)


def test_a_copy_cut_short_is_refused(tmp_path: Path):
    target = make("llama", torch.float32)
    written(tmp_path, target)
    file = tmp_path / store.WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    assert "cut short" in refused(tmp_path, target)
