"""Imports go one way, and the documents' code works."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import foretoken
from foretoken import drafters
from foretoken.drafters import METHODS, make_drafter
from tests.models import BITSTORIES, asset

PACKAGE = Path(foretoken.__file__).parent
ROOT = PACKAGE.parent
CORE = [
    "errors",
    "tuned",
    "tree",
    "noise",
    "sampling",
    "rules",
    "cache",
    "step",
    "unembed",
    "target",
    "attention",
    "advance",
    "kernels",
    "operators",
    "kernels_triton",
    "arena",
    "lowering",
    "program",
    "planned",
    "compiled",
    "graphs",
    "quantize",
    "loading",
    "background",
    "text",
    "drafter",
    "costs",
    "marginal",
    "grow",
    "paths",
    "plan",
    "survival",
    "times",
    "limits",
    "adaptive",
    "saved",
    "objective",
    "branch",
    "block",
    "heads",
    "feedback",
    "native",
    "published",
    "proposal",
    "decode",
]
"""Each may import from those before it, and from nothing else of the package."""


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, without the package's name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "foretoken":
            found.add(node.module.removeprefix("foretoken").lstrip(".") or "foretoken")
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("foretoken.") for a in node.names if a.name.startswith("foretoken")}
    return found


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_one_way(name: str):
    assert imports(PACKAGE / f"{name}.py") <= set(CORE[: CORE.index(name)])


@pytest.mark.parametrize("path", sorted((PACKAGE / "drafters").glob("*.py")), ids=lambda p: p.stem)
def test_drafters_import_the_core_and_not_each_other(path: Path):
    allowed = (set(CORE) - {"decode", "rules"}) | {"automaton", "drafters"}
    assert imports(path) <= allowed


@pytest.mark.parametrize("path", sorted((PACKAGE / "training").glob("*.py")), ids=lambda p: p.stem)
def test_training_knows_no_method(path: Path):
    """It reaches drafters by name alone, and no line names one."""
    assert not {m for m in imports(path) if m.startswith("drafters.")}
    code = ast.unparse(ast.parse(path.read_text()))
    named = [name for name in METHODS if name != "none" and re.search(rf"[=!]= '{name}'|in \(.*'{name}'", code)]
    assert not named


def test_no_import_is_a_cycle():
    """Imports inside functions included."""
    files = {p.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): p for p in PACKAGE.rglob("*.py")}
    names = {k.removesuffix(".__init__"): v for k, v in files.items()}
    graph = {name: {m for m in imports(path) if m in names} for name, path in names.items() if name != "__init__"}
    assert set(TopologicalSorter(graph).static_order()) >= set(graph)  # raises CycleError


def test_every_method_has_its_page():
    pages = {p.stem for p in (ROOT / "docs" / "drafters").glob("*.md")}
    assert pages == set(METHODS) - {"none"}


def test_the_example_drafter_works(monkeypatch: pytest.MonkeyPatch):
    """The module in docs/adding_a_drafter.md, found as an entry point, drafts and changes nothing."""
    text = (ROOT / "docs" / "adding_a_drafter.md").read_text()
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    module = ModuleType("bigram_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(found[1], "adding_a_drafter.md", "exec"), module.__dict__)
    entry = type("Entry", (), {"name": "bigram", "load": staticmethod(lambda: module)})()
    monkeypatch.setattr(drafters, "entry_points", lambda group: [entry])
    target = asset(BITSTORIES)
    drafter = make_drafter("bigram", target, {"length": "3"})
    prompts = ["Once upon a time", "Tom and his dog"]
    outputs = foretoken.generate(target, prompts, drafter=drafter, max_new_tokens=60, batch_size=1)
    plain = foretoken.generate(target, prompts, drafter="none", max_new_tokens=60)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
    assert all(sum(o.drafted) > 0 for o in outputs)
