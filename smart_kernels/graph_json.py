"""A swapped network's graph as JSON data, and back.

torch.fx runs a graph by writing Python source from it, in which names of layers and keyword arguments appear as they
are. So every name is checked: a file cannot put code there, nor names that reach into the interpreter.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Collection, Mapping

import torch
from torch import fx, nn

from smart_kernels import fusion
from smart_kernels.checks import record, shown, typed
from smart_kernels.operations import FUNCTIONS, METHODS, name_of

MAX_DEPTH = 12  # of lists in lists among arguments: Python's own compiler crashes on far deeper ones
_DTYPES = {
    str(dtype): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32)
}
_MEMORY_FORMATS = {str(each): each for each in (torch.contiguous_format, torch.channels_last, torch.preserve_format)}
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
# What a module of a graph has already: layers of these names would overwrite it.
_RESERVED = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))


def check_name(name: object) -> None:
    """Raises ValueError unless a layer or tensor of a graph may have this dotted name."""
    parts = name.split(".") if isinstance(name, str) else [""]
    for part in parts:
        if not re.fullmatch(r"[\w-]+", part) or keyword.iskeyword(part) or part in _RESERVED or part.startswith("__"):
            raise ValueError(
                f"{shown(name)} is no name that a saved network's layer can have: letters, digits, - and _ are "
                "accepted between dots, but no words that Python or torch use themselves"
            )


def check_names(names: Collection[object]) -> None:
    """Raises ValueError unless layers and tensors of these names can stand side by side, none inside another."""
    for name in names:
        check_name(name)
    for name in names:
        parts = name.split(".")
        for i in range(1, len(parts)):
            if (outer := ".".join(parts[:i])) in names:
                raise ValueError(
                    f"the network uses both {outer} and {name} inside it, which a saved network cannot: "
                    "call the layer, or use its tensors, not both"
                )


def encode(graph: fx.Graph) -> list[dict[str, object]]:
    """The graph's nodes, in order, as plain data.

    Raises:
        ValueError: the graph uses a function, method or argument that files cannot hold.
    """
    nodes = []
    for node in graph.nodes:
        target, args = (name_of(node)) if node.op == "call_function" else (node.target, node.args)
        if node.op == "call_method" and target not in METHODS:
            raise ValueError(f"the network calls Tensor.{target}, which a saved network cannot name")
        entry = {"name": node.name, "op": node.op, "target": target}
        nodes.append(entry | {"args": [_encode(each) for each in args], "kwargs": _encode(dict(node.kwargs))["dict"]})
    return nodes


def decode(nodes: object, modules: Collection[str], attributes: Collection[str]) -> fx.Graph:
    """Rebuilds a graph.

    Args:
        nodes: what :func:`encode` returned.
        modules, attributes: names of the layers and tensors there are; each must be used.

    Raises:
        ValueError: the data describes no graph of known operations on them, from an image batch and a path.
    """
    check_names({*modules, *attributes})
    accepted = {
        "placeholder": ("x", fusion.PATH),
        "output": ("output",),
        "call_module": modules,
        "get_attr": attributes,
        "call_method": METHODS,
        "call_function": FUNCTIONS,
    }
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    for entry in typed(nodes, list, "the graph"):
        name, op, target, args, kwargs = record(entry, ("name", "op", "target", "args", "kwargs"), "a node")
        if typed(op, str, "op") not in accepted or typed(target, str, "target") not in accepted[op]:
            raise ValueError(f"{shown(op)} of {shown(target)} is not allowed")
        if typed(name, str, "a node's name") in known:
            raise ValueError(f"two nodes have the name {shown(name)}")
        if op == "call_function" and target.startswith("operator.") and kwargs:
            raise ValueError(f"{target} takes no keyword arguments")
        args = tuple(_decode(each, known) for each in typed(args, list, "args"))
        kwargs = _decode({"dict": kwargs}, known)
        if not all(key.isidentifier() and not keyword.iskeyword(key) for key in kwargs):
            raise ValueError(f"{shown(list(kwargs))} are no names of keyword arguments")
        function = FUNCTIONS[target] if op == "call_function" else target
        known[name] = graph.create_node(op, function, args, kwargs, name=name)
    _check(graph, {*modules, *attributes})
    return graph


def _check(graph: fx.Graph, names: set[str]) -> None:
    """Raises ValueError unless the graph leads from the two inputs to one output through all layers and tensors."""
    nodes = list(graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    outputs = [node for node in nodes if node.op == "output"]
    if [node.target for node in inputs] != ["x", fusion.PATH] or inputs != nodes[:2] or outputs != nodes[-1:]:
        raise ValueError(f"a graph has the inputs x and {fusion.PATH} at its beginning and one output at its end")
    if any(node.args or node.kwargs for node in inputs) or len(outputs[0].args) != 1 or outputs[0].kwargs:
        raise ValueError("inputs take no arguments, and the output one")
    if any(node.op == "get_attr" and (node.args or node.kwargs) for node in nodes):
        raise ValueError("a tensor takes no arguments")
    if unused := names - {node.target for node in nodes if node.op in ("call_module", "get_attr")}:
        raise ValueError(f"the graph does not use {shown(min(unused))}")
    graph.lint()


def _encode(value: object) -> object:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode(item) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_encode(part) for part in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": None}
    if isinstance(value, torch.dtype) and str(value) in _DTYPES:
        return {"dtype": str(value)}
    if isinstance(value, torch.memory_format) and str(value) in _MEMORY_FORMATS:
        return {"memory_format": str(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ValueError(
        f"the network passes {shown(value)}, a {type(value).__name__}, to an operation: saved networks cannot hold it"
    )


def _decode(value: object, known: Mapping[str, fx.Node], depth: int = 0) -> object:
    if depth > MAX_DEPTH:
        raise ValueError(f"arguments are nested more than {MAX_DEPTH} deep")
    if isinstance(value, list):
        return [_decode(item, known, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError(f"{shown(value)} is no argument: one key is needed")
    ((kind, content),) = value.items()
    if kind == "tuple":
        return tuple(_decode(typed(content, list, kind), known, depth + 1))
    if kind == "dict":
        return {key: _decode(item, known, depth + 1) for key, item in typed(content, dict, kind).items()}
    if kind == "slice":
        start, stop, step = _decode(typed(content, list, kind), known, depth + 1)
        return slice(start, stop, step)
    if kind == "ellipsis":
        return ...
    named = {"node": known, "dtype": _DTYPES, "memory_format": _MEMORY_FORMATS, "float": _FLOATS}
    if kind not in named or not isinstance(content, str) or content not in named[kind]:
        raise ValueError(f"{shown(value)} is no argument of a graph")
    return named[kind][content]
