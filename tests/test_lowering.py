"""A trace whose linear layers are on packed weights computes what the module computes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from foretoken import compiled
from foretoken.kernels import load_kernels
from foretoken.lowering import SHARED, Lowered, lower, tensors
from tests.families import make

WIDTH = 24


class Chain(nn.Module):
    """A layer on the outputs of another with nothing between them, as EAGLE's fc before the queries."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Fan(Chain):
    """Layers of one input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1).relu()


def linear(bias: bool = False) -> nn.Module:
    return nn.Linear(WIDTH, WIDTH, bias=bias)


def turned() -> nn.Module:
    """GPT-2's."""
    return Conv1D(WIDTH, WIDTH)


MODULES = {
    "one": lambda: Chain(linear()),
    "following": lambda: Chain(linear(), linear(bias=True), linear(bias=True)),
    "following, turned": lambda: Chain(turned(), turned()),
    "following, mixed": lambda: Chain(linear(bias=True), turned(), linear()),
    "a fan": lambda: Fan(linear(), linear(), linear()),
    "a fan with biases": lambda: Fan(linear(bias=True), linear(bias=True)),
    "a fan, turned": lambda: Fan(turned(), turned()),
    "a fan of both": lambda: Fan(linear(), linear(bias=True), turned(), linear()),
    "a fan behind one": lambda: Chain(linear(), Fan(linear(), linear(), turned()), nn.Linear(3 * WIDTH, WIDTH)),
    "a chain behind one of a fan": lambda: Fan(Chain(linear(), linear()), linear()),
}


def lowered(module: nn.Module, x: Tensor) -> Lowered:
    return lower(module, (x,), ({0: torch.export.Dim.DYNAMIC},))


@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_packed_layers_compute_what_the_module_does(name: str):
    load_kernels()
    torch.manual_seed(0)
    module = MODULES[name]().double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    found = lowered(module, torch.randn(3, WIDTH, dtype=torch.float64))
    targets = [node.target for node in found.graph.graph.nodes]
    assert found.ours
    assert torch.ops.foretoken.linear.default in targets
    for rows in (3, 7):
        x = torch.randn(rows, WIDTH, dtype=torch.float64)
        got: Any = found.graph(*tensors(found.sources, module, found.constants), x)
        torch.testing.assert_close(got[0] if isinstance(got, tuple) else got, module(x))


def test_layers_of_one_input_are_multiplied_once():
    load_kernels()
    for name, products in (("following", 3), ("a fan", 1), ("a fan of both", 3), ("a chain behind one of a fan", 2)):
        graph = lowered(MODULES[name](), torch.randn(3, WIDTH)).graph.graph
        assert sum(node.target is torch.ops.foretoken.linear.default for node in graph.nodes) == products, name


def test_what_all_layers_use_is_computed_once():
    """Cosines and sines are kept in memory: fused into what uses them, each layer would compute its own."""
    recipe = compiled.recipe_for(make("llama"), ())
    graph = lower(recipe.module, recipe.args, recipe.dynamic).graph.graph
    shared = [node for node in graph.nodes if node.target in SHARED]
    assert len(shared) == 2
    for node in shared:
        (keep,) = node.users
        assert keep.target is torch.ops.foretoken.keep.default and keep.users


@pytest.mark.parametrize(("name", "ours"), [("llama", True), ("gpt2", True), ("mixtral", False)])
def test_products_of_torchs_own_are_seen(name: str, ours: bool):
    """Experts are multiplied by torch, which would have one thread beside a crew; GPT-2's layers are packed."""
    recipe = compiled.recipe_for(make(name), ())
    assert lower(recipe.module, recipe.args, recipe.dynamic).ours is ours
