"""The dense backend: torch's own convolution on masked copies. It runs everywhere and skips nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from smart_kernels.backends.base import Backend, Verdict
from smart_kernels.geometry import Geometry
from smart_kernels.packing import PackedWeight


class DenseBackend(Backend):
    name = "dense"
    format = "dense"

    def available(self) -> Verdict:
        return Verdict(True)

    def supports(self, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Verdict:
        return Verdict(True)

    def bind(
        self,
        packed: PackedWeight,
        geometry: Geometry,
        path: str | float,
        scale: Tensor | None,
        bias: Tensor | None,
        relu: bool,
    ) -> Callable[[Tensor, Tensor | None], Tensor]:
        weight, (top, bottom, left, right) = packed.dense(path), geometry.padding
        even = (top, left) == (bottom, right)
        padding = (top, left) if even else (0, 0)
        conv_bias = bias if scale is None else None
        if scale is not None:
            scale = scale[:, None, None]
            shift = torch.zeros_like(scale) if bias is None else bias[:, None, None]

        def run(x: Tensor, residual: Tensor | None) -> Tensor:
            if not even:
                x = F.pad(x, (left, right, top, bottom))
            y = F.conv2d(x, weight, conv_bias, geometry.stride, padding, geometry.dilation, geometry.groups)
            if scale is not None:
                y = torch.addcmul(shift, y, scale)
            if residual is not None:
                y = y.add_(residual)
            return y.relu_() if relu else y

        return run
