"""The channels backend: torch's own convolution on what is left when whole channels are dropped. It runs everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from smart_kernels.backends.base import Affine, Backend, Run, Verdict
from smart_kernels.backends.dense import DenseBackend
from smart_kernels.geometry import Geometry
from smart_kernels.packing.channels import ChannelWeight, kept_channels

COPIED_FLOATS_PER_US = 1e3
WORTH = 0.9  # of output times input channels kept: above it copying costs more than it saves


class ChannelsBackend(Backend):
    name = "channels"
    format = "channel"

    def available(self) -> Verdict:
        return Verdict(True)

    def supports(self, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Verdict:
        if geometry.groups > 1:
            return Verdict(False, f"the channels backend drops channels of one group, not of {geometry.groups}")
        return Verdict(True)

    def suits(self, masks: Mapping[str, Tensor]) -> Verdict:
        for mask in masks.values():
            kept_out, kept_in = kept_channels(mask)
            if len(kept_out) * len(kept_in) > WORTH * mask.shape[0] * mask.shape[1]:
                return Verdict(False, "a path drops too few channels whole")
        return Verdict(True)

    def estimate_us(
        self, geometry: Geometry, input_shape: Sequence[int], density: float, device: torch.device
    ) -> float | None:
        dense = DenseBackend().estimate_us(geometry, input_shape, 1.0, device)
        copied = math.prod(input_shape) + math.prod(geometry.output_shape(input_shape))
        return None if dense is None else density * dense + copied / COPIED_FLOATS_PER_US / torch.get_num_threads()

    def bind(
        self,
        packed: ChannelWeight,
        geometry: Geometry,
        path: str | float,
        scale: Tensor | None,
        bias: Tensor | None,
        relu: bool,
        affine: Affine | None = None,
    ) -> Run:
        weight, kept_out, kept_in = packed.kept(path)
        channels, (top, bottom, left, right) = geometry.weight_shape[0], geometry.padding
        even = (top, left) == (bottom, right)
        padding = (top, left) if even else (0, 0)
        all_in, all_out = len(kept_in) == geometry.in_channels, len(kept_out) == channels
        if scale is not None:
            weight = weight * scale[kept_out][:, None, None, None]
        kept_bias = None if bias is None else bias[kept_out]
        # A dropped channel is its bias everywhere.
        empty = weight.new_zeros(channels) if bias is None else bias
        nothing = weight.numel() == 0

        def run(x: Tensor, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
            if not all_out or nothing:
                y = empty[:, None, None].expand(geometry.output_shape(x.shape)).contiguous()
            if not nothing:
                kept = x if all_in else x.index_select(1, kept_in)
                if not even:
                    kept = F.pad(kept, (left, right, top, bottom))
                part = F.conv2d(kept, weight, kept_bias, geometry.stride, padding, geometry.dilation)
                y = part if all_out else y.index_copy_(1, kept_out, part)
            if residual is not None:
                y = y.add_(residual)
            y = y.relu_() if relu else y
            return y if affine is None else (y, affine(y))

        return run
