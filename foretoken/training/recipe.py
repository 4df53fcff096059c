"""One YAML file, one training run: nested dataclasses, filled strictly."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_origin, get_type_hints

import yaml

from foretoken.errors import UserError, at_least, unknown

MODES = ("frozen", "joint", "lora", "scratch")
LOSSES = ("cross_entropy", "kl", "tv")
OPTIMIZERS = ("adamw", "muon")
PRECISIONS = ("bf16", "float32", "float64")
SAVED = ("bfloat16", "float16", "float32", "float64")


@dataclasses.dataclass(frozen=True, slots=True)
class Data:
    """
    source    what `foretoken.training.sources` reads: files, JSONL, chat JSONL, hf:NAME, stdlib
    length    tokens per row
    packed    documents end to end, or one per row
    held_out  share kept for evaluation, where the source does not say which part that is
    cache     folder for tokenised text ("": ~/.cache/foretoken)
    """

    source: str = "stdlib"
    length: int = 512
    packed: bool = True
    held_out: float = 0.02
    cache: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Optimizer:
    """
    name          adamw; muon: orthogonalised momentum for matrices, AdamW for the rest
    lr            peak learning rate of the heads, and of a target trained from scratch
    trunk_ratio   the target's learning rate over the heads'
    betas         of AdamW
    weight_decay  decoupled, on matrices
    clip          largest gradient norm (0: any)
    warmup        steps of linear rise
    floor         last learning rate over the peak, at the end of the cosine
    heads_first   steps in which only the heads learn, before the target joins with a rise of its own
    """

    name: str = "adamw"
    lr: float = 1e-3
    trunk_ratio: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup: int = 100
    floor: float = 0.03
    heads_first: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Loss:
    """
    kind            cross_entropy: of the text's tokens; kl, tv: distance to the target's law of the same token
    weights         of the predictions in order, instead of the method's own
    scale           multiplies all of them
    next_token      weight of the target's own next-token loss, where the target is trained
    near            weight, beside 1, of the smooth-L1 distance of each prediction's hidden state to the target's own
                    state of that token (EAGLE's feature loss)
    noise           bound of uniform noise on the features that the drafter reads (EAGLE's is 0.1)
    keep_target     weight of KL(target before training || target), which holds a trained target to what it was
    implementation  of cross-entropy: auto, torch, chunked, liger, cut
    """

    kind: str = "cross_entropy"
    weights: tuple[float, ...] = ()
    scale: float = 1.0
    next_token: float = 1.0
    near: float = 0.0
    noise: float = 0.0
    keep_target: float = 0.0
    implementation: str = "auto"


@dataclasses.dataclass(frozen=True, slots=True)
class Lora:
    """
    rank, alpha, dropout  as peft's
    modules               names of the layers adapted ("all-linear": every linear one)
    """

    rank: int = 32
    alpha: int = 16
    dropout: float = 0.05
    modules: str = "all-linear"


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """
    out             folder to write
    drafter         the method ("none": train the target alone)
    architecture    settings of its weights
    mode            frozen: the target stands still; joint: it learns too; lora: adapters of it do; scratch: all is new
    target          a checkpoint, unless from scratch
    resume_from     a trained drafter to go on from, or native: the modules that the target was published with
    other_target    go on from it even if it was trained on other weights than the target's
    model           from scratch: a transformers configuration, `model_type` and its fields
    move_layers     from scratch: the target gives as many of its layers as the drafter has
    tokenizer       from scratch: a folder, or the size of a vocabulary to be made from the data
    data, optimizer, loss, lora  what to learn from and how, one setting per line below each
    steps           optimiser steps
    rows            rows per forward, of each process
    accumulate      forwards per step
    seed            of data order, initialisation and dropout
    precision       bf16: products in bfloat16, weights in float32; float32, float64: everything
    shard           several processes: each holds a part of every weight (FSDP) instead of all of them
    log_every       steps between measurements of accuracy
    save_every      steps between checkpoints
    evaluate        rows of held-out text for an evaluation (0: none)
    evaluate_every  steps between evaluations (0: one at the end)
    save_dtype      of what is saved ("": bfloat16 from scratch, otherwise as the target came)
    tensorboard     write metrics for TensorBoard too, if it is installed
    """

    out: str = ""
    drafter: str = "mtp"
    architecture: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    mode: str = "frozen"
    target: str = ""
    resume_from: str = ""
    other_target: bool = False
    model: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    move_layers: bool = False
    tokenizer: str = ""
    data: Data = dataclasses.field(default_factory=Data)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    loss: Loss = dataclasses.field(default_factory=Loss)
    lora: Lora = dataclasses.field(default_factory=Lora)
    steps: int = 1000
    rows: int = 8
    accumulate: int = 1
    seed: int = 0
    precision: str = "bf16"
    shard: bool = False
    log_every: int = 20
    save_every: int = 200
    evaluate: int = 32
    evaluate_every: int = 0
    save_dtype: str = ""
    tensorboard: bool = True

    def __post_init__(self) -> None:
        check_names(self)
        check_numbers(self)
        check_parts(self)

    @property
    def kept_dtype(self) -> str:
        """The precision that weights are saved in; "" is the target's own."""
        return self.save_dtype or ("bfloat16" if self.mode == "scratch" else "")


def check_names(r: Recipe) -> None:
    """`UserError` for a choice that is none."""
    choices = (
        ("mode", r.mode, MODES),
        ("loss", r.loss.kind, LOSSES),
        ("optimizer", r.optimizer.name, OPTIMIZERS),
        ("precision", r.precision, PRECISIONS),
        ("save_dtype", r.save_dtype or SAVED[0], SAVED),
    )
    for what, name, known in choices:
        if name not in known:
            raise unknown(what, name, known)


def check_numbers(r: Recipe) -> None:
    """`UserError` for a number out of range."""
    ones = ("steps", "rows", "accumulate", "log_every", "save_every")
    at_least("recipe", **{name: (getattr(r, name), 1) for name in ones})
    at_least("recipe", evaluate=(r.evaluate, 0), evaluate_every=(r.evaluate_every, 0), seed=(r.seed, 0))
    at_least("data", length=(r.data.length, 2))
    at_least("lora", rank=(r.lora.rank, 1), dropout=(r.lora.dropout, 0))
    nought = ("trunk_ratio", "weight_decay", "clip", "warmup", "floor", "heads_first")
    at_least("optimizer", **{name: (getattr(r.optimizer, name), 0) for name in nought})
    at_least(
        "loss", **{name: (getattr(r.loss, name), 0) for name in ("scale", "next_token", "keep_target", "near", "noise")}
    )
    if r.optimizer.lr <= 0:
        raise UserError(f"optimizer.lr is {r.optimizer.lr}, with which nothing is learnt; give a positive one.")
    if r.optimizer.heads_first >= r.steps:
        raise UserError(
            f"optimizer.heads_first is {r.optimizer.heads_first} and the run has {r.steps} steps, so the target would "
            "never learn; make it smaller, or set mode=frozen."
        )


def check_parts(r: Recipe) -> None:
    """`UserError` for settings that contradict each other."""
    if r.drafter == "none" and r.mode == "frozen":
        raise UserError("Nothing learns with drafter=none and mode=frozen; name a drafter, or another mode.")
    if r.drafter == "none" and r.optimizer.heads_first:
        raise UserError("There are no heads to learn first with drafter=none; leave optimizer.heads_first out.")
    if r.mode != "scratch" and not r.target:
        raise UserError(f"The recipe trains in mode {r.mode!r} and names no target; set target=PATH.")
    if r.mode == "scratch" and r.target:
        raise UserError(f"The recipe trains from scratch and names the target {r.target!r}; leave one of them out.")
    if r.mode == "scratch" and not r.tokenizer:
        raise UserError("A model from scratch needs a tokenizer; set tokenizer to a folder, or to a vocabulary size.")
    if r.loss.keep_target > 0 and r.mode not in ("joint", "lora"):
        raise UserError(f"loss.keep_target has no target to keep in mode {r.mode!r}; set it to 0, or mode=joint.")
    if r.drafter == "none" and r.resume_from:
        raise UserError(
            f"There is no drafter to go on from {r.resume_from!r} with drafter=none; leave one of them out."
        )


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `key=value` or `part.key=value` in place of what it says."""
    try:
        given = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"The recipe '{path}' cannot be read ({error.strerror}); give a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is no YAML ({str(error).splitlines()[0]}); see recipes/ for examples.") from error
    if not isinstance(given, dict):
        raise UserError(f"'{path}' holds no settings; see recipes/ for examples.")
    settings = cast(dict[str, Any], given)
    for override in overrides:
        put(settings, override)
    return filled(Recipe, settings)


def put(settings: dict[str, Any], override: str) -> None:
    """Set what `part.key=value` says, in nested dictionaries."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} sets nothing; give KEY=VALUE.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"The value of {override!r} is no YAML; put quotes around text with signs in it.") from error
    *parts, last = key.split(".")
    place = settings
    for part in parts:
        if not isinstance(place.get(part) or {}, dict):
            raise UserError(f"{override!r} sets a part of {part}, which has none; give {part}=VALUE.")
        place[part] = place.get(part) or {}
        place = place[part]
    place[last] = value


T = TypeVar("T")


def filled(kind: type[T], given: Mapping[str, Any], where: str = "") -> T:
    """The dataclass `kind` from nested dictionaries; an unknown key is an error that names the nearest; None: default.

    where  the setting that it is, with a dot behind it
    """
    hints = get_type_hints(kind)
    for key in given:
        if key not in hints:
            raise unknown(f"setting of {where.rstrip('.') or 'a recipe'}", str(key), hints)
    return kind(**{k: fitted(hints[k], value, where + k) for k, value in given.items() if value is not None})


def fitted(kind: Any, value: Any, name: str) -> Any:
    """`value` as a field of type `kind`; `UserError` if it is none."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return filled(kind, table(value, name), name + ".")
    if get_origin(kind) is dict:
        return dict(table(value, name))
    convert, wanted = CONVERT[get_origin(kind) or kind]
    try:
        found = convert(value)
    except (TypeError, ValueError, OverflowError):
        found = None
    if found is None or (kind == tuple[float, float] and len(found) != 2):
        raise UserError(f"{name} is {value!r}; it must be {wanted if kind != tuple[float, float] else 'two numbers'}.")
    return found


def table(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{name} is {value!r}; give settings of it, one per line.")
    return cast(dict[str, Any], value)


def number(value: Any) -> float | None:
    """`value` as a float; YAML takes 1e-3 for text."""
    return None if isinstance(value, bool) else float(value)


def whole(value: Any) -> int | None:
    found = number(value)
    return int(found) if found is not None and found == int(found) else None


def text(value: Any) -> str | None:
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None


def truth(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def numbers(value: Any) -> tuple[float, ...] | None:
    found = [number(v) for v in value] if isinstance(value, list | tuple) else [None]
    return None if None in found else tuple(v for v in found if v is not None)


CONVERT: dict[Any, tuple[Callable[[Any], Any], str]] = {
    int: (whole, "a whole number"),
    float: (number, "a number"),
    bool: (truth, "true or false"),
    str: (text, "text"),
    tuple: (numbers, "a list of numbers"),
}


def plain(value: Any) -> Any:
    """Settings as YAML and JSON hold them: dictionaries, lists, numbers and text alone."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {k: plain(v) for k, v in cast(dict[str, Any], value).items()}
    return [plain(v) for v in cast(Iterable[Any], value)] if isinstance(value, tuple | list) else value


def written(recipe: Recipe) -> str:
    """The recipe as YAML, every setting of it."""
    return yaml.safe_dump(plain(recipe), sort_keys=False, allow_unicode=True)


FREE = (
    *("out", "steps", "rows", "accumulate", "shard", "log_every", "save_every", "evaluate", "evaluate_every"),
    *("save_dtype", "tensorboard", "data.cache", "loss.implementation"),
)
"""Settings that a run may go on with changed."""


def flat(value: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting under its full name."""
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from flat(cast(dict[str, Any], inner), f"{where}{key}.")
        else:
            yield where + key, inner


def difference(one: Recipe, other: Recipe) -> str | None:
    """The first setting in which two recipes are of different runs, with what each says; None if they are of one."""
    ours, theirs = dict(flat(plain(one))), dict(flat(plain(other)))
    for key in (*theirs, *(k for k in ours if k not in theirs)):
        if key not in FREE and ours.get(key) != theirs.get(key):
            return f"{key} = {theirs.get(key)!r}, and this recipe says {ours.get(key)!r}"
    return None
