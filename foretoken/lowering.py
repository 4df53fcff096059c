"""A module traced once for every batch, width and capacity, with its linear layers on packed weights.

torch.export runs the unmodified module on tensors without values and writes down what it did. Linear layers of one
input become one operator over their weights side by side; weights are inputs of the trace, so what is compiled holds
none and serves every checkpoint of the same shape.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from foretoken.kernels import packed_shape

ops: Any = torch.ops
LINEAR = ops.aten.linear.default
TURNED = ops.aten.addmm.default
"""GPT-2's layers: weights [inputs, outputs]."""
NOTES = (ops.aten._assert_tensor_metadata.default,)
"""What tracing leaves behind that computes nothing."""
PRODUCTS = ("addmm", "baddbmm", "bmm", "convolution", "linear", "matmul", "mm")
"""Torch's own products of matrices, those of experts for one: they want all threads."""
PACKED = ("packed", "turned")
"""Kinds of sources that are packed."""
SHARED = (ops.aten.cos.default, ops.aten.sin.default)
"""What all layers use and one computes; fused into each, it would be computed by each."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where an input of the trace comes from.

    kind   "packed": the weights `names` one below the other, packed; "turned": the same of weights [inputs, outputs];
           "weight": the parameter or buffer of that name; "constant": a tensor of the trace's own
    names  of parameters, buffers or constants
    """

    kind: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lowered:
    """A traced module.

    graph      takes the sources' tensors, then the module's own arguments, flat
    sources    of the inputs that are no arguments
    constants  tensors of the trace's own by name
    """

    graph: fx.GraphModule
    sources: list[Source]
    constants: Mapping[str, Tensor]

    @property
    def ours(self) -> bool:
        """Whether all products of matrices are the kernels'."""
        theirs = {getattr(ops.aten, name) for name in PRODUCTS}
        return not any(getattr(node.target, "overloadpacket", None) in theirs for node in self.graph.graph.nodes)


