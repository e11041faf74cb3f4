"""The network as a graph: captured by torch.fx, its convolutions fused with what follows them.

A chain ``conv -> batch norm -> + residual -> ReLU`` becomes one fused convolution: the norm turns into the scale and
bias of each path, the sum and the ReLU into the kernel's epilogue. A norm with no convolution before it (pre-activation
networks) becomes a per-path scale and bias of its own. What cannot be captured is swapped module by module.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

PATH = "path"  # the graph's second input

_RELU_FUNCTIONS = {F.relu, torch.relu, torch.relu_, F.relu_}
_ADD_FUNCTIONS = {operator.add, torch.add}
_WRITING_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor, operator.imatmul, operator.ilshift, operator.irshift, operator.setitem,
}  # fmt: skip
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity)


def is_conv(module: nn.Module) -> bool:
    """An nn.Conv2d that computes what nn.Conv2d does, or a masked convolution by protocol (``.masks``)."""
    return hasattr(module, "masks") or (isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward)


def is_norm(module: nn.Module) -> bool:
    """A batch norm that keeps running statistics, or several of them by protocol (``.norms``)."""
    if hasattr(module, "norms"):
        return all(norm.running_mean is not None for norm in module.norms.values())
    return type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) and module.running_mean is not None


def norm_affine(module: nn.Module, paths: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A batch norm in eval mode as scale and bias (C,) of each path: y = x * scale + bias."""
    norms: Mapping[str, nn.BatchNorm2d] = getattr(module, "norms", None) or {path: module for path in paths}
    scales, biases = {}, {}
    for path in paths:
        norm = norms[path]
        # In float64: the division is done once, so its rounding need not add to the network's.
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.detach().double()
        bias = -norm.running_mean.double() * scale
        if norm.bias is not None:
            bias = bias + norm.bias.detach().double()
        scales[path], biases[path] = scale.to(norm.running_var.dtype), bias.to(norm.running_var.dtype)
    return scales, biases


class _Capture(nn.Module):
    """Holds the model while it is traced, so that its other arguments keep their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return is_conv(module) or hasattr(module, "norms") or super().is_leaf_module(module, qualified_name)


class _NoteShapes(fx.Interpreter):
    """Runs the graph and notes each tensor's shape in its node's meta."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        # Otherwise an error would carry torch's advice on tracing it.
        self.extra_traceback = False

    def run_node(self, node: fx.Node) -> object:
        result = super().run_node(node)
        if isinstance(result, Tensor):
            node.meta["shape"] = result.shape
        return result


def capture(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """Traces a model of one image batch into a graph whose inputs are ``x`` and the path, with shapes noted.

    Raises:
        Exception: whatever tracing met that a graph cannot express; the message says what.
    """
    root = _Capture(model)
    graph = _Tracer().trace(root)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = node.target.removeprefix("model.")
        if node.op == "call_module" and not node.args and len(node.kwargs) == 1:
            # A layer called by keyword, conv(input=x): from here on inputs are positional.
            node.args, node.kwargs = tuple(node.kwargs.values()), {}
    traced = fx.GraphModule(model, graph)
    with torch.no_grad():
        _NoteShapes(traced).run(example)
    x = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(x):
        graph.placeholder(PATH)
    return traced


@dataclass
class Chain:
    """A convolution and the nodes that fuse with it, all but the last feeding only the next."""

    conv: fx.Node
    norm: fx.Node | None = None
    residual: fx.Node | None = None  # the other operand of the sum
    relu: bool = False
    nodes: tuple[fx.Node, ...] = ()

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]


def find_chain(traced: fx.GraphModule, conv: fx.Node) -> Chain:
    """Follows a convolution's output through norm, sum and ReLU for as long as nothing else reads it."""
    modules = dict(traced.named_modules())
    chain = Chain(conv, nodes=(conv,))

    node = _only_user(chain.last)
    if node and node.op == "call_module" and is_norm(modules[node.target]) and _calm(traced, chain, node):
        chain.norm, chain.nodes = node, (*chain.nodes, node)
    if (node := _only_user(chain.last)) and (other := _added(chain.last, node)) and _calm(traced, chain, node):
        chain.residual, chain.nodes = other, (*chain.nodes, node)
    if (node := _only_user(chain.last)) and is_relu(modules, node) and _calm(traced, chain, node):
        chain.relu, chain.nodes = True, (*chain.nodes, node)
    return chain


def is_relu(modules: Mapping[str, nn.Module], node: fx.Node) -> bool:
    """Whether a node computes max(x, 0), in whichever spelling."""
    if node.op == "call_module":
        return type(modules[node.target]) is nn.ReLU
    return (node.op == "call_function" and node.target in _RELU_FUNCTIONS) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    )


def is_inert(modules: Mapping[str, nn.Module], node: fx.Node) -> bool:
    """Whether a node passes its input on unchanged at inference, as dropout does."""
    if node.op == "call_module":
        return type(modules[node.target]) in _DROPOUTS
    return node.op == "call_function" and node.target is F.dropout and not node.kwargs.get("training", True)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _added(value: fx.Node, node: fx.Node) -> fx.Node | None:
    """The other operand, if ``node`` is a plain sum of ``value`` and a tensor of the same shape."""
    in_place = (node.op == "call_function" and node.target is operator.iadd) or (
        node.op == "call_method" and node.target == "add_"
    )
    plain = (node.op == "call_function" and node.target in _ADD_FUNCTIONS) or (
        node.op == "call_method" and node.target == "add"
    )
    if not (in_place or plain) or node.kwargs or len(node.args) != 2:
        return None
    left, right = node.args
    other = right if left is value else left
    if not isinstance(other, fx.Node) or other is value or _shape(other) != _shape(value):
        return None
    # `other += value` changes other's storage, which its later readers expect to see.
    if in_place and left is not value and len(other.users) > 1:
        return None
    return other


def _shape(node: fx.Node) -> torch.Size | None:
    return node.meta.get("shape")


def _calm(traced: fx.GraphModule, chain: Chain, node: fx.Node) -> bool:
    """Whether the convolution may run as late as ``node``: nothing between them writes into a tensor in place."""
    modules = dict(traced.named_modules())
    between = chain.conv.next
    while between is not node:
        if between not in chain.nodes and _writes(modules, between):
            return False
        between = between.next
    return True


def _writes(modules: Mapping[str, nn.Module], node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[node.target], "inplace", False))
    if node.op == "call_method":
        return node.target.endswith("_") or node.target == "__setitem__"
    if node.op == "call_function":
        return (
            node.target in _WRITING_OPERATORS
            or (node.target.__name__.endswith("_") and not node.target.__name__.endswith("__"))
            or bool(node.kwargs.get("inplace"))
            or "out" in node.kwargs
        )
    return False
