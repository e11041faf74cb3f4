"""The network as a graph: captured by torch.fx, its convolutions fused with what follows them.

A chain ``conv -> batch norm -> + residual -> ReLU`` becomes one fused convolution: the norm turns into the scale and
bias of each path, the sum and the ReLU into the kernel's epilogue. A norm that reads the sum beside others
(pre-activation networks) becomes the epilogue's second result, one with no convolution before it a per-path scale and
bias of its own. What cannot be captured is swapped module by module.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from smart_kernels.protocol import is_conv, is_hooked, is_norm, reads_path, stage_of

PATH = "path"  # the graph's second input

_RELU_FUNCTIONS = {F.relu, torch.relu, torch.relu_, F.relu_}
_ADD_FUNCTIONS = {operator.add, torch.add}
_WRITING_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor, operator.imatmul, operator.ilshift, operator.irshift, operator.setitem,
}  # fmt: skip
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity)


class _Capture(nn.Module):
    """Holds the model while it is traced, so that its other arguments keep their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


# torch.fx patches nn.Module itself while it traces: one trace at a time.
_tracing = threading.Lock()


class _Tracer(fx.Tracer):
    """Traces what its own thread runs; other threads' networks, which meet torch's patches too, run as ever."""

    def __init__(self, root: nn.Module | None = None) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        # Found beforehand: while it traces, to look at a module's weight is to put it into the graph.
        # (Without a root torch rebuilds a pickled graph, all of whose modules are leaves.)
        modules = [] if root is None else root.modules()
        self.leaves = {m for m in modules if reads_path(m) or is_conv(m)}

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return module in self.leaves or super().is_leaf_module(module, qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


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


def trace(model: nn.Module) -> fx.GraphModule:
    """The graph of a model of one image batch, called with it alone.

    Tensors that ``forward`` makes anew at each call, as with torch.arange, become attributes of ``model``.

    Raises:
        Exception: whatever tracing met that a graph cannot express; the message says what.
    """
    root = _Capture(model)
    tracer = _Tracer(root)
    for name, module in model.named_modules():
        if is_hooked(module) and not tracer.is_leaf_module(module, name):
            raise ValueError(f"{name or 'the network'} has forward hooks, which would not run in a graph")
    with _tracing:
        graph = tracer.trace(root)
    for node in graph.nodes:
        node.type = None  # an annotation, of no use here; as text it could not be pickled
        if node.op == "get_attr" and not node.target.startswith("model."):
            # A tensor that forward makes of no input: the tracer keeps it on its root.
            setattr(model, node.target, getattr(root, node.target))
        if node.op in ("call_module", "get_attr"):
            node.target = node.target.removeprefix("model.")
        if node.op == "call_module" and not node.args and len(node.kwargs) == 1:
            # A layer called by keyword, conv(input=x): from here on inputs are positional.
            node.args, node.kwargs = tuple(node.kwargs.values()), {}
    return fx.GraphModule(model, graph)


def capture(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """Traces a model of one image batch into a graph whose inputs are ``x`` and the path, with shapes noted.

    Raises:
        Exception: as for :func:`trace`, or what the model raises for the example.
    """
    traced = trace(model)
    with torch.no_grad():
        _NoteShapes(traced).run(example)
    x = next(node for node in traced.graph.nodes if node.op == "placeholder")
    with traced.graph.inserting_after(x):
        traced.graph.placeholder(PATH)
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
    if node and node.op == "call_module" and is_norm(modules[node.target]) and _calm(modules, chain.nodes, node):
        # A fused layer is in one stage, and so runs on one path.
        if stage_of(modules[node.target]) != stage_of(modules[conv.target]):
            return chain
        chain.norm, chain.nodes = node, (*chain.nodes, node)
    if (node := _only_user(chain.last)) and (other := _added(chain.last, node)) and _calm(modules, chain.nodes, node):
        chain.residual, chain.nodes = other, (*chain.nodes, node)
    return _with_relu(modules, chain)


def find_linear_chain(traced: fx.GraphModule, linear: fx.Node) -> Chain:
    """A fully connected layer, and the ReLU that alone reads it."""
    return _with_relu(dict(traced.named_modules()), Chain(linear, nodes=(linear,)))


def _with_relu(modules: Mapping[str, nn.Module], chain: Chain) -> Chain:
    if (node := _only_user(chain.last)) and is_relu(modules, node) and _calm(modules, chain.nodes, node):
        chain.relu, chain.nodes = True, (*chain.nodes, node)
    return chain


def find_second(modules: Mapping[str, nn.Module], conv: fx.Node) -> fx.Node | None:
    """A norm among the readers of a fused convolution that its epilogue may compute beside its own result."""
    for node in conv.users:
        norm = node.op == "call_module" and node.target in modules and is_norm(modules[node.target])
        if norm and node.args[0] is conv and _calm(modules, (conv,), node):
            return node
    return None


def is_relu(modules: Mapping[str, nn.Module], node: fx.Node) -> bool:
    """Whether a node computes max(x, 0), in whichever spelling."""
    if node.op == "call_module":
        return type(modules[node.target]) is nn.ReLU and not is_hooked(modules[node.target])
    return (node.op == "call_function" and node.target in _RELU_FUNCTIONS) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    )


def is_inert(modules: Mapping[str, nn.Module], node: fx.Node) -> bool:
    """Whether a node passes its input on unchanged at inference, as dropout does."""
    if node.op == "call_module":
        return type(modules[node.target]) in _DROPOUTS and not is_hooked(modules[node.target])
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
    if not isinstance(other, fx.Node) or other is value or shape_of(other) != shape_of(value):
        return None
    # `other += value` changes other's storage, which its later readers expect to see.
    if in_place and left is not value and len(other.users) > 1:
        return None
    return other


def shape_of(node: fx.Node) -> torch.Size | None:
    """Of the tensor a node computes on the example."""
    return node.meta.get("shape")


def _calm(modules: Mapping[str, nn.Module], chain: Sequence[fx.Node], node: fx.Node) -> bool:
    """Whether what the chain computes may be computed as late, or as early, as ``node``.

    So it is if nothing between its beginning and ``node`` writes into a tensor in place.
    """
    between = chain[0].next
    while between is not node:
        if between not in chain and writes(modules, between):
            return False
        between = between.next
    return True


def writes(modules: Mapping[str, nn.Module], node: fx.Node) -> bool:
    """Whether a node changes a tensor in place."""
    if node.op == "call_module":
        return bool(getattr(modules.get(node.target), "inplace", False))
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
