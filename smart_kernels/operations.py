"""The operations a saved network may hold, by name: a file can name nothing else, so it cannot name code.

All of them compute on tensors or their sizes and check their arguments; none reads files, builds objects from text, or
views memory beyond its tensors.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx

MAX_EXPONENT = 64  # of an integer power: sizes need no larger one, and some would take forever


def shape_of(x: Tensor) -> torch.Size:
    """``x.shape``."""
    return x.shape


def dtype_of(x: Tensor) -> torch.dtype:
    """``x.dtype``."""
    return x.dtype


def device_of(x: Tensor) -> torch.device:
    """``x.device``."""
    return x.device


def ndim_of(x: Tensor) -> int:
    """``x.ndim``."""
    return x.ndim


def power(base: Tensor | float, exponent: Tensor | float) -> Tensor | float:
    """``base ** exponent``.

    Raises:
        ValueError: it is an integer of no bounds.
    """
    if isinstance(base, int) and isinstance(exponent, int) and abs(exponent) > MAX_EXPONENT:
        raise ValueError(f"the integer power {base} ** {exponent} is refused: at most ** {MAX_EXPONENT} is accepted")
    return base**exponent


# Reading attributes by any name would reach into the interpreter; these are what networks read of tensors.
_ATTRIBUTES = {"shape": shape_of, "dtype": dtype_of, "device": device_of, "ndim": ndim_of}

_HOMES = {
    "operator": (
        operator,
        "add sub mul truediv floordiv mod neg pos abs getitem matmul eq ne lt le gt ge and_ or_ invert not_ "
        "iadd isub imul itruediv",
    ),
    "math": (math, "ceil floor sqrt log log2 exp"),
    "torch": (
        torch,
        "add sub mul div true_divide floor_divide addcmul lerp neg abs square pow sqrt rsqrt reciprocal exp log log1p "
        "sin cos erf maximum minimum clamp where relu relu_ sigmoid tanh softmax log_softmax mean sum amax amin max "
        "min argmax argmin var std cat concat stack flatten unflatten squeeze unsqueeze reshape permute transpose "
        "movedim swapaxes chunk split unbind narrow flip roll matmul bmm einsum zeros_like ones_like _assert",
    ),
    "functional": (
        F,
        "relu relu_ relu6 leaky_relu gelu silu elu selu celu mish hardswish hardsigmoid hardtanh sigmoid tanh softplus "
        "softsign logsigmoid prelu glu softmax log_softmax pad interpolate upsample adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d avg_pool2d max_pool2d lp_pool2d linear conv1d conv2d "
        "conv_transpose2d normalize layer_norm group_norm instance_norm batch_norm local_response_norm dropout "
        "dropout2d pixel_shuffle pixel_unshuffle channel_shuffle unfold fold scaled_dot_product_attention",
    ),
}
FUNCTIONS: dict[str, Callable[..., object]] = {
    **{f"{home}.{name}": getattr(module, name) for home, (module, names) in _HOMES.items() for name in names.split()},
    **{function.__name__: function for function in _ATTRIBUTES.values()},
    "operator.pow": power,
}
_NAMES = {function: name for name, function in reversed(FUNCTIONS.items())} | {operator.pow: "operator.pow"}

_METHODS = (
    "add sub mul div pow neg abs square sqrt rsqrt exp log clamp maximum minimum add_ sub_ mul_ div_ clamp_ relu relu_ "
    "sigmoid sigmoid_ tanh softmax log_softmax mean sum amax amin max min argmax var std size dim numel flatten "
    "unflatten view view_as reshape reshape_as permute transpose movedim swapaxes contiguous squeeze unsqueeze expand "
    "expand_as repeat chunk split unbind select narrow flip roll matmul bmm to type_as float half bfloat16 double "
    "detach clone"
)
METHODS = frozenset(_METHODS.split())


def name_of(node: fx.Node) -> tuple[str, tuple[object, ...]]:
    """The name under which a file holds the function a node calls, and the arguments it has there.

    Raises:
        ValueError: files cannot hold the function.
    """
    if node.target is getattr and len(node.args) == 2 and node.args[1] in _ATTRIBUTES:
        return _ATTRIBUTES[node.args[1]].__name__, node.args[:1]
    if node.target is getattr:
        raise ValueError(
            f"the network reads the attribute {node.args[1]!r}, which a saved network cannot: "
            f"accepted are {', '.join(_ATTRIBUTES)}"
        )
    if node.target not in _NAMES:
        name = getattr(node.target, "__qualname__", str(node.target))
        raise ValueError(
            f"the network calls {name}, which a saved network cannot name: use a function of those in "
            "smart_kernels/operations.py, or a layer of torch.nn that has it"
        )
    return _NAMES[node.target], node.args
