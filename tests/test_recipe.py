"""Recipes are read strictly and written whole."""

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from foretoken.errors import UserError
from foretoken.training import recipe as module
from foretoken.training.loop import claim
from foretoken.training.processes import Processes
from foretoken.training.recipe import Data, Lora, Loss, Optimizer, Recipe, difference, plain, put, read_recipe, written

ROOT = Path(__file__).parent.parent
BASE = "out: x\ntarget: y\n"


def read(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(text)
    return read_recipe(tmp_path / "recipe.yaml", overrides)


def test_what_is_not_said_is_the_default(tmp_path: Path):
    assert read(tmp_path, BASE) == Recipe(out="x", target="y")
    assert read(tmp_path, BASE + "data:\nsteps:\n") == Recipe(out="x", target="y")


def test_values_become_what_the_setting_is(tmp_path: Path):
    text = BASE + (
        "optimizer: {lr: 1e-3, betas: [0.8, 1], warmup: 5}\n"
        "loss: {weights: [1, 0.5], kind: kl}\n"
        "data: {packed: false, length: 64}\n"
        "tokenizer: 4096\nsteps: 1e2\narchitecture: {heads: 3}\n"
    )
    found = read(tmp_path, text)
    assert found.optimizer == Optimizer(lr=0.001, betas=(0.8, 1.0), warmup=5)
    assert found.loss == Loss(weights=(1.0, 0.5), kind="kl")
    assert found.data == Data(packed=False, length=64)
    assert (found.tokenizer, found.steps, found.architecture) == ("4096", 100, {"heads": 3})
    assert isinstance(found.steps, int) and isinstance(found.optimizer.betas[1], float)


def test_overrides_stand_in_place_of_what_the_file_says(tmp_path: Path):
    text = BASE + "steps: 5\noptimizer: {lr: 0.1, warmup: 7}\narchitecture: {heads: 2}\n"
    found = read(
        tmp_path,
        text,
        "steps=9",
        "optimizer.lr=1e-4",
        "architecture.kind=causal",
        "loss.weights=[1,2]",
        "data.packed=false",
    )
    assert (found.steps, found.optimizer.lr, found.optimizer.warmup) == (9, 1e-4, 7)
    assert found.architecture == {"heads": 2, "kind": "causal"}
    assert found.loss.weights == (1.0, 2.0)
    assert found.data.packed is False
    assert read(tmp_path, text, "steps=") == dataclasses.replace(read(tmp_path, text), steps=1000)  # the default again


WRONG: list[tuple[str, str]] = [
    ("step: 5", "'step' is no setting of a recipe; .* did you mean 'steps'"),
    ("optimizer: {rl: 1}", "'rl' is no setting of optimizer; .* did you mean 'lr'"),
    ("7: 8", "'7' is no setting of a recipe"),
    ("steps: many", "steps is 'many'; it must be a whole number"),
    ("steps: 1.5", "steps is 1.5; it must be a whole number"),
    ("steps: true", "steps is True; it must be a whole number"),
    ("steps: .inf", "steps is inf; it must be a whole number"),
    ("steps: [1]", r"steps is \[1\]; it must be a whole number"),
    ("optimizer: {lr: fast}", "optimizer.lr is 'fast'; it must be a number"),
    ("optimizer: {lr: true}", "optimizer.lr is True; it must be a number"),
    ("optimizer: 3", "optimizer is 3; give settings of it, one per line"),
    ("architecture: 3", "architecture is 3; give settings of it, one per line"),
    ("optimizer: {betas: [0.9]}", r"optimizer.betas is \[0.9\]; it must be two numbers"),
    ("loss: {weights: 1}", "loss.weights is 1; it must be a list of numbers"),
    ("loss: {weights: [a]}", r"loss.weights is \['a'\]; it must be a list of numbers"),
    ("data: {packed: 1}", "data.packed is 1; it must be true or false"),
    ("drafter: [mtp]", r"drafter is \['mtp'\]; it must be text"),
    ("drafter: off", "drafter is False; it must be text"),
    ("steps: 0", "recipe: steps is 0; it must be 1 or more"),
    ("rows: 0", "recipe: rows is 0; it must be 1 or more"),
    ("accumulate: 0", "recipe: accumulate is 0; it must be 1 or more"),
    ("save_every: 0", "recipe: save_every is 0; it must be 1 or more"),
    ("evaluate: -1", "recipe: evaluate is -1; it must be 0 or more"),
    ("data: {length: 1}", "data: length is 1; it must be 2 or more"),
    ("optimizer: {lr: 0}", "optimizer.lr is 0.0, with which nothing is learnt"),
    ("optimizer: {clip: -1}", "optimizer: clip is -1.0; it must be 0 or more"),
    ("optimizer: {heads_first: 1000}", "heads_first is 1000 and the run has 1000 steps"),
    ("mode: frosen", "'frosen' is no mode; .* did you mean 'frozen'"),
    ("loss: {kind: k}", "'k' is no loss; there are cross_entropy, kl, tv"),
    ("optimizer: {name: adam}", "'adam' is no optimizer; .* did you mean 'adamw'"),
    ("precision: fp16", "'fp16' is no precision; .*bf16"),
    ("save_dtype: half", "'half' is no save_dtype"),
    ("drafter: none", "Nothing learns with drafter=none and mode=frozen"),
    ("{drafter: none, mode: joint, optimizer: {heads_first: 2}}", "no heads to learn first with drafter=none"),
    ("target: ''", "trains in mode 'frozen' and names no target; set target=PATH"),
    ("mode: scratch", "from scratch and names the target 'y'; leave one of them out"),
    ("{mode: scratch, target: ''}", "A model from scratch needs a tokenizer"),
    ("loss: {keep_target: 1}", "no target to keep in mode 'frozen'"),
    ("{drafter: none, mode: joint, resume_from: z}", "no drafter to go on from 'z' with drafter=none"),
    ("- 1", "holds no settings"),
    ("a: [", "is no YAML"),
]


@pytest.mark.parametrize(("text", "says"), WRONG, ids=[text for text, _ in WRONG])
def test_what_is_wrong_is_told_in_one_sentence(text: str, says: str, tmp_path: Path):
    broken = text in ("- 1", "a: [")
    whole = text if broken else yaml.safe_dump(yaml.safe_load(BASE) | yaml.safe_load(text))
    with pytest.raises(UserError, match=says) as error:
        read(tmp_path, whole)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith((".", "?"))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("steps", "'steps' sets nothing; give KEY=VALUE"),
        ("=3", "'=3' sets nothing"),
        ("steps.more=1", "sets a part of steps, which has none; give steps=VALUE"),
        ("data.lenght=8", "'lenght' is no setting of data; .* did you mean 'length'"),
        ("out=[", "is no YAML; put quotes"),
        ("steps=few", "steps is 'few'; it must be a whole number"),
    ],
)
def test_a_wrong_override_is_told_in_one_sentence(override: str, says: str, tmp_path: Path):
    with pytest.raises(UserError, match=says):
        read(tmp_path, BASE + "steps: 5\n", override)


