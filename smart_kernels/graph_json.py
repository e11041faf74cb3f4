"""A swapped network's graph as JSON: only operations named here can be written or read, so a file cannot name code."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import fx, nn

from smart_kernels import fusion

_FUNCTION_HOMES = {
    "operator": (operator, "add sub mul truediv neg getitem pow"),
    "torch": (
        torch,
        "add sub mul div cat stack flatten relu sigmoid tanh mean sum softmax clamp squeeze unsqueeze reshape permute "
        "chunk split exp sqrt rsqrt abs maximum minimum",
    ),
    "functional": (
        F,
        "relu relu6 leaky_relu gelu silu elu hardswish hardsigmoid sigmoid tanh softmax log_softmax pad interpolate "
        "adaptive_avg_pool2d avg_pool2d max_pool2d adaptive_max_pool2d linear normalize pixel_shuffle",
    ),
}
FUNCTIONS: dict[str, Callable[..., object]] = {
    f"{home}.{name}": getattr(module, name)
    for home, (module, names) in _FUNCTION_HOMES.items()
    for name in names.split()
}
_NAMES = {function: name for name, function in reversed(FUNCTIONS.items())}
_METHODS = (
    "add sub mul div flatten view reshape mean sum relu sigmoid tanh size dim permute transpose contiguous squeeze "
    "unsqueeze chunk split softmax clamp expand to float"
)
METHODS = frozenset(_METHODS.split())
# Layers that a file may hold beside convolutions, and the constructor arguments they are rebuilt from.
LAYERS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    cls.__name__: (cls, tuple(arguments.split()))
    for cls, arguments in [
        (nn.Linear, "in_features out_features"),
        (nn.ReLU, ""),
        (nn.ReLU6, ""),
        (nn.LeakyReLU, "negative_slope"),
        (nn.GELU, "approximate"),
        (nn.SiLU, ""),
        (nn.Hardswish, ""),
        (nn.Hardsigmoid, ""),
        (nn.Sigmoid, ""),
        (nn.Tanh, ""),
        (nn.Softmax, "dim"),
        (nn.Flatten, "start_dim end_dim"),
        (nn.MaxPool2d, "kernel_size stride padding dilation ceil_mode"),
        (nn.AvgPool2d, "kernel_size stride padding ceil_mode count_include_pad"),
        (nn.AdaptiveAvgPool2d, "output_size"),
        (nn.AdaptiveMaxPool2d, "output_size"),
        (nn.Upsample, "size scale_factor mode align_corners"),
        (nn.PixelShuffle, "upscale_factor"),
    ]
}
_DTYPES = {str(d): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)}


def encode(graph: fx.Graph) -> list[dict[str, object]]:
    """The graph's nodes, in order, as plain data.

    Raises:
        ValueError: the graph uses a function or method that files may not name.
    """
    nodes = []
    for node in graph.nodes:
        target = node.target
        if node.op == "call_function":
            if target not in _NAMES:
                name = getattr(target, "__qualname__", str(target))
                raise ValueError(
                    f"the network calls {name}, which a saved network cannot name: see graph_json.FUNCTIONS"
                )
            target = _NAMES[target]
        if node.op == "call_method" and target not in METHODS:
            raise ValueError(f"the network calls Tensor.{target}, which a saved network cannot name")
        entry = {"name": node.name, "op": node.op, "target": target}
        nodes.append(entry | {"args": _encode(list(node.args)), "kwargs": _encode(dict(node.kwargs))})
    return nodes


def decode(nodes: list[dict[str, object]], modules: Mapping[str, nn.Module], tensors: Mapping[str, object]) -> fx.Graph:
    """Rebuilds a graph; every name is checked against what there is.

    Raises:
        ValueError: the data describes no graph of known operations on known modules.
    """
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    try:
        for entry in nodes:
            op, target = entry["op"], entry["target"]
            allowed = {
                "placeholder": lambda t: t in ("x", fusion.PATH),
                "output": lambda t: True,
                "call_module": lambda t: t in modules,
                "get_attr": lambda t: t in tensors,
                "call_method": lambda t: t in METHODS,
                "call_function": lambda t: t in FUNCTIONS,
            }
            if not allowed[op](target):
                raise ValueError(f"{op} of {target!r} is not allowed")
            target = FUNCTIONS[target] if op == "call_function" else target
            args, kwargs = tuple(_decode(entry["args"], known)), _decode(entry["kwargs"], known)
            known[entry["name"]] = graph.create_node(op, target, args, kwargs, name=entry["name"])
        graph.lint()
    except (KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return graph


def _encode(value: object) -> object:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {str(key): _encode(item) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_encode(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"the network passes a {type(value).__name__} to an operation, which a saved network cannot hold")


def _decode(value: object, known: Mapping[str, fx.Node]) -> object:
    if isinstance(value, list):
        return [_decode(item, known) for item in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "node":
            return known[content]
        if kind == "dict":
            return {key: _decode(item, known) for key, item in content.items()}
        if kind == "slice":
            return slice(*_decode(content, known))
        return {"dtype": _DTYPES}[kind][content]
    return value
