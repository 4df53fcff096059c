"""Multi-token prediction modules that models are published with, read from the model's own checkpoint.

A `Layout` says where a family keeps them. `find` recognises it by the checkpoint's keys, without reading a tensor;
`Native.fill` reads the modules' tensors, and no others, into modules whose blocks are copies of one of the target's.
Tensors of the block go through transformers' own conversion of that block's (experts fused, names changed).
"""

import copy
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from foretoken.branch import blocks_of
from foretoken.errors import UserError
from foretoken.target import Target


@dataclass(frozen=True, slots=True)
class Layout:
    """Where checkpoints keep module k = 0, 1, ...: {k} in a name is k, {n} is the target's number of layers plus k.

    families  model types published so
    keys      a pattern of every key of the modules; its group is the number in it
    parts     our part of a module -> its published name; a part without one is the target's final norm
    block     what its block's keys begin with
    copies    keys of copies: of the token embedding, of the output head
    behind    modules are numbered on from the target's layers, not from 0
    settings  of `deepseek_mtp`'s architecture, where they are not the usual ones
    """

    families: tuple[str, ...]
    keys: str
    parts: Mapping[str, str]
    block: str
    copies: tuple[str, ...] = ()
    behind: bool = False
    settings: Mapping[str, str] = field(default_factory=dict[str, str])


LAYOUTS = {
    "DeepSeek": Layout(
        ("deepseek_v3", "glm4_moe"),
        r"model\.layers\.(\d+)\.",
        {
            "enorm": "model.layers.{n}.enorm",
            "hnorm": "model.layers.{n}.hnorm",
            "eh_proj": "model.layers.{n}.eh_proj",
            "norm": "model.layers.{n}.shared_head.norm",
        },
        "model.layers.{n}.",
        ("model.layers.{n}.embed_tokens.weight", "model.layers.{n}.shared_head.head.weight"),
        behind=True,
    ),
    "Qwen": Layout(
        ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
        r"mtp\.(?:layers\.(\d+)\.)?",
        {
            "enorm": "mtp.pre_fc_norm_embedding",
            "hnorm": "mtp.pre_fc_norm_hidden",
            "eh_proj": "mtp.fc",
            "norm": "mtp.norm",
        },
        "mtp.layers.{k}.",
    ),
    "MiMo": Layout(
        ("mimo", "qwen2"),
        r"model\.mtp_layers\.(\d+)\.",
        {
            "enorm": "model.mtp_layers.{k}.token_layernorm",
            "hnorm": "model.mtp_layers.{k}.hidden_layernorm",
            "eh_proj": "model.mtp_layers.{k}.input_proj",
            "norm": "model.mtp_layers.{k}.final_layernorm",
        },
        "model.mtp_layers.{k}.",
        settings={"first": "state"},
    ),
    "ERNIE": Layout(
        ("ernie4_5", "ernie4_5_moe"),
        r"model\.mtp_(?:block|emb_norm|hidden_norm|linear_proj)\.(\d+)\.",
        {
            "enorm": "model.mtp_emb_norm.{k}",
            "hnorm": "model.mtp_hidden_norm.{k}",
            "eh_proj": "model.mtp_linear_proj.{k}",
        },
        "model.mtp_block.{k}.",
    ),
}
"""All of them feed the module the target's state behind its final norm, and a later module the one before behind its
own norm (`enters` and `onward` "normed"), as transformers, SGLang and FastDeploy do."""

Source = dict[str, str | None]
"""The keys that a tensor of ours is made of, each with the pattern by which it is a piece (None: the whole)."""

COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
"""What configurations call the number of modules."""


