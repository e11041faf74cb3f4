"""Which nodes of a graph compute elementwise functions and products that programs of the CPU kernels have."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from smart_kernels.programs import HARDSIGMOID, HARDSWISH, RELU6, SIGMOID, SILU

_MODULES = {
    nn.ReLU6: RELU6,
    nn.SiLU: SILU,
    nn.Sigmoid: SIGMOID,
    nn.Hardswish: HARDSWISH,
    nn.Hardsigmoid: HARDSIGMOID,
}
_FUNCTIONS = {
    F.relu6: RELU6,
    F.silu: SILU,
    F.sigmoid: SIGMOID,
    torch.sigmoid: SIGMOID,
    F.hardswish: HARDSWISH,
    F.hardsigmoid: HARDSIGMOID,
}
_PRODUCTS = (operator.mul, torch.mul)


def activation(modules: Mapping[str, nn.Module], node: fx.Node) -> int | None:
    """The number of the function a node computes of each element; None if it is none that programs have."""
    if node.op == "call_module":
        return _MODULES.get(type(modules[node.target]))
    if len(node.all_input_nodes) != 1 or len(node.args) > 2 or node.kwargs.keys() - {"inplace"}:
        return None
    if node.op == "call_method" and len(node.args) == 1:
        return SIGMOID if node.target == "sigmoid" else None
    return _FUNCTIONS.get(node.target) if node.op == "call_function" else None


def factors(shapes: Mapping[fx.Node, Any], node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The operands of a product: the larger, and another of its shape or of one pixel a channel; None for any other."""
    if node.op != "call_function" or node.target not in _PRODUCTS or node.kwargs or len(node.args) != 2:
        return None
    if not all(isinstance(each, fx.Node) and len(shapes.get(each) or ()) == 4 for each in node.args):
        return None
    x, other = sorted(node.args, key=lambda each: shapes[each].numel(), reverse=True)
    is_gate = shapes[other][:2] == shapes[x][:2] and tuple(shapes[other][2:]) == (1, 1)
    return (x, other) if is_gate or shapes[other] == shapes[x] else None
