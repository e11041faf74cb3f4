"""The truth every kernel is tested against: the operation as it is defined, on dense tensors, in any precision."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from smart_kernels.geometry import Geometry


def sparse_conv2d(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """relu(conv2d(x, weight) * scale + bias + residual), in x's dtype (give float64 for truth).

    Args:
        x: (N, C, H, W).
        weight: (K, C/groups, R, S), the mask already multiplied in.
        scale, bias: (K,).
        residual: (N, K, P, Q).
    """
    top, bottom, left, right = geometry.padding
    padded = F.pad(x, (left, right, top, bottom))
    y = F.conv2d(padded, weight.to(x.dtype), None, geometry.stride, 0, geometry.dilation, geometry.groups)
    if scale is not None:
        y = y * scale.to(x.dtype)[:, None, None]
    if bias is not None:
        y = y + bias.to(x.dtype)[:, None, None]
    if residual is not None:
        y = y + residual.to(x.dtype)
    return y.relu() if relu else y
