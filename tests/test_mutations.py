"""The tests notice bugs: each patch in mutations/ breaks the library in one place, and the tests it names must fail.

A patch begins with what it breaks and `Caught by:` the tests, which pass without it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from foretoken.kernels import folder, load_kernels

ROOT = Path(__file__).parents[1]
PATCHES = sorted((ROOT / "tests" / "mutations").glob("*.patch"))


def names(patch: Path) -> list[str]:
    """The tests that the patch's header names."""
    line = next(line for line in patch.read_text().splitlines() if line.startswith("Caught by: "))
    return line.removeprefix("Caught by: ").split()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and its tests, to be broken."""
    ignore = shutil.ignore_patterns("__pycache__", "assets", "mutations")
    shutil.copytree(ROOT / "foretoken", tmp_path / "foretoken", ignore=ignore)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "foretoken" / "assets").symlink_to(ROOT / "foretoken" / "assets")
    load_kernels()
    shutil.copytree(folder() / "kernels", tmp_path / "cache" / "kernels", ignore=shutil.ignore_patterns("*.lock"))
    return tmp_path


def apply(patch: Path, where: Path) -> str:
    """Apply with one line of context, so that edits nearby do no harm; returns what git complains of."""
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(where.parent)}
    command = ["git", "apply", "-C1", str(patch)]
    return subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True).stderr


def run(tests: list[str], where: Path) -> subprocess.CompletedProcess[str]:
    """Run tests in a copy, which imports the package beside them and not the installed one."""
    environment = os.environ | {"PYTHONPATH": str(where), "OMP_NUM_THREADS": "1", "CI": "1"}
    environment["FORETOKEN_CACHE"] = str(where / "cache")  # broken kernels are nobody else's
    found = subprocess.run(
        [sys.executable, "-c", "import foretoken; print(foretoken.__file__)"],
        cwd=where,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()).is_relative_to(where.resolve())
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    return subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_every_patch_still_applies_and_names_tests_that_exist(patch, copy):
    files = [p for kind in ("*.py", "*.cpp", "*.h") for p in (copy / "foretoken").rglob(kind)]
    before = {p: p.read_text() for p in files}
    assert apply(patch, copy) == ""
    assert sum(p.read_text() != text for p, text in before.items()) == 1
    for test in names(patch):
        file, _, function = test.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(), f"{test} is gone; name another test in {patch.name}"


@pytest.mark.slow
@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_every_mutation_is_caught(patch, copy):
    assert apply(patch, copy) == ""
    for test in names(patch):
        result = run([test], copy)
        assert result.returncode == 1, f"{test} does not notice:\n{result.stdout[-2000:]}"


@pytest.mark.slow
def test_without_a_mutation_the_same_tests_pass(copy):
    result = run(sorted({test for patch in PATCHES for test in names(patch)}), copy)
    assert result.returncode == 0, result.stdout[-4000:]
