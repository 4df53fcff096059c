"""EAGLE drafters as others publish them: `config.json` beside `model.safetensors` or `pytorch_model.bin`.

EAGLE-1 and 2: `fc`, `layers.0.`, the target's output head (SafeAILab/EAGLE, eagle/model/cnets1.py). EAGLE-3: `fc`,
`midlayer.` (there, cnets.py) or `layers.0.` (ModelOpt, and the speculators format with its nested configuration).
Loading is strict, and whatever a configuration asks for that we do not compute is refused.
"""

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file

from foretoken.block import Size, Stretch
from foretoken.errors import UserError
from foretoken.loading import first_line
from foretoken.native import files_of
from foretoken.native import read as read_files
from foretoken.saved import DESCRIPTION, TOLERANCE, WEIGHTS
from foretoken.target import UNNORMED, Target

EMBEDDING, MEMBERS = "embed_tokens.weight", "t2d"
"""Tensors that nothing is made of: they are compared."""
BIASES = [f"self_attn.{name}_proj.bias" for name in "qkvo"]
ONLY_THIRD = ("midlayer.", "layers.0.hidden_norm.", "lm_head.", "norm.", "input_norm.", "fc_norm.", "d2t", "t2d")
"""What keys begin with that version 1 has not."""
USUAL: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "use_aux_hidden_state": True,
    "return_hidden_post_norm": False,
    "eh_proj_before_attn": False,
    "mask_hidden": False,
    "quantization_config": None,
}
"""Settings of configurations, and their only value that we compute."""


@dataclass(frozen=True, slots=True)
class Published:
    """A published drafter, read and found to fit its target.

    name      the folder or hub name
    settings  of the drafter's architecture
    size      of its layer
    config    its settings, however they were nested
    tensors   as stored
    starts    what our names begin with -> what the stored ones begin with instead
    """

    name: str
    settings: Mapping[str, Any]
    size: Size
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    starts: Mapping[str, str]

    def fill(self, network: nn.Module) -> None:
        """Copy the tensors into a network of these settings and this size, all of them and no other."""
        self._complete(network)
        own = {self._stored(name): (name, tensor) for name, tensor in network.state_dict().items()}
        known = {EMBEDDING, MEMBERS, *(key for key in self.tensors if key.endswith("rotary_emb.inv_freq"))}
        without = set[str]() if self.config.get("bias") else {"fc.bias"}  # a projection without one
        missing = sorted(own.keys() - self.tensors.keys() - without)
        surplus = sorted(self.tensors.keys() - own.keys() - known)
        if missing or surplus:
            raise UserError(
                f"The tensors of {self.name!r} are not those of EAGLE-{self.settings['version']}: missing "
                f"{missing or 'nothing'}, unexpected {surplus or 'nothing'}; fetch it again, or use another."
            )
        found: dict[str, Tensor] = {}
        for key, (name, tensor) in own.items():
            given = self.tensors.get(key, torch.zeros_like(tensor))
            if given.shape != tensor.shape:
                raise UserError(
                    f"{key!r} in {self.name!r} has shape {list(given.shape)}, and its {CONFIG_NAME} and this target "
                    f"need {list(tensor.shape)}; fetch it again, or use it with the model it was trained for."
                )
            found[name] = self._ours(key, given)
        network.load_state_dict(found)

    def _complete(self, network: nn.Module) -> None:
        """Give the network the parts that drafters trained here never have."""
        wanted = BIASES[:3] if self.config.get("qkv_bias", self.config.get("attention_bias")) else []
        layer: Any = network.get_submodule("layer")
        for name in BIASES:
            if name in wanted or self.starts["layer."] + name in self.tensors:
                projection = layer.get_submodule(name.removesuffix(".bias"))
                projection.bias = nn.Parameter(torch.zeros(projection.out_features))
        if self.config.get("norm_before_fc"):
            fuse: Any = network.get_submodule("fc")
            network.add_module("fc", nn.Sequential(nn.RMSNorm(fuse.in_features, self.size.eps), fuse))

    def _stored(self, name: str) -> str:
        """The stored name of a tensor of ours."""
        start = next((start for start in self.starts if name.startswith(start)), "")
        return self.starts.get(start, "") + name.removeprefix(start)

    def _ours(self, key: str, tensor: Tensor) -> Tensor:
        """A stored tensor with our meaning."""
        if key == "d2t":
            return tensor + torch.arange(len(tensor))
        if key in ("fc.weight", "input_norm.weight") and UNNORMED in self.settings.get("features", ()):
            return tensor.roll(self.size.hidden, -1)  # that state is the last of theirs and the first of ours
        return tensor