@dataclass(frozen=True, slots=True)
class Native:
    """The modules that a target's checkpoint holds.

    files  their keys -> the checkpoint's file that each is in
    count  how many there are
    """

    target: Target
    layout: Layout
    files: Mapping[str, str]
    count: int

    @property
    def settings(self) -> dict[str, Any]:
        """Those of `deepseek_mtp`'s architecture that the checkpoint decides."""
        return {"modules": self.count, "enters": "normed", "onward": "normed", **self.layout.settings}

    @property
    def number(self) -> int:
        """The target's block of their kind: the last that has as many of the first module's tensors as any."""
        blocks, windows = blocks_of(self.target)[1], self.target.windows
        intake = Intake(self.target, len(blocks) - 1)
        places = [place for key in self.files for place in self._places(key) if place[:2] == (0, "block")]
        names = {intake.name(*place)[0].removeprefix("layers.0.block.") for place in places}
        usable = [i for i in reversed(range(len(blocks))) if windows[i] == windows[-1]]
        return min(usable, key=lambda i: len(names ^ blocks[i].state_dict().keys()))

    def blocks(self) -> list[nn.Module]:
        """A block for each module, with the target's weights until they are filled."""
        return [copy.deepcopy(blocks_of(self.target)[1][self.number]) for _ in range(self.count)]

    def fill(self, modules: nn.Module) -> None:
        """Read the checkpoint's tensors into modules called `layers.{k}`, with the layout's parts and a `block` each.

        All of them and no other. A stored copy of the token embedding or the output head has to be the target's.
        """
        own = {name: tensor for name, tensor in modules.state_dict().items() if self._published(name)}
        copies = {s.format(n=self._first + k): i for k in range(self.count) for i, s in enumerate(self.layout.copies)}
        intake = Intake(self.target, self.number)
        sources: dict[str, Source] = {}
        for key in sorted(self.files.keys() - copies.keys(), key=dot_natural_key):
            for name, pattern in [intake.name(*place) for place in self._places(key)] or [(key, None)]:
                sources.setdefault(name, {})[key] = pattern
        surplus = [key for name, source in sources.items() if name not in own for key in source]
        missing: list[str] = []
        for name, tensor in own.items():
            given = sources.get(name, {})
            wanted = intake.wanted(given, self._block(name), tensor) or {self._published(name)}
            missing += sorted(wanted - given.keys(), key=dot_natural_key)
            surplus += sorted(given.keys() - wanted, key=dot_natural_key)
        if missing or surplus:
            raise UserError(
                f"The modules in {self.target.name!r} are not those of its family: missing {missing or 'nothing'}, "
                f"unexpected {surplus or 'nothing'}; fetch the checkpoint again, unquantised."
            )
        stored = read(self.target.name, self.files)
        tensors = {name: intake.tensor(name, source, stored) for name, source in sources.items()}
        for name, tensor in tensors.items():
            self._require_shape(self._published(name), tensor, own[name])
        for key in sorted(copies.keys() & stored.keys()):
            self._require_copy(key, stored[key], copies[key])
        modules.load_state_dict(tensors, strict=False)

    @property
    def _first(self) -> int:
        """{n} of the first module."""
        return self.target.config.num_hidden_layers

    def _block(self, name: str) -> str:
        """What the published keys of the block of `layers.{k}. ..` begin with."""
        k = int(name.split(".")[1])
        return self.layout.block.format(k=k, n=self._first + k)

    def _places(self, key: str) -> list[tuple[int, str, str]]:
        """The (k, part or block, rest of the name) that a published key belongs to."""
        found: list[tuple[int, str, str]] = []
        for k in range(self.count):
            starts = {part: f"{s.format(k=k, n=self._first + k)}." for part, s in self.layout.parts.items()}
            starts["block"] = self.layout.block.format(k=k, n=self._first + k)
            found += [(k, part, key.removeprefix(s)) for part, s in starts.items() if key.startswith(s)][:1]
        return found

    def _published(self, name: str) -> str:
        """The key of one of our names; empty if the layout stores none."""
        _, k, part, rest = name.split(".", 3)
        if part == "block":
            return self._block(name) + rest
        stored = self.layout.parts.get(part)
        return f"{stored.format(k=k, n=self._first + int(k))}.{rest}" if stored else ""

    def _require_shape(self, key: str, tensor: Tensor, own: Tensor) -> None:
        if tensor.shape != own.shape:
            raise UserError(
                f"{key!r} in {self.target.name!r} has shape {list(tensor.shape)} and this target needs "
                f"{list(own.shape)}; fetch the checkpoint again."
            )

    def _require_copy(self, key: str, tensor: Tensor, which: int) -> None:
        """`UserError` unless the tensor is the target's token embedding (0) or output head (1)."""
        model = self.target.model
        own = cast(nn.Linear, model.get_output_embeddings() if which else model.get_input_embeddings()).weight
        self._require_shape(key, tensor, own)
        if not torch.equal(tensor.to(own), own):
            raise UserError(
                f"{key!r} in {self.target.name!r} is not the target's {('token embedding', 'output head')[which]}, and "
                "modules with one of their own cannot be used; fetch the checkpoint again."
            )


