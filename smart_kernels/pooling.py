"""Nodes of a graph that pool or flatten images, each channel by itself, such that a constant channel stays one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

_PIXELS = ({2, 3}, {2, -1}, {-2, 3}, {-2, -1})  # the dimensions of images (N, C, H, W), as a mean may name them


def flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether images of one pixel become rows of channels."""
    if type(module) is nn.Flatten:
        return (module.start_dim, module.end_dim) in ((1, -1), (1, 3))
    is_call = (node.op == "call_function" and node.target is torch.flatten) or (
        node.op == "call_method" and node.target == "flatten"
    )
    dims = (_argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1))
    return is_call and dims in ((1, -1), (1, 3))


def averages_all(node: fx.Node, module: nn.Module | None) -> bool | None:
    """Whether an average over all pixels keeps their dimensions; None if a node computes something else."""
    if type(module) is nn.AdaptiveAvgPool2d:
        return True if module.output_size in (1, (1, 1)) else None
    if node.op == "call_function" and node.target is F.adaptive_avg_pool2d:
        return True if _argument(node, 1, "output_size", None) in (1, (1, 1), [1, 1]) else None
    if (node.op == "call_function" and node.target is torch.mean) or (
        node.op == "call_method" and node.target == "mean"
    ):
        dims = _argument(node, 1, "dim", None)
        if isinstance(dims, (tuple, list)) and len(dims) == 2 and set(dims) in _PIXELS and "dtype" not in node.kwargs:
            return bool(_argument(node, 2, "keepdim", False))
    return None


def pools(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node pools pixels such that a constant stays one: no zeros of a padding are averaged in."""
    if type(module) is nn.MaxPool2d:
        return not module.return_indices
    if type(module) is nn.AvgPool2d:
        return module.padding in (0, (0, 0)) and module.divisor_override is None
    if node.op != "call_function":
        return False
    if node.target is F.max_pool2d:
        return not _argument(node, 6, "return_indices", False)
    if node.target is F.avg_pool2d:
        no_padding = _argument(node, 3, "padding", 0) in (0, (0, 0), [0, 0])
        return no_padding and _argument(node, 6, "divisor_override", None) is None
    return False


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)
