"""The dense backend: torch's own convolution on masked copies. It runs everywhere and skips nothing."""

from __future__ import annotations

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

    def run(
        self,
        x: Tensor,
        packed: PackedWeight,
        geometry: Geometry,
        path: str | float,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        top, bottom, left, right = geometry.padding
        padding: tuple[int, int] = (top, left)
        if (top, left) != (bottom, right):
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        fused_bias = bias if scale is None else None
        y = F.conv2d(x, packed.dense(path), fused_bias, geometry.stride, padding, geometry.dilation, geometry.groups)
        if scale is not None:
            y = y.mul_(scale[:, None, None])
            if bias is not None:
                y = y.add_(bias[:, None, None])
        if residual is not None:
            y = y.add_(residual)
        return y.relu_() if relu else y
