"""Trained drafters on disk: `drafter.json` says what they are and for which target, `drafter.safetensors` the rest.

Loading is strict: another method, another target, a missing or surplus tensor is an error that says so.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foretoken.errors import UserError, unknown
from foretoken.target import Target

DESCRIPTION, WEIGHTS = "drafter.json", "drafter.safetensors"
SAMPLES = 64
"""Weights of the target that a fingerprint holds."""
TOLERANCE = 2.0**-7
"""Relative difference allowed to each: loading in 16 bits rounds by up to 2**-9."""


@dataclasses.dataclass(frozen=True, slots=True)
class Saved:
    """What `drafter.json` holds.

    method        the drafter's name
    architecture  its settings that shape the weights
    target        vocabulary, hidden size, layers and fingerprint of the model it was trained on
    trees         calibrated trees, by the temperature they were measured at: lists of paths
    training      how it was trained, for people
    """

    method: str
    architecture: dict[str, Any]
    target: dict[str, Any]
    trees: dict[str, list[list[int]]] = dataclasses.field(default_factory=dict[str, list[list[int]]])
    training: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])


def identity(target: Target) -> dict[str, Any]:
    """What a target is recognised by."""
    return {
        "name": target.name,
        "vocab": target.vocab,
        "hidden": target.config.hidden_size,
        "layers": target.config.num_hidden_layers,
        "fingerprint": fingerprint(target),
    }


def fingerprint(target: Target) -> list[float]:
    """`SAMPLES` weights spread evenly over the target's matrices."""
    matrices = [p for _, p in sorted(target.model.named_parameters()) if p.ndim > 1 and p.is_floating_point()]
    chosen = [matrices[i * len(matrices) // SAMPLES] for i in range(SAMPLES)]
    values = [p.detach().flatten()[(2 * i + 1) * p.numel() // (2 * SAMPLES)] for i, p in enumerate(chosen)]
    return [float(f"{v:.6g}") for v in torch.stack([v.float().cpu() for v in values]).tolist()]


def same_weights(ours: list[float], theirs: list[float]) -> bool:
    """Whether two fingerprints are of one model, whatever precision each was loaded in."""
    return len(ours) == len(theirs) and all(
        abs(a - b) <= TOLERANCE * max(abs(a), abs(b)) + 1e-7 for a, b in zip(ours, theirs, strict=True)
    )


def save(folder: Path, saved: Saved, weights: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Write the description and the weights, in `dtype` if given."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        k: v.detach().cpu().to(dtype if dtype and v.is_floating_point() else v.dtype).contiguous()
        for k, v in weights.state_dict().items()
    }
    draft = folder / f".{WEIGHTS}.part"
    save_file(tensors, draft, {"format": "pt"})
    draft.chmod(draft.stat().st_mode | 0o044)  # safetensors lets nobody else read
    draft.replace(folder / WEIGHTS)
    describe(folder, saved)


def describe(folder: Path, saved: Saved) -> None:
    """Write `drafter.json` alone."""
    draft = folder / f".{DESCRIPTION}.part"
    draft.write_text(json.dumps(dataclasses.asdict(saved), indent=1) + "\n")
    draft.replace(folder / DESCRIPTION)


def read(folder: Path, method: str | None = None) -> Saved:
    """The description in `folder`; `UserError` if there is none, or it is of another method."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(f"'{folder}' holds no {DESCRIPTION}; give the folder that `foretoken train` wrote.")
    try:
        saved = Saved(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"'{path}' cannot be read ({error}); fetch or train the drafter again.") from error
    if method is not None and saved.method != method:
        raise UserError(f"'{folder}' holds a {saved.method} drafter, not {method}; use {saved.method}:{folder}.")
    return saved


def require_target(saved: Saved, target: Target, folder: Path) -> None:
    """`UserError` unless the drafter was trained on this target."""
    trained, given = saved.target, identity(target)
    for key, word in (("hidden", "hidden size"), ("vocab", "vocabulary"), ("layers", "number of layers")):
        if trained[key] != given[key]:
            raise UserError(
                f"The drafter in '{folder}' was trained on a target of {word} {trained[key]} and this one has "
                f"{given[key]}; use it with {trained['name']}, or train one for this target."
            )
    if not same_weights(trained["fingerprint"], given["fingerprint"]):
        raise UserError(
            f"The drafter in '{folder}' was trained on other weights than this target's; use it with "
            f"{trained['name']}, or set other_target=true (the output stays exact, fewer guesses survive)."
        )


def trees_in(folder: Path, method: str, target: Target, *, required: bool) -> dict[str, list[list[int]]]:
    """The trees calibrated for a drafter whose weights are not ours, such as a plain model; none if there are none.

    Trees for another target are none, or a `UserError` if they are required.
    """
    if not (folder / DESCRIPTION).is_file() or (saved := read(folder)).method != method:
        return {}
    try:
        require_target(saved, target, folder)
    except UserError as error:
        if not required:
            return {}
        raise UserError(
            f"The trees in '{folder}' were calibrated for another target, {saved.target['name']}; run `foretoken "
            "calibrate` for this one."
        ) from error
    return saved.trees


def settle(architecture: type, saved: Saved, folder: Path) -> Any:
    """The `architecture` dataclass that the description holds."""
    fields = [f.name for f in dataclasses.fields(architecture)]
    for key in saved.architecture:
        if key not in fields:
            raise unknown(f"architecture setting in '{folder}'", key, fields)
    return architecture(**saved.architecture)


def load_weights(folder: Path, weights: nn.Module) -> None:
    """Copy the stored tensors into `weights`, all of them and no other; each is cast to what is there."""
    try:
        tensors: dict[str, Tensor] = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"'{folder / WEIGHTS}' cannot be read ({error}); the copy is cut short: fetch it again."
        ) from error
    own = weights.state_dict()
    missing, surplus = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or surplus:
        raise UserError(
            f"'{folder / WEIGHTS}' does not fit its description: missing {missing or 'nothing'}, unexpected "
            f"{surplus or 'nothing'}; fetch or train the drafter again."
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"'{name}' in '{folder / WEIGHTS}' has shape {list(tensor.shape)} and {list(own[name].shape)} is "
                "needed; fetch or train the drafter again."
            )
    weights.load_state_dict(tensors)
