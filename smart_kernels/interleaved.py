"""Keeps the CPU kernels' layout from layer to layer: L images interleaved, (N/L, C, H, W, L), L floats a vector.

In this layout each vector holds one pixel of L images, so strides, paddings and small maps waste no lanes, and kernels
neither sort pixels on the way in nor on the way out. It serves batches that fill the vectors. The graph is rewritten so
that whole stretches of it run interleaved, with conversions only at their ends.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from smart_kernels import fusion
from smart_kernels.backends import find
from smart_kernels.modules import PathAffine, SparseConv2d, SparseLinear
from smart_kernels.native import cpu_lanes

BACKEND = "cpu"
MAX_WASTE = 1.125  # lanes computed for each image
MAX_TWINS = 0.25  # bytes of weights that only the interleaved graph needs, of those that both use
SUFFIX = "_interleaved"

# What acts on each number by itself is the same in any layout.
_POINTWISE = {
    F.relu, F.relu6, F.silu, F.gelu, F.elu, F.leaky_relu, F.hardswish, F.hardsigmoid, F.hardtanh, F.sigmoid, F.tanh,
    torch.relu, torch.sigmoid, torch.tanh, torch.abs, torch.exp, torch.sqrt, torch.clamp,
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg,
    torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum,
}  # fmt: skip
_POINTWISE_METHODS = {"relu", "sigmoid", "tanh", "abs", "exp", "sqrt", "clamp", "add", "sub", "mul", "div"}
_POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.ELU, nn.LeakyReLU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid,
    nn.Tanh, nn.Identity,
)  # fmt: skip


def fills(images: int) -> bool:
    """Whether a batch of so many images leaves few lanes empty."""
    lanes = cpu_lanes()
    # Symbolic sizes, in graphs for any batch, are no ints: they stay in the layout that serves all.
    return lanes > 1 and type(images) is int and 0 < -(-images // lanes) * lanes <= MAX_WASTE * images


def interleave(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (ceil(N / L), C, H, W, L); the last vectors are filled up with zeros."""
    lanes = cpu_lanes()
    if empty := -len(x) % lanes:
        x = torch.cat([x, x.new_zeros(empty, *x.shape[1:])])
    return x.unflatten(0, (-1, lanes)).movedim(1, -1).contiguous()


def separate(x: Tensor, batch: Tensor) -> Tensor:
    """The inverse of :func:`interleave`, for as many images as ``batch`` has."""
    return x.movedim(-1, 1).flatten(0, 1)[: len(batch)]