def test_a_recipe_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"^The recipe '\S+none.yaml' cannot be read \(No such file or directory\); give "
    ):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no YAML"):
        read_recipe(tmp_path / "binary.yaml")


def other(kind: Any, value: Any) -> Any:
    """A value that the default is not."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        return {f.name: other(hints[f.name], getattr(value, f.name)) for f in dataclasses.fields(kind)}
    choices = {"frozen": "lora", "cross_entropy": "tv", "adamw": "muon", "bf16": "float64", "": "float32"}
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return choices.get(value, "été: #1")
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 + 0.001
    return {"heads": 2, "deep": {"a": [1, "b"]}} if isinstance(value, dict) else [0.5, 0.25]


def test_every_setting_survives_writing_and_reading(tmp_path: Path):
    given = other(Recipe, Recipe(target="y")) | {"out": "z"}
    made = module.filled(Recipe, given)
    for field in dataclasses.fields(Recipe):
        if field.name != "target":
            assert getattr(made, field.name) != getattr(Recipe(target="y"), field.name), field.name
    assert read(tmp_path, written(made)) == made
    assert yaml.safe_load(written(made)) == plain(made)


def test_the_recipe_in_out_is_the_resolved_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Relative to the working directory, as given."""
    monkeypatch.chdir(tmp_path)
    made = read(tmp_path, "target: y\n", "out=runs/a", "optimizer.lr=1e-4")
    claim(made, Processes())
    assert read_recipe(Path("runs/a/recipe.yaml")) == made
    assert [p.name for p in Path("runs/a").iterdir()] == ["recipe.yaml"]


def test_what_makes_two_runs_different_is_named():
    one = Recipe(target="y")
    free = dataclasses.replace(one, out="z", steps=5, rows=3, save_every=7, tensorboard=False, data=Data(cache="c"))
    assert difference(one, free) is None
    assert difference(dataclasses.replace(one, seed=2), one) == "seed = 0, and this recipe says 2"
    assert difference(one, dataclasses.replace(one, lora=Lora(rank=3))) == "lora.rank = 3, and this recipe says 32"
    more = dataclasses.replace(one, architecture={"heads": 3})
    assert difference(more, one) == "architecture.heads = None, and this recipe says 3"
    assert difference(one, more) == "architecture.heads = 3, and this recipe says None"


def test_every_setting_has_its_words():
    """Each field is described where it is declared."""
    for kind in (Recipe, Data, Optimizer, Loss, Lora):
        described = (kind.__doc__ or "").replace(",", " ").split()
        assert [f.name for f in dataclasses.fields(kind) if f.name not in described] == []


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_in_the_repository_are_read(path: Path):
    found = read_recipe(path)
    assert found.out.startswith("runs/")


def test_setting_a_part_keeps_the_others():
    settings: dict[str, Any] = {"data": {"length": 3}}
    put(settings, "data.packed=true")
    put(settings, "a.b.c=[1, x]")
    assert settings == {"data": {"length": 3, "packed": True}, "a": {"b": {"c": [1, "x"]}}}