class Intake:
    """Published tensors made ours, those of a block as transformers makes those of the target's block `number`."""

    def __init__(self, target: Target, number: int) -> None:
        blocks = blocks_of(target)[1]
        self.target = target
        self.before = f"{next(name for name, part in target.model.named_modules() if part is blocks)}.{number}."
        transforms = get_model_conversion_mapping(target.model)
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = {p: t for t in transforms if isinstance(t, WeightConverter) for p in t.source_patterns}

    def name(self, k: int, part: str, rest: str) -> tuple[str, str | None]:
        """Our name of what a key becomes, and the pattern by which it is only a piece of it (None: the whole)."""
        pattern = None
        if part == "block":
            name, pattern = rename_source_key(self.before + rest, self.renamings, list(self.converters.values()))
            rest = name.removeprefix(self.before)
        return f"layers.{k}.{part}.{rest}", pattern

    def wanted(self, source: Source, block: str, own: Tensor) -> set[str]:
        """The keys of all pieces of ours, if the source is in pieces; else those there are."""
        pattern = next(filter(None, source.values()), None)
        if pattern is None:
            return set(source)
        patterns = self.converters[pattern].source_patterns
        return {block + p.replace("*", str(i)) for p in patterns for i in range(len(own))}

    def tensor(self, name: str, source: Source, stored: Mapping[str, Tensor]) -> Tensor:
        """What our `name` is made of its source."""
        key, pattern = next(iter(source.items()))
        if pattern is None:
            return stored[key]
        converter = copy.deepcopy(self.converters[pattern])
        for key, pattern in source.items():
            assert pattern is not None
            converter.add_tensor(name, key, pattern, stored[key])  # pyright: ignore[reportArgumentType]
        try:
            made: Any = converter.convert(name, model=self.target.model, config=self.target.config)[name]
        except RuntimeError as error:
            raise UserError(
                f"{min(source)!r} and the tensors beside it in {self.target.name!r} are of sizes that do not fit each "
                "other; fetch the checkpoint again."
            ) from error
        return made[0] if isinstance(made, list) else made


def find(target: Target) -> Native:
    """The modules in the checkpoint that the target was loaded from; `UserError` if there are none that we know."""
    kind = target.config.model_type
    layout = next((layout for layout in LAYOUTS.values() if kind in layout.families), None)
    if layout is None:
        known = sorted({family for layout in LAYOUTS.values() for family in layout.families})
        raise UserError(
            f"Modules of a model's own are known for {', '.join(known)} and this target is {kind!r}; train some with "
            "`foretoken train`, and name them as deepseek_mtp:PATH."
        )
    if not target.model.name_or_path:
        raise UserError(
            "The target was not loaded from a checkpoint, so there is none to read its own modules from; load it with "
            "foretoken.load, or name trained modules as deepseek_mtp:PATH."
        )
    files = files_of(target.name)
    every = {name: numbered(other, files, target.config.num_hidden_layers) for name, other in LAYOUTS.items()}
    found = {name: keys for name, keys in every.items() if keys}
    if not found:
        raise UserError(
            f"The checkpoint {target.name!r} holds no modules of its own; take one that does, or train some with "
            "`foretoken train`, and name them as deepseek_mtp:PATH."
        )
    mine = next(name for name, other in LAYOUTS.items() if other is layout)
    if set(found) != {mine}:
        raise UserError(
            f"The checkpoint {target.name!r} holds modules in the layout of {' and '.join(found)}, and a model of type "
            f"{kind!r} has {mine}'s; fetch the checkpoint again."
        )
    counts = [getattr(target.config, name, None) or 0 for name in COUNTS]
    count = max(*counts, *(k + 1 for k in found[mine].values()))
    return Native(target, layout, {key: files[key] for key in found[mine]}, count)


def numbered(layout: Layout, keys: Iterable[str], first: int) -> dict[str, int]:
    """The keys of the layout's modules, each with the number k of its module; `first`: {n} of the first one."""
    matches = [(key, re.match(layout.keys, key)) for key in keys]
    found = {key: int(match[1] or 0) - first * layout.behind for key, match in matches if match is not None}
    return {key: k for key, k in found.items() if k >= 0}


def files_of(name: str) -> dict[str, str]:
    """Key -> file of every tensor in the checkpoint `name`, a folder or a hub name."""
    try:
        index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        single = cached_file(name, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
        if single is not None:
            with safe_open(single, "pt") as file:
                return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
        if index is not None:
            return json.loads(Path(index).read_text())["weight_map"]
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise unreadable(name, error) from error
    raise UserError(
        f"The target comes from {name!r}, which holds no safetensors to read modules of its own from; load it from a "
        "checkpoint that does."
    )


def read(name: str, files: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of the checkpoint `name` whose keys and files are given."""
    tensors: dict[str, Tensor] = {}
    try:
        for file in sorted(set(files.values())):
            path = cached_file(name, file)
            with safe_open(path, "pt") as opened:
                tensors |= {key: opened.get_tensor(key) for key, where in files.items() if where == file}
    except (OSError, SafetensorError) as error:
        raise unreadable(name, error) from error
    return tensors


def unreadable(name: str, error: Exception) -> UserError:
    return UserError(f"The checkpoint {name!r} cannot be read ({error}); fetch it again.")
