"""Finds the stretches of a swapped network that can run as programs of the CPU kernels, and puts programs there.

A graph is rewritten for one input shape: its longest stretches of convolutions and of what programs can run beside them
become :class:`smart_kernels.programs.Program` modules, and the rest stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from smart_kernels import elementwise, fusion
from smart_kernels.backends import find
from smart_kernels.backends.cpu import DTYPES
from smart_kernels.geometry import Geometry
from smart_kernels.modules import PathAffine, SparseConv2d, SparseLinear
from smart_kernels.native import cpu_isas
from smart_kernels.packing import PackedWeight
from smart_kernels.programs import (
    ACTIVATION,
    ADD,
    AFFINE,
    AVERAGE,
    CONVOLUTION,
    MAX_POOL,
    NO_GEOMETRY,
    NONE,
    PRODUCT,
    Program,
    Step,
)
from smart_kernels.protocol import is_hooked

BACKEND = "cpu"
MIN_CONVOLUTIONS = 2  # a program of one layer would save nothing

_ADDITIONS = (operator.add, torch.add)


@dataclass(frozen=True)
class Rewritten:
    """A network's graph with programs in it.

    Attributes:
        graph: shares with the network the layers that run on the CPU kernels already.
        moves: layers in its programs that run elsewhere by themselves, and their weights packed for the CPU kernels:
            after ``conv.use(packed, BACKEND)`` no weight is held twice.
    """

    graph: fx.GraphModule
    moves: Mapping[SparseConv2d, PackedWeight]


def rewrite(net: fx.GraphModule, example: Tensor, move: bool = False) -> Rewritten | None:
    """The graph of a swapped network with programs in it, for inputs of one shape; None where there are none.

    Args:
        example: (N, C, H, W), run once through ``net`` to learn the shapes inside.
        move: whether layers of other backends become parts of programs too, for the caller to move.
    """
    modules = dict(net.named_modules())
    if not cpu_isas() or not len(example) or example.device.type != "cpu" or example.dtype not in DTYPES:
        return None
    # Views of a tensor and writes in place would not reach from a program's values to others.
    if any(fusion.writes(modules, node) and not _is_private(modules, node) for node in net.graph.nodes):
        return None
    noted = _NoteTensors(net, example.dtype)
    with torch.no_grad():
        noted.run(example, _any_path(net))
    return _Rewriter(net, modules, noted.shapes, move).run()


def _any_path(net: fx.GraphModule) -> str:
    """A path of the network, whichever."""
    names = (conv.packed.paths[0] for conv in net.modules() if isinstance(conv, SparseConv2d))
    return next(names, "clean")


def _is_private(modules: Mapping[str, nn.Module], node: fx.Node) -> bool:
    """Whether what a node writes into is new, and read by that node alone: then it might as well not be in place."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or len(source.users) != 1 or source.op != "call_module":
        return False
    return isinstance(modules[source.target], (SparseConv2d, PathAffine))


class _NoteTensors(fx.Interpreter):
    """Runs a graph and notes the shapes of its tensors of one dtype."""

    def __init__(self, net: fx.GraphModule, dtype: torch.dtype) -> None:
        super().__init__(net)
        self.dtype = dtype
        self.extra_traceback = False
        self.shapes: dict[fx.Node, Any] = {}

    def run_node(self, node: fx.Node) -> object:
        result = super().run_node(node)
        if isinstance(result, Tensor) and result.dtype == self.dtype:
            self.shapes[node] = result.shape
        return result


