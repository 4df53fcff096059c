"""An EAGLE-1 that was trained here, as vLLM reads one: `config.json` beside `model.safetensors`.

vLLM's projection of [embedding; feature] has no bias and ours has. A constant added to every token's embedding does the
same, where the projection of the embedding can be solved for it; so the drafter gets an embedding of its own.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from foretoken.errors import UserError
from foretoken.saved import DESCRIPTION, WEIGHTS

EMBEDDING = "embed_tokens.weight"
NEAR = 1e-3
"""How much of the bias may be lost in solving for it."""


def exported(drafter: Path, target: Path, made: Path) -> Path:
    """The folder that vLLM reads: the drafter's own, or else one in `made`; `UserError` if it cannot be written."""
    if not (drafter / DESCRIPTION).is_file():
        return drafter
    folder = made / "eagle"
    if not (folder / "config.json").exists():
        write(drafter, target, folder)
    return folder


def write(drafter: Path, target: Path, folder: Path) -> None:
    described: dict[str, Any] = json.loads((drafter / DESCRIPTION).read_text())
    architecture: dict[str, Any] = described["architecture"]
    if described["method"] != "eagle" or architecture["version"] != 1:
        raise UserError(
            f"The drafter in {str(drafter)!r} is no EAGLE-1, which is all that is written for vLLM; give one, or a "
            "folder with config.json and model.safetensors as others publish them."
        )
    stored = {name.removeprefix("layer."): tensor.float() for name, tensor in load_file(drafter / WEIGHTS).items()}
    tensors = {name if name.startswith("fc.") else f"layers.0.{name}": tensor for name, tensor in stored.items()}
    tensors[EMBEDDING] = shifted(embedding(target), tensors["fc.weight"], tensors.pop("fc.bias"))
    config: dict[str, Any] = json.loads((target / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "intermediate_size": len(stored["mlp.gate_proj.weight"])}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")  # last: its presence says all is there


def embedding(target: Path) -> Tensor:
    """The target's token embedding [V, H]."""
    name = "model." + EMBEDDING
    for path in target.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118 - no mapping
                return file.get_tensor(name).float()
    raise UserError(f"{str(target)!r} has no {name!r} in model*.safetensors, which vLLM's EAGLE shares; leave it out.")


def shifted(table: Tensor, projection: Tensor, bias: Tensor) -> Tensor:
    """The embedding [V, H] under which projection [H, 2H] without the bias [H] computes what it did with it."""
    left = projection[:, : table.shape[1]].double()
    shift = torch.linalg.lstsq(left, bias.double()[:, None]).solution[:, 0]
    lost = (left @ shift - bias).norm() / bias.norm().clamp_min(1e-30)
    if lost > NEAR:
        raise UserError(
            f"vLLM's EAGLE-1 has no bias, and this drafter's cannot be moved into an embedding ({lost:.0%} of it would "
            "be lost); leave vllm:eagle out."
        )
    return (table.double() + shift).float()
