"""The layers of torch.nn that a saved network may hold beside those of this package, and what they are rebuilt from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from smart_kernels.checks import fits, record, shown, typed

_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.Mish, nn.SELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softsign,
    nn.LogSigmoid, nn.Identity,
)  # fmt: skip
_NORM = "num_features eps momentum affine track_running_stats"
LAYERS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    cls.__name__: (cls, tuple(arguments.split()))
    for cls, arguments in [
        *((cls, "") for cls in _ACTIVATIONS),
        (nn.LeakyReLU, "negative_slope"),
        (nn.ELU, "alpha"),
        (nn.CELU, "alpha"),
        (nn.GELU, "approximate"),
        (nn.Softplus, "beta threshold"),
        (nn.Hardtanh, "min_val max_val"),
        (nn.GLU, "dim"),
        (nn.PReLU, "num_parameters"),
        (nn.Softmax, "dim"),
        (nn.LogSoftmax, "dim"),
        (nn.Flatten, "start_dim end_dim"),
        (nn.Unflatten, "dim unflattened_size"),
        (nn.Dropout, "p"),
        (nn.Dropout2d, "p"),
        (nn.MaxPool2d, "kernel_size stride padding dilation ceil_mode"),
        (nn.AvgPool2d, "kernel_size stride padding ceil_mode count_include_pad"),
        (nn.AdaptiveAvgPool2d, "output_size"),
        (nn.AdaptiveMaxPool2d, "output_size"),
        (nn.Upsample, "size scale_factor mode align_corners"),
        (nn.UpsamplingNearest2d, "size scale_factor"),
        (nn.UpsamplingBilinear2d, "size scale_factor"),
        (nn.PixelShuffle, "upscale_factor"),
        (nn.PixelUnshuffle, "downscale_factor"),
        (nn.ZeroPad2d, "padding"),
        (nn.ReflectionPad2d, "padding"),
        (nn.ReplicationPad2d, "padding"),
        (nn.Linear, "in_features out_features bias"),
        (
            nn.ConvTranspose2d,
            "in_channels out_channels kernel_size stride padding output_padding groups bias dilation",
        ),
        (nn.BatchNorm1d, _NORM),
        (nn.BatchNorm2d, _NORM),
        (nn.InstanceNorm2d, _NORM),
        (nn.GroupNorm, "num_groups num_channels eps affine"),
        (nn.LayerNorm, "normalized_shape eps elementwise_affine"),
        (nn.LocalResponseNorm, "size alpha beta k"),
    ]
}
_ARGUMENT = int | float | bool | str | None | list[int] | list[float] | list[None] | list[int | None]


def write_layer(name: str, layer: nn.Module, tensors: dict[str, Tensor]) -> dict[str, object]:
    """Puts a layer's tensors under its name and returns the rest of it as plain data.

    Raises:
        ValueError: files cannot hold a layer of this kind.
    """
    kind = type(layer).__name__
    cls, arguments = LAYERS.get(kind, (None, ()))
    if cls is not type(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        hooks = " with hooks" if cls is type(layer) else ""
        raise ValueError(
            f"the network holds a {kind}{hooks} ({name}), which a saved network cannot: it is none of the "
            f"{len(LAYERS)} kinds of layers that may be in a file; keep its state_dict, or export it as a program"
        )
    for key, value in layer.state_dict().items():
        tensors[f"{name}.{key}"] = value
    return {"type": kind, "arguments": {key: _plain(layer, key) for key in arguments}}


def read_layer(name: str, entry: Mapping[str, object], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The inverse of :func:`write_layer`.

    Raises:
        ValueError: the data describes no such layer; the message says what is wrong.
    """
    kind, given = record(entry, ("type", "arguments"), name)
    if typed(kind, str, "type") not in LAYERS:
        raise ValueError(f"{name} is a {shown(kind)}: that is none of the {len(LAYERS)} kinds of layers accepted")
    cls, names = LAYERS[kind]
    values = record(given, names, f"arguments of {name}")
    if not all(fits(value, _ARGUMENT) for value in values):
        raise ValueError(
            f"arguments of {name} are {shown(given)}: numbers, texts, or short lists of numbers are needed"
        )
    arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in zip(names, values, strict=True)}
    # Without memory of its own, so that a lying size cannot ask for any; copies, as those of a file lie unaligned.
    with torch.device("meta"):
        layer = cls(**arguments)
    layer.load_state_dict({key: tensors[f"{name}.{key}"].clone() for key in layer.state_dict()}, assign=True)
    return layer.eval().requires_grad_(False)


def _plain(layer: nn.Module, key: str) -> object:
    value = getattr(layer, key)
    if key == "bias":
        return value is not None
    return list(value) if isinstance(value, (tuple, torch.Size)) else value