def is_published(path: str) -> bool:
    """Whether what lies at `path`, a folder or a hub name, is no drafter that was trained here."""
    folder = Path(path)
    if not (folder / DESCRIPTION).is_file():
        return True
    return (folder / CONFIG_NAME).is_file() and not (folder / WEIGHTS).is_file()  # it holds calibrated trees


def read(name: str, target: Target, *, other_target: bool = False) -> Published:
    """The drafter published at `name`; `UserError` if it is none, or not one for this target.

    other_target  do not ask whether it was trained with this target's token embedding
    """
    raw, config = described(name)
    tensors = stored(name)
    before = layer_start(name, tensors)
    size = size_of(name, config)
    require_fit(name, config, size, target)
    if not other_target:
        require_embedding(name, tensors, target)
    if not any(key.startswith(ONLY_THIRD) for key in tensors):
        starts = {"layer.fc.": "fc.", "layer.": before}
        return Published(name, {"version": 1}, size, config, tensors, starts)
    settings = third(name, raw, config, tensors, target)
    starts = {"layer.": before, "vocabulary": "d2t"}
    starts |= {"fc.0.": "input_norm.", "fc.1.": "fc."} if config.get("norm_before_fc") else {}
    count = len(settings["features"])
    shift = int(UNNORMED in settings["features"])  # theirs comes last, ours first
    starts |= {f"fc_norms.{i}.": f"fc_norm.{(i - shift) % count}." for i in range(count)}
    return Published(name, settings, size, config, tensors, starts)


