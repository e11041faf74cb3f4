"""The operation itself: ``sparse_conv2d`` for callers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from smart_kernels import fakes, native
from smart_kernels.backends import BACKENDS, Backend
from smart_kernels.geometry import Geometry
from smart_kernels.packing import PackedWeight
from smart_kernels.paths import Samples, group_samples, merge_samples, resolve

PerPath = Tensor | Mapping[str, Tensor]

if native.missing() is None:
    fakes.register("cpu", torch.contiguous_format)


def sparse_conv2d(
    x: Tensor,
    packed: PackedWeight,
    bias: PerPath | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    path: str | float | Tensor = "clean",
    scale: PerPath | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """relu(conv2d(x, W * M_path) * scale + bias + residual), skipping the weights the path's mask drops.

    For inference: no gradient flows through it.

    Args:
        x: (N, C, H, W), float.
        packed: what :func:`smart_kernels.pack` made of a weight (K, C/groups, R, S).
        bias, scale: (K,), or one (K,) for each path.
        stride, padding, dilation, groups: as torch.nn.functional.conv2d.
        path: a name, a lambda in [0, 1], or an integer tensor (N,) that picks a path for each sample.
        residual: (N, K, P, Q), added before the ReLU.

    Returns:
        (N, K, P, Q), in x's dtype.

    Raises:
        ValueError, TypeError: a shape, dtype, device, path or geometry that does not fit; the message says which.
    """
    if not isinstance(packed, PackedWeight):
        raise TypeError(f"packed is a {type(packed).__name__}: smart_kernels.pack(weight, masks) makes what is needed")
    geometry = Geometry.of(packed.shape, stride, padding, dilation, groups)
    check_operands(x, packed, geometry, residual)
    backend = backend_for(packed, x, geometry)
    if isinstance(path, Tensor) and backend.runs_samples(packed):
        numbers = [
            _of_both_paths(value, packed.paths, name, x, geometry) for value, name in ((scale, "scale"), (bias, "bias"))
        ]
        return backend.bind_samples(packed, geometry, *numbers, relu)(x, residual, Samples.of(path, x))
    if isinstance(path, Tensor):
        groups_of_rows = group_samples(path, x, packed.paths)
        outputs = [
            _run(x[rows], packed, geometry, name, scale, bias, None if residual is None else residual[rows], relu)
            for name, rows in groups_of_rows
        ]
        return merge_samples(outputs, groups_of_rows)
    return _run(x, packed, geometry, resolve(path, packed.paths), scale, bias, residual, relu)


def _run(
    x: Tensor,
    packed: PackedWeight,
    geometry: Geometry,
    path: str | float,
    scale: PerPath | None,
    bias: PerPath | None,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    scale = per_path(scale, path, packed.paths, "scale", x, geometry)
    bias = per_path(bias, path, packed.paths, "bias", x, geometry)
    return backend_for(packed, x, geometry).run(x, packed, geometry, path, scale, bias, residual, relu)


def _of_both_paths(
    value: PerPath | None, paths: Sequence[str], name: str, x: Tensor, geometry: Geometry
) -> Tensor | None:
    """The (2, K) of both paths."""
    if value is None:
        return None
    return torch.stack([per_path(value, path, paths, name, x, geometry) for path in (paths[0], paths[-1])])


def backend_for(packed: PackedWeight, x: Tensor, geometry: Geometry) -> Backend:
    """The first backend that reads this format and runs on this input; dense runs any format."""
    for backend in BACKENDS.values():
        runs = backend.format == packed.format and backend.supports(geometry, x.dtype, x.device)
        if runs and backend.accepts(packed, geometry):
            return backend
    return BACKENDS["dense"]


def per_path(
    value: PerPath | None, path: str | float, paths: Sequence[str], name: str, x: Tensor, geometry: Geometry
) -> Tensor | None:
    """Picks, or for a lambda mixes, the (K,) tensor of a path, on x's device in x's dtype."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        if missing := [p for p in paths if p not in value]:
            raise ValueError(
                f"{name} has no entry for path {missing[0]!r}: give one (K,) tensor for each of {tuple(paths)}"
            )
        value = value[path] if isinstance(path, str) else value[paths[0]] * (1 - path) + value[paths[1]] * path
    if value.shape != geometry.weight_shape[:1]:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: ({geometry.weight_shape[0]},) is needed")
    return value.detach().to(device=x.device, dtype=x.dtype).contiguous()


def check_operands(x: Tensor, packed: PackedWeight, geometry: Geometry, residual: Tensor | None) -> None:
    """Raises ValueError or TypeError unless the input and the residual fit the convolution."""
    if not isinstance(x, Tensor):
        raise TypeError(f"input is a {type(x).__name__}: a tensor (N, C, H, W) is needed")
    shape = geometry.output_shape(x.shape)
    values = next(packed.buffers())
    if x.dtype != values.dtype:
        raise TypeError(f"input has dtype {x.dtype}, the packed weight {values.dtype}: convert one to the other")
    if x.device != values.device:
        raise ValueError(f"input is on {x.device}, the packed weight on {values.device}: move one to the other")
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}: {shape} is needed, the shape of the output")
    if residual is not None and (residual.dtype != x.dtype or residual.device != x.device):
        raise TypeError(
            f"residual is {residual.dtype} on {residual.device}: {x.dtype} on {x.device} is needed, as the input"
        )
