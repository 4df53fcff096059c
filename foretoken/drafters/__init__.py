"""One file per method. A method's module has `Config`, a dataclass of its settings, and `build(target, config)`.

A package outside this one adds a method by an entry point of the group `foretoken.drafters` that names such a module.
"""

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, cast, get_type_hints

from foretoken.adaptive import adaptive
from foretoken.compiled import CompiledTarget
from foretoken.drafter import Drafter
from foretoken.errors import UserError, unknown
from foretoken.proposal import CompiledDrafter
from foretoken.target import Target
from foretoken.tuned import opened

METHODS = {
    "none": "foretoken.drafters.none",
    "prompt_lookup": "foretoken.drafters.prompt_lookup",
    "suffix": "foretoken.drafters.suffix",
    "draft_model": "foretoken.drafters.draft_model",
    "jacobi": "foretoken.drafters.jacobi",
    "lookahead": "foretoken.drafters.lookahead",
    "early_exit": "foretoken.drafters.early_exit",
    "marginal": "foretoken.drafters.marginal",
    "mtp": "foretoken.drafters.mtp",
    "blockwise": "foretoken.drafters.blockwise",
    "medusa": "foretoken.drafters.medusa",
    "weighted_heads": "foretoken.drafters.weighted_heads",
    "deepseek_mtp": "foretoken.drafters.deepseek_mtp",
    "eagle": "foretoken.drafters.eagle",
    "hybrid": "foretoken.drafters.hybrid",
}

COMPILED = ("draft_model", "mtp", "blockwise", "medusa", "weighted_heads", "deepseek_mtp", "eagle")
"""Methods whose proposals are compiled with their target."""


def names() -> list[str]:
    """Every drafter that can be asked for by name."""
    return [*METHODS, *(e.name for e in entry_points(group="foretoken.drafters"))]


def module_of(name: str) -> ModuleType:
    outside = {e.name: e for e in entry_points(group="foretoken.drafters")}
    if name in METHODS:
        return import_module(METHODS[name])
    if name in outside:
        return outside[name].load()
    raise unknown("drafter", name, names())


def make_drafter(drafter: "str | Drafter", target: Target, settings: dict[str, Any] | None = None) -> Drafter:
    """The drafter called NAME, NAME:PATH or @FILE with these settings; a drafter itself is returned as it is.

    One setting is every drafter's, a built one's too: `adaptive`, whether drafts are only as deep as has paid.
    """
    if isinstance(drafter, str):
        module, config, follows = settled(drafter, settings or {})
        made: Drafter = module.build(target, config)
        if isinstance(target, CompiledTarget) and module.__name__.rpartition(".")[2] in COMPILED:
            made = CompiledDrafter(cast(Any, made), target)
    else:
        given = dict(settings or {})
        made, follows = drafter, asked_to_follow(given)
        if given:
            raise UserError(f"A built drafter came with settings {sorted(given)}; set them where it is built.")
    return adaptive(made) if follows else made


def settled(drafter: str, settings: Mapping[str, Any]) -> tuple[ModuleType, Any, bool]:
    """The method's module, its configuration, and whether it is adaptive; what needs no model is refused here."""
    drafter, given = opened(drafter, dict(settings))
    follows = asked_to_follow(given)
    name, _, path = drafter.partition(":")
    module = module_of(name)
    return module, configured(module.Config, name, given | ({"path": path} if path else {})), follows


def asked_to_follow(given: dict[str, Any]) -> bool:
    """Takes `adaptive` out of the settings."""
    return converted("every drafter", "adaptive", given.pop("adaptive", False), bool)


def configured(config: type, name: str, given: dict[str, Any]) -> Any:
    """An instance of the `config` dataclass from settings that may be text (`--set key=value`)."""
    hints = get_type_hints(config)
    fields = [f.name for f in dataclasses.fields(config)]
    for key in given:
        if key not in fields:
            raise unknown(f"setting of {name!r}", key, fields)
    values = {key: converted(name, key, value, hints[key]) for key, value in given.items()}
    return config(**values)


def converted(name: str, key: str, value: Any, kind: Any) -> Any:
    """`value` as `kind` (bool, int, float or str) if it is text; itself otherwise."""
    if not isinstance(value, str) or kind not in (bool, int, float):
        return value
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[value.lower()]
        return kind(value)
    except (KeyError, ValueError) as error:
        need = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise UserError(f"{name}: {key} is {value!r}; it must be {need}.") from error
