"""Threads that stay together for a run of a compiled program: the same bits by however many, and their errors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from foretoken.kernels import load_kernels
from foretoken.program import Program, Recipe, program

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]
"""torch's own, while inductor is imported and works."""

SIZE, SLOTS = 480, 12


class Layers(nn.Module):
    """Linear layers of fifteen blocks, the last one's outputs kept in slots."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(SIZE, SIZE) for _ in range(4)])

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, slot: Tensor) -> tuple[Tensor]:
        for layer in self.layers:
            x = functional.silu(layer(x))
        new = x[None, None]
        torch.ops.foretoken.write(keys, values, new, new, slot)
        return (x * 2,)


def given(rows: int, first: int = 0) -> tuple[Tensor, ...]:
    """Rows, empty slots, and where the rows go."""
    x = torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(rows))
    keys, values = torch.zeros(2, 1, 1, SLOTS, SIZE).unbind()
    return x, keys.clone(), values.clone(), torch.arange(first, first + rows)[None]


@pytest.fixture(autouse=True, scope="module")
def built() -> None:
    load_kernels()


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    rows = Dim("rows")
    return Recipe(("crew",), Layers().eval(), given(3), ({0: rows}, {}, {}, {1: rows}))


@pytest.fixture(scope="module")
def together(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Program:
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode(False):
        patch.setenv("FORETOKEN_CACHE", str(tmp_path_factory.mktemp("programs")))
        return program(recipe)


@pytest.fixture(params=[1, 2, 3, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@torch.no_grad()
def test_any_number_of_threads_makes_the_same(threads: int, recipe: Recipe, together: Program):
    """More than there are processors, too: whoever is done takes from the others."""
    alone: Any = program(recipe, inductor=False)
    for rows in (1, 2, 7, 12) * 8:
        mine, want = given(rows), given(rows)
        assert torch.equal(together(*mine)[0], alone(*want)[0])
        assert all(torch.equal(a, b) for a, b in zip(mine, want, strict=True))


@torch.no_grad()
def test_an_error_is_raised_and_the_next_run_is_right(threads: int, together: Program):
    want = together(*given(4))[0]
    for _ in range(3):
        with pytest.raises(RuntimeError):
            together(*given(4, SLOTS - 2))
        assert torch.equal(together(*given(4))[0], want)


def test_whether_threads_stay_together_is_kept_on_the_disk(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Found while compiling; a second start reads it."""
    monkeypatch.setenv("FORETOKEN_CACHE", str(tmp_path))
    made: list[bool] = []

    def loaded(self: Program, path: Path, inputs: list[Tensor], facts: dict[str, Any], *, together: bool) -> None:
        made.append(together)

    monkeypatch.setattr(Program, "__init__", loaded)
    for _ in range(2):
        program(recipe)
    assert made == [True, True]