class _Rewriter:
    """Copies a graph, collecting what programs can run until something comes that they cannot."""

    def __init__(
        self, net: fx.GraphModule, modules: Mapping[str, nn.Module], shapes: Mapping[fx.Node, Any], move: bool
    ) -> None:
        self.net = net
        self.move = move
        self.modules = modules
        self.shapes = shapes
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.pending: list[fx.Node] = []
        self.programs: dict[str, Program] = {}
        self.twins: dict[SparseConv2d, SparseConv2d] = {}  # of layers that run on other backends
        self.packed_anew: dict[PackedWeight, PackedWeight] = {}  # their weights, which layers may share
        self.path = next(node for node in net.graph.nodes if node.op == "placeholder" and node.target == fusion.PATH)

    def run(self) -> Rewritten | None:
        for node in self.net.graph.nodes:
            if self._fits(node):
                self.pending.append(node)
            else:
                self._flush()
                self._copy(node)
        if not self.programs:
            return None
        attributes = {n.target: _attribute(self.net, n.target) for n in self.graph.nodes if n.op == "get_attr"}
        graph = fx.GraphModule({**self.modules, **self.programs, **attributes}, self.graph)
        return Rewritten(graph, {conv: twin.packed for conv, twin in self.twins.items()})

    def _copy(self, node: fx.Node) -> None:
        self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)

    def _flush(self) -> None:
        """Makes a program of what is pending, or copies it if it is too little."""
        pending, self.pending = self.pending, []
        if sum(isinstance(self._module(node), SparseConv2d) for node in pending) < MIN_CONVOLUTIONS:
            for node in pending:
                self._copy(node)
            return
        stretch = _Stretch(self, pending)
        name = f"program_{len(self.programs)}"
        self.programs[name] = Program(
            [self.shapes[node] for node in stretch.inputs], stretch.steps, [stretch.values[n] for n in stretch.outputs]
        )
        inputs = [self.copies[node] for node in stretch.inputs]
        results = self.graph.call_module(name, (self.copies[self.path], *inputs))
        for i, node in enumerate(stretch.outputs):
            self.copies[node] = self.graph.call_function(operator.getitem, (results, i))

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(node.target) if node.op == "call_module" else None

    def is_part(self, node: fx.Node) -> bool:
        """Whether a node picks one of a convolution's two results."""
        source = node.args[0] if node.args else None
        picks = node.op == "call_function" and node.target is operator.getitem
        return picks and isinstance(source, fx.Node) and isinstance(self._module(source), SparseConv2d)

    def _fits(self, node: fx.Node) -> bool:
        """Whether a program can run a node."""
        if self.is_part(node):
            return node.args[0] in self.pending
        module = self._module(node)
        if isinstance(module, SparseConv2d):
            shape = self.shapes.get(node.args[0])
            return shape is not None and len(shape) == 4 and min(shape) > 0 and self._runs(module)
        if module is not None and is_hooked(module):
            return False
        tensors = [self.shapes.get(each) for each in node.all_input_nodes if each is not self.path]
        shape = self.shapes.get(node)
        if shape is None or len(shape) != 4 or not tensors or any(t is None or len(t) != 4 for t in tensors):
            return False
        if isinstance(module, PathAffine) or fusion.is_relu(self.modules, node):
            return True
        if node.op == "call_function" and node.target in _ADDITIONS:
            return len(tensors) == 2 and len(node.args) == 2 and not node.kwargs and tensors[0] == tensors[1]
        if elementwise.activation(self.modules, node) is not None or elementwise.factors(self.shapes, node):
            return True
        return self.pooling(node) is not None

    def _runs(self, conv: SparseConv2d) -> bool:
        values = next(conv.packed.buffers())
        return (
            (self.move or conv.backend == BACKEND)
            and not isinstance(conv, SparseLinear)
            and conv.pad is None
            and bool(find(BACKEND).supports(conv.geometry, values.dtype, values.device))
        )

    def layer(self, conv: SparseConv2d) -> SparseConv2d:
        """A layer on the CPU kernels that computes the same."""
        if conv.backend == BACKEND:
            return conv
        if conv not in self.twins:
            packed = self.packed_anew.get(conv.packed) or find(BACKEND).pack(*conv.packed.unpack())
            self.packed_anew[conv.packed] = packed
            scale, bias = (None if each is None else each.as_dict() for each in (conv.scale, conv.bias))
            twin = SparseConv2d(packed, conv.geometry, BACKEND, scale, bias, conv.relu, None, conv.second)
            twin.stage = conv.stage
            self.twins[conv] = twin
        return self.twins[conv]

    def pooling(self, node: fx.Node) -> tuple[int, Sequence[int]] | None:
        """The kind and the geometry's numbers of a pooling that programs have; None if it is something else."""
        module = self._module(node)
        if module is not None:
            is_max, is_average = type(module) is nn.MaxPool2d, type(module) is nn.AdaptiveAvgPool2d
            options = vars(module)
        elif node.op == "call_function":
            is_max, is_average = node.target is F.max_pool2d, node.target is F.adaptive_avg_pool2d
            names = ("output_size",) if is_average else ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
            options = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
        else:
            return None
        if is_average and options.get("output_size") in (1, (1, 1), [1, 1]):
            return AVERAGE, NO_GEOMETRY
        plain = {"padding": (0, (0, 0)), "dilation": (1, (1, 1)), "ceil_mode": (False,), "return_indices": (False,)}
        if not is_max or any(options.get(key, values[0]) not in values for key, values in plain.items()):
            return None
        kernel = _pair(options["kernel_size"])
        return MAX_POOL, Geometry((1, 1, *kernel), _pair(options.get("stride") or kernel)).numbers


class _Stretch:
    """Consecutive nodes as the steps of one program."""

    def __init__(self, rewriter: _Rewriter, nodes: Sequence[fx.Node]) -> None:
        inside = set(nodes)
        read = [each for node in nodes for each in node.all_input_nodes if each is not rewriter.path]
        self.inputs = list(dict.fromkeys(each for each in read if each not in inside))
        # A convolution with two results is known by its parts.
        self.outputs = [
            node for node in nodes if any(user not in inside for user in node.users) and node in rewriter.shapes
        ]
        self.values = {node: number for number, node in enumerate(self.inputs)}
        self.count = len(self.inputs)
        self.steps: list[Step] = []
        for node in nodes:
            if rewriter.is_part(node):
                self.values[node] = self.values[node.args[0]] + node.args[1]
            else:
                self.steps.append(self._step(rewriter, node))

    def _make(self, node: fx.Node, results: int) -> int:
        self.values[node] = self.count
        self.count += results
        return self.values[node]

    def _step(self, rewriter: _Rewriter, node: fx.Node) -> Step:
        module = rewriter.modules.get(node.target) if node.op == "call_module" else None
        x = self.values[node.args[0]]
        if isinstance(module, SparseConv2d):
            layer = rewriter.layer(module)
            residual = node.args[2] if len(node.args) > 2 else None
            other = NONE if residual is None else self.values[residual]
            y = self._make(node, 1 if layer.second is None else 2)
            return Step(CONVOLUTION, x, other, y, NONE if layer.second is None else y + 1, layer)
        if isinstance(module, PathAffine):
            return Step(AFFINE, x, NONE, self._make(node, 1), module=module)
        if pooling := rewriter.pooling(node):
            return Step(pooling[0], x, NONE, self._make(node, 1), geometry=pooling[1])
        if fusion.is_relu(rewriter.modules, node):
            return Step(ADD, x, NONE, self._make(node, 1), relu=True)
        if (function := elementwise.activation(rewriter.modules, node)) is not None:
            return Step(ACTIVATION, x, NONE, self._make(node, 1), function=function)
        if factors := elementwise.factors(rewriter.shapes, node):
            return Step(PRODUCT, *(self.values[each] for each in factors), self._make(node, 1))
        return Step(ADD, x, self.values[node.args[1]], self._make(node, 1))


def _attribute(root: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    return getattr(root.get_submodule(owner), attribute)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