def described(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """`config.json` as it is, and its settings without their nesting; `UserError` if they ask for what we have not."""
    path = None
    if Path(name).is_dir() or not (name.startswith((".", "/", "~")) or name.count("/") > 1):
        path = located(name, CONFIG_NAME)
    if path is None:
        raise nothing(name)
    try:
        raw: dict[str, Any] = {} | json.loads(Path(path).read_text())
        nested = [raw.get(part) or {} for part in ("transformer_layer_config", "eagle_config")]
        config: dict[str, Any] = raw | nested[0] | nested[1]
    except (OSError, ValueError, TypeError) as error:
        raise unreadable(name, error) from error
    kind = raw.get("speculators_model_type", "eagle3")
    if kind != "eagle3":
        raise UserError(f"{name!r} is a {kind!r} of the speculators format; of its types eagle3 alone can be used.")
    for key, value in USUAL.items():
        if config.get(key, value) not in (value, None):
            raise UserError(
                f"The {CONFIG_NAME} of {name!r} sets {key} to {config[key]!r} and only {value!r} is supported; use "
                "another drafter."
            )
    return raw, config


def stored(name: str) -> dict[str, Tensor]:
    """Every tensor of the checkpoint."""
    if any(located(name, file) for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        return read_files(name, files_of(name))
    if (path := located(name, WEIGHTS_NAME)) is None:
        raise nothing(name)
    try:
        found = torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise unreadable(name, f"{WEIGHTS_NAME} is no pickle of tensors alone, and code in it is not run") from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise unreadable(name, error) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise unreadable(name, f"{WEIGHTS_NAME} holds something other than named tensors")
    return found


def located(name: str, file: str) -> str | None:
    """Where a file of the checkpoint lies; None if it has none such."""
    try:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise nothing(name, f" ({first_line(error)})") from error


def layer_start(name: str, tensors: Mapping[str, Tensor]) -> str:
    """What the layer's keys begin with."""
    found = [start for start in ("midlayer.", "layers.0.") if any(key.startswith(start) for key in tensors)]
    if "fc.weight" not in tensors or not found:
        raise UserError(
            f"{name!r} holds no EAGLE: its tensors have no fc.weight beside layers.0.* (EAGLE-1, 2) or midlayer.* "
            "(EAGLE-3); give the folder or hub name of one."
        )
    later = [key for key in sorted(tensors) if key.startswith(ONLY_THIRD)]
    mixed = [f"{start}*" for start in found] if len(found) > 1 else [*later[:1], "fc.bias"]
    if len(found) > 1 or (later and "fc.bias" in tensors):
        raise UserError(
            f"{name!r} mixes layouts: it has {mixed[0]} and {mixed[1]}, which do not go together; fetch it again."
        )
    return found[0]


def size_of(name: str, config: Mapping[str, Any]) -> Size:
    """The size of the drafter's layer, which need not be the target's."""
    needed = ("hidden_size", "num_attention_heads", "intermediate_size")
    if lacking := [key for key in needed if not config.get(key)]:
        raise UserError(f"The {CONFIG_NAME} of {name!r} says no {', no '.join(lacking)}; fetch it again.")
    hidden, heads, inner = (int(config[key]) for key in needed)
    theta, stretch = rotary(name, config)
    return Size(
        hidden,
        heads,
        int(config.get("num_key_value_heads") or heads),
        int(config.get("head_dim") or hidden // heads),
        inner,
        theta,
        float(config.get("rms_norm_eps") or 1e-6),
        stretch,
    )


def rotary(name: str, config: Mapping[str, Any]) -> tuple[float, Stretch | None]:
    """The base of the rotary frequencies, and what slows them."""
    rope: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    try:
        makers: dict[str, Callable[[], Stretch | None]] = {
            "default": lambda: None,
            "linear": lambda: Stretch(float(rope["factor"])),
            "llama3": lambda: Stretch(
                float(rope["factor"]),
                float(rope["low_freq_factor"]),
                float(rope["high_freq_factor"]),
                int(rope["original_max_position_embeddings"]),
            ),
        }
        if kind in makers and rope.get("partial_rotary_factor", 1.0) == 1.0:
            return theta, makers[kind]()
    except KeyError as error:
        raise UserError(
            f"The {CONFIG_NAME} of {name!r} says no {error.args[0]} of its {kind!r} rotary scaling; fetch it again."
        ) from error
    raise UserError(
        f"The {CONFIG_NAME} of {name!r} asks for rotary positions {rope}; default, linear and llama3 ones over whole "
        "heads are supported: use another drafter."
    )


def require_fit(name: str, config: Mapping[str, Any], size: Size, target: Target) -> None:
    """`UserError` unless the drafter's widths and vocabulary are the target's."""
    own = target.config.hidden_size
    reads = int(config.get("target_hidden_size") or size.hidden)
    for word, given, need in (
        ("a target of hidden size", reads, own),
        ("a target of vocabulary", int(config.get("vocab_size") or target.vocab), target.vocab),
    ):
        if given != need:
            raise UserError(
                f"The drafter in {name!r} is for {word} {given} and this one has {need}; use it with the model it was "
                "trained for."
            )
    if size.hidden != own:
        raise UserError(
            f"The drafter in {name!r} has states of {size.hidden} numbers and this target {own}, and a drafter with an "
            "embedding of its own width cannot be used; use another."
        )


def require_embedding(name: str, tensors: Mapping[str, Tensor], target: Target) -> None:
    """`UserError` unless a stored token embedding is the target's, which is what we embed with."""
    own = cast(nn.Embedding, target.model.get_input_embeddings()).weight.detach()
    given = tensors.get(EMBEDDING, own)
    pairs = zip(given.split(4096), own.split(4096), strict=True) if given.shape == own.shape else None
    if pairs is None or not all(close(a.to(own.device), b) for a, b in pairs):
        raise UserError(
            f"The token embedding in {name!r} is not this target's, with which guesses would be made; use the model it "
            "was trained for, or set other_target=true (the output stays exact, fewer guesses survive)."
        )


def close(a: Tensor, b: Tensor) -> bool:
    """Whether all numbers are the same, whatever precision each was stored in."""
    a, b = a.float(), b.float()
    return bool(((a - b).abs() <= TOLERANCE * torch.maximum(a.abs(), b.abs()) + 1e-7).all())


def third(
    name: str, raw: Mapping[str, Any], config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target
) -> dict[str, Any]:
    """The settings of an EAGLE-3."""
    if "speculators_model_type" in raw and "norm_before_residual" not in config:
        raise UserError(
            f"The {CONFIG_NAME} of {name!r} does not say norm_before_residual, which speculators then takes as false "
            "and vLLM as true; write there the one it was trained with."
        )
    if config.get("fc_norm") and config.get("norm_before_fc"):
        raise UserError(f"The {CONFIG_NAME} of {name!r} sets both fc_norm and norm_before_fc; set the one it has.")
    drafted = int(config.get("draft_vocab_size") or target.vocab)
    require_vocabulary(name, tensors, target)
    return {
        "version": 3,
        "features": features(name, raw, target),
        "vocabulary": drafted if drafted != target.vocab or "d2t" in tensors else 0,
        "norm_before_residual": bool(config.get("norm_before_residual")),
        "norm_features": bool(config.get("fc_norm")),
        "norm_output": bool(config.get("norm_output")),
    }


def features(name: str, raw: Mapping[str, Any], target: Target) -> tuple[int, ...]:
    """The states that the drafter fuses, i being the input of layer i, in the layers' order, as engines read them.

    A configuration's own ids mean that as well (vLLM, speculators). In `eagle_config`, ids from 1 on are outputs
    (SpecForge; sgl-project/sglang#25454). None: 2, the middle and the third from the end, as in EAGLE-3's code. The
    output of the last layer is the one before the final norm (sgl-project/sglang#32334).
    """
    last, key = target.config.num_hidden_layers, "eagle_aux_hidden_state_layer_ids"
    nested = list((raw.get("eagle_config") or {}).get(key) or ())
    outputs = not raw.get(key) and nested[:1] == [1]
    ids = sorted({int(i) + outputs for i in raw.get(key) or nested or (2, last // 2, last - 3)})
    if outside := [i for i in ids if not 0 <= i <= last]:
        raise UserError(
            f"The drafter in {name!r} reads the state before layer {outside[0]} and this target has {last} layers; use "
            "it with the model it was trained for."
        )
    return (UNNORMED, *ids[:-1]) if ids[-1] == last else tuple(ids)


def require_vocabulary(name: str, tensors: Mapping[str, Tensor], target: Target) -> None:
    """`UserError` unless d2t names tokens of the target, each once, and t2d the same."""
    if (offsets := tensors.get("d2t")) is None:
        return
    tokens = offsets + torch.arange(len(offsets))
    fits = bool(((tokens >= 0) & (tokens < target.vocab)).all()) and len(tokens.unique()) == len(tokens)
    if fits and (members := tensors.get(MEMBERS)) is not None:
        fits = members.nonzero()[:, 0].tolist() == tokens.sort().values.tolist()
    if not fits:
        raise UserError(
            f"The draft vocabulary in {name!r} (d2t, t2d) does not name tokens of this target of {target.vocab}, each "
            "once; fetch it again, or use it with the model it was trained for."
        )


def nothing(name: str, why: str = "") -> UserError:
    return UserError(
        f"There is no EAGLE at {name!r}{why}: neither {DESCRIPTION} (what `foretoken train` writes) nor {CONFIG_NAME} "
        f"with {SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME} (a published one); give the folder or hub name of one."
    )


def unreadable(name: str, error: Exception | str) -> UserError:
    why = error if isinstance(error, str) else first_line(error)
    return UserError(f"The checkpoint {name!r} cannot be read ({why}); fetch it again.")