def lower(module: nn.Module, args: tuple[Any, ...], dynamic: tuple[Any, ...]) -> Lowered:
    """`module` traced on `args`; `dynamic` says which of their dimensions may change, as torch.export has it."""
    with torch.no_grad():
        program = torch.export.export(module, args, dynamic_shapes=dynamic, strict=False)
    graph, signature = program.graph_module.graph, program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = dict(signature.inputs_to_lifted_tensor_constants)
    sources = pack_linears(graph, names)
    keep_shared(graph)
    for node in list(graph.nodes):
        if node.target in NOTES or (node.op == "placeholder" and node.name in names and not node.users):
            graph.erase_node(node)
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in names:
            sources.append(Source("weight", (names[node.name],)))
        elif node.op == "placeholder" and node.name in constants:
            sources.append(Source("constant", (constants[node.name],)))
    first(graph, {*names, *constants})
    graph.lint()
    program.graph_module.recompile()
    own: dict[str, Any] = {name: program.constants[name] for name in constants.values()}
    return Lowered(program.graph_module, sources, own)


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer of the trace: `node` is states times a weight (`turned`: [inputs, outputs]) and a bias, if any.

    What it works on is read from the node as it stands: layers may follow each other with nothing between them.
    """

    node: fx.Node
    turned: bool

    @property
    def states(self) -> fx.Node:
        return self.args[1 if self.turned else 0]

    @property
    def weight(self) -> fx.Node:
        return self.args[2 if self.turned else 1]

    @property
    def bias(self) -> fx.Node | None:
        if self.turned:
            return self.args[0]
        return self.args[2] if len(self.args) > 2 else None

    @property
    def outputs(self) -> int:
        return self.weight.meta["val"].shape[1 if self.turned else 0]

    @property
    def args(self) -> Any:
        return self.node.args


def layer_of(node: fx.Node) -> Layer | None:
    """The linear layer that a node is; None if it is something else."""
    if node.target is LINEAR:
        return Layer(node, False)
    return Layer(node, True) if node.target is TURNED and not node.kwargs else None


def pack_linears(graph: fx.Graph, names: Mapping[str, str]) -> list[Source]:
    """Replace the linear layers whose weights are parameters, those of one input together; their sources, in order."""
    groups: dict[tuple[fx.Node, bool, bool], list[Layer]] = {}
    for layer in map(layer_of, graph.nodes):
        if layer is not None and layer.weight.name in names:
            groups.setdefault((layer.states, layer.bias is not None, layer.turned), []).append(layer)
    start, inputs = next(iter(graph.nodes)), dict[Source, fx.Node]()
    for members in groups.values():
        kind = "turned" if members[0].turned else "packed"
        source = Source(kind, tuple(names[layer.weight.name] for layer in members))
        if source not in inputs:
            with graph.inserting_before(start):
                inputs[source] = graph.placeholder(f"packed_{len(inputs)}")
        merge(graph, members, inputs[source])
    return list(inputs)


def merge(graph: fx.Graph, members: Sequence[Layer], packed: fx.Node) -> None:
    """Put one operator on packed weights for the layers of one input, `members`."""
    states, bias, sizes = members[0].states, members[0].bias, [layer.outputs for layer in members]
    with graph.inserting_before(members[0].node):
        if bias is not None and len(members) > 1:
            bias = graph.call_function(ops.aten.cat.default, ([layer.bias for layer in members],))
        whole = graph.call_function(ops.foretoken.linear.default, (states, packed, bias, sum(sizes)))
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        for layer, size, end in zip(members, sizes, ends, strict=True):
            part = whole
            if len(members) > 1:
                part = graph.call_function(ops.aten.slice.Tensor, (whole, -1, end - size, end))
            layer.node.replace_all_uses_with(part)
    for layer in members:
        graph.erase_node(layer.node)


def keep_shared(graph: fx.Graph) -> None:
    """Put what is in `SHARED` into memory."""
    for node in [n for n in graph.nodes if n.target in SHARED]:
        users = list(node.users)
        with graph.inserting_after(node):
            kept = graph.call_function(ops.foretoken.keep.default, (node,))
        for user in users:
            user.replace_input_with(node, kept)


def first(graph: fx.Graph, own: set[str]) -> None:
    """Order the placeholders: packed weights, then what is in `own`, then arguments."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    arguments = [n for n in inputs if n.name not in own and not n.name.startswith("packed_")]
    anchor = next(node for node in graph.nodes if node.op != "placeholder")
    for node in arguments:
        anchor.prepend(node)


def tensors(
    sources: Sequence[Source], module: nn.Module, constants: Mapping[str, Tensor], *, blank: bool = False
) -> list[Tensor]:
    """What the sources stand for in `module`, weights packed.

    blank: tensors like them in memory that nobody wrote, so that compiling needs no second set of weights.
    """
    found: list[Tensor] = []
    places = {} if blank else rooms(sources, module)
    for i, source in enumerate(sources):
        if source.kind == "constant":
            found.append(constants[source.names[0]])
            continue
        parts = parts_of(source, module)
        if source.kind not in PACKED:
            like = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
            found.append(like if blank else parts[0].contiguous())
        elif blank:
            found.append(parts[0].new_empty(packed_shape(parts)))
        else:
            ops.foretoken.pack(places[i], parts)
            found.append(places[i])
    return found


def rooms(sources: Sequence[Source], module: nn.Module) -> dict[int, Tensor]:
    """Memory for packed weights by the number of their source, those of one type one behind the other."""
    parts = {i: parts_of(source, module) for i, source in enumerate(sources) if source.kind in PACKED}
    found: dict[int, Tensor] = {}
    for dtype in {weights[0].dtype for weights in parts.values()}:
        shapes = {i: packed_shape(weights) for i, weights in parts.items() if weights[0].dtype == dtype}
        sizes = [prod(shape) for shape in shapes.values()]
        room = ops.foretoken.room(torch.empty(0, dtype=dtype), sum(sizes))
        for (i, shape), place in zip(shapes.items(), room.split(sizes), strict=True):
            found[i] = place.view(shape)
    return found


def parts_of(source: Source, module: nn.Module) -> list[Tensor]:
    """The weights of a source in `module`, turned if they are to be."""
    parts = [tensor_of(module, name).detach() for name in source.names]
    return [part.t() for part in parts] if source.kind == "turned" else parts


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name."""
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)