def max_pool(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """max_pool2d without padding, of interleaved images."""
    height, width = (size - k + 1 for size, k in zip(x.shape[2:4], kernel, strict=True))
    taps = [
        x[:, :, r : r + height : stride[0], s : s + width : stride[1]]
        for r in range(kernel[0])
        for s in range(kernel[1])
    ]
    return functools.reduce(torch.maximum, taps).contiguous()


def global_average(x: Tensor) -> Tensor:
    """(B, C, H, W, L) -> (B, C, 1, 1, L)."""
    return x.mean((2, 3), keepdim=True)


def rewrite(net: fx.GraphModule) -> fx.GraphModule | None:
    """The graph of a swapped network with stretches interleaved; None where that is not possible or of no use.

    Convolutions that already run on the CPU kernels are shared with ``net``, the few others get a twin that does.
    """
    modules = dict(net.named_modules())
    # Views of a tensor and writes in place would not reach from one layout into the other.
    if not cpu_lanes() or any(fusion.writes(modules, n) and not _is_private(modules, n) for n in net.graph.nodes):
        return None
    rewriter = _Rewriter(net, modules)
    graph = rewriter.run()
    twins = sum(twin.packed.nbytes for twin in rewriter.twins.values())
    if not rewriter.shared or twins > MAX_TWINS * sum(conv.packed.nbytes for conv in rewriter.shared):
        return None
    attributes = {node.target: _attribute(net, node.target) for node in graph.nodes if node.op == "get_attr"}
    return fx.GraphModule({**modules, **rewriter.twins, **attributes}, graph)


def _is_private(modules: Mapping[str, nn.Module], node: fx.Node) -> bool:
    """Whether what a node writes into is new, and read by that node alone: then it might as well not be in place."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or len(source.users) != 1 or source.op != "call_module":
        return False
    return isinstance(modules[source.target], (SparseConv2d, PathAffine, *_POINTWISE_MODULES))


def _attribute(root: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    return getattr(root.get_submodule(owner), attribute)


class _Rewriter:
    """Copies a graph node by node; a value may be there in either layout, or in both."""

    def __init__(self, net: fx.GraphModule, modules: Mapping[str, nn.Module]) -> None:
        self.net = net
        self.modules = modules
        self.graph = fx.Graph()
        self.shared: list[SparseConv2d] = []
        self.twins: dict[str, SparseConv2d] = {}
        self.separate: dict[fx.Node, fx.Node] = {}
        self.interleaved: dict[fx.Node, fx.Node] = {}

    def run(self) -> fx.Graph:
        for node in self.net.graph.nodes:
            copy = self._interleave(node)
            if copy is not None:
                self.interleaved[node] = copy
            else:
                self.separate[node] = self.graph.node_copy(node, self._as_separate)
        return self.graph

    def _as_separate(self, node: fx.Node) -> fx.Node:
        if node not in self.separate:
            batch = next(iter(self.separate.values()))  # the network's input
            self.separate[node] = self.graph.call_function(separate, (self.interleaved[node], batch))
        return self.separate[node]

    def _as_interleaved(self, node: fx.Node) -> fx.Node:
        if node.op == "placeholder" and node.target == fusion.PATH:
            return self.separate[node]
        if node not in self.interleaved:
            self.interleaved[node] = self.graph.call_function(interleave, (self.separate[node],))
        return self.interleaved[node]

    def _interleave(self, node: fx.Node) -> fx.Node | None:
        """The node in the interleaved layout, or None if it has to stay in the other."""
        module = self.modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, SparseConv2d):
            target = self._convolution(node.target, module)
            return target and self.graph.call_module(target, fx.node.map_arg(node.args, self._as_interleaved))
        inputs = [each for each in node.all_input_nodes if each.target != fusion.PATH]
        if not inputs or not all(each in self.interleaved for each in inputs):
            return None
        if node.op == "call_module":
            same = isinstance(module, PathAffine) or type(module) in _POINTWISE_MODULES
        else:
            same = (
                node.op == "call_function" and (node.target in _POINTWISE or self._is_part(node) or _joins(node))
            ) or (node.op == "call_method" and node.target in _POINTWISE_METHODS)
        if same:
            return self.graph.node_copy(node, self._as_interleaved)
        return self._pooling(node, module, self._as_interleaved(inputs[0]))

    def _convolution(self, name: str, conv: SparseConv2d) -> str | None:
        """The name of a layer that runs this convolution interleaved."""
        values = next(conv.packed.buffers())
        supported = find(BACKEND).supports(conv.geometry, values.dtype, values.device)
        if isinstance(conv, SparseLinear) or conv.pad is not None or not supported:
            return None
        if conv.backend == BACKEND:
            self.shared.append(conv)
            return name
        scale, bias = (None if each is None else each.as_dict() for each in (conv.scale, conv.bias))
        packed = find(BACKEND).pack(*conv.packed.unpack())
        twin = SparseConv2d(packed, conv.geometry, BACKEND, scale, bias, conv.relu, None, conv.second, conv.input_shape)
        self.twins[name + SUFFIX] = twin
        return name + SUFFIX

    def _is_part(self, node: fx.Node) -> bool:
        """Whether a node picks one of a convolution's two results."""
        source = node.args[0]
        called = node.target is operator.getitem and isinstance(source, fx.Node) and source.op == "call_module"
        return called and isinstance(self.modules[source.target], SparseConv2d)

    def _pooling(self, node: fx.Node, module: nn.Module | None, x: fx.Node) -> fx.Node | None:
        if node.op == "call_module":
            is_max, size = type(module) is nn.MaxPool2d, getattr(module, "output_size", None)
            is_average, options = type(module) is nn.AdaptiveAvgPool2d, vars(module)
        else:
            is_max, is_average = node.target is F.max_pool2d, node.target is F.adaptive_avg_pool2d
            size = options = None
            if is_max or is_average:
                names = (
                    ("output_size",) if is_average else ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
                )
                options = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
                size = options.get("output_size")
        if is_average and size in (1, (1, 1), [1, 1]):
            return self.graph.call_function(global_average, (x,))
        plain = {"padding": (0, (0, 0)), "dilation": (1, (1, 1)), "ceil_mode": (False,), "return_indices": (False,)}
        if is_max and all(options.get(key, values[0]) in values for key, values in plain.items()):
            kernel = _pair(options["kernel_size"])
            return self.graph.call_function(max_pool, (x, kernel, _pair(options.get("stride") or kernel)))
        return None


def _joins(node: fx.Node) -> bool:
    """Whether a node concatenates channels."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return node.target is torch.cat and dim == 1


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
