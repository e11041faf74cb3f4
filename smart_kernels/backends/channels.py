"""The channels backend: torch's own convolution on what is left when whole channels are dropped. It runs everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from smart_kernels.backends import fused_cudnn
from smart_kernels.backends.base import Affine, Backend, Run, Verdict
from smart_kernels.backends.dense import DenseBackend, bind_weight, fold
from smart_kernels.backends.gpu_costs import Efficiency, layer_us
from smart_kernels.geometry import Geometry
from smart_kernels.packing.channels import ChannelWeight, kept_channels

COPIED_FLOATS_PER_US = 1e3
GROUP = 16  # channels that tensor cores take at a time
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
        self,
        geometry: Geometry,
        input_shape: Sequence[int],
        density: float,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> float | None:
        if device.type == "cuda":
            # Kept inputs are gathered, which reads and writes them; outputs are filled, and the kept ones put there.
            return layer_us(
                geometry, input_shape, device, dtype, Efficiency(),
                arithmetic=density, weights=density, moved=2 * density**0.5, kernels=4,
            )  # fmt: skip
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
        if fused_cudnn.is_on_gpu(weight):
            weight, kept_out, kept_in = rounded_up(weight, kept_out, kept_in, geometry)
        channels = geometry.weight_shape[0]
        all_in, all_out = len(kept_in) == geometry.in_channels, len(kept_out) == channels
        nothing = weight.numel() == 0
        if not nothing:
            if scale is not None:
                weight, scale = fold(weight, scale[kept_out])
            if fused_cudnn.is_on_gpu(weight):
                weight = weight.contiguous(memory_format=torch.channels_last)
            part = partial(
                bind_weight,
                weight,
                replace(geometry, weight_shape=tuple(weight.shape)),
                scale,
                None if bias is None else bias[kept_out],
            )
            if all_out:
                whole = part(relu, affine)
                return whole if all_in else lambda x, residual: whole(_select(x, kept_in), residual)
        # A dropped channel is its bias everywhere. A residual comes before the ReLU.
        constant = weight.new_zeros(channels) if bias is None else bias
        constants = {rectified: constant.relu() if rectified else constant for rectified in (relu, False)}
        parts = {} if nothing else {rectified: part(rectified) for rectified in (relu, False)}

        def run(x: Tensor, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
            rectified = relu and residual is None
            layout = torch.channels_last if x.is_cuda else torch.contiguous_format
            y = torch.empty(geometry.output_shape(x.shape), dtype=x.dtype, device=x.device, memory_format=layout)
            y.copy_(constants[rectified][:, None, None])
            if not nothing:
                y.index_copy_(1, kept_out, parts[rectified](x if all_in else _select(x, kept_in), None))
            if residual is not None:
                y = y.add_(residual)
                y = y.relu_() if relu else y
            return y if affine is None else (y, affine(y))

        return run


def rounded_up(weight: Tensor, kept_out: Tensor, kept_in: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """A compact weight with as many dropped channels, all zeros, put back as fill its groups of 16 on both sides.

    Tensor cores take channels in such groups, so that these cost no time; they change no result.

    Args:
        weight: (K_p, C_p, R, S).
        kept_out, kept_in: (K_p,) and (C_p,), ascending.

    Returns:
        The three of them, enlarged.
    """
    if weight.numel() == 0:
        return weight, kept_out, kept_in
    wide_out = _with_others(kept_out, geometry.weight_shape[0])
    wide_in = _with_others(kept_in, geometry.in_channels)
    wide = weight.new_zeros(len(wide_out), len(wide_in), *weight.shape[2:])
    wide[torch.searchsorted(wide_out, kept_out)[:, None], torch.searchsorted(wide_in, kept_in)] = weight
    return wide, wide_out, wide_in


def _with_others(kept: Tensor, channels: int) -> Tensor:
    """Kept channels and the first of the others, up to a multiple of 16 or all, ascending."""
    dropped = torch.ones(channels, dtype=torch.bool, device=kept.device).index_fill_(0, kept, False)
    return torch.cat([kept, dropped.nonzero().flatten()[: -len(kept) % GROUP]]).sort().values


def _select(x: Tensor, channels: Tensor) -> Tensor:
    """Some channels of images (N, C, H, W), in the layout of these: torch by itself would return them contiguous."""
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return x.permute(0, 2, 3, 1).index_select(3, channels).permute(0, 3, 1, 2)
    return x.index_select(1, channels)
