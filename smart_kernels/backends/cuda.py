"""The CUDA backend: sparse tensor cores of NVIDIA GPUs on any mask that mostly keeps two weights of each four."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from smart_kernels import native, two_four_ops
from smart_kernels.backends.base import Result, Verdict
from smart_kernels.backends.gpu import GpuBackend, Launch
from smart_kernels.backends.gpu_costs import OWN, layer_us
from smart_kernels.geometry import Geometry
from smart_kernels.packing.fragments import GROUP, KEPT, ROWS
from smart_kernels.packing.matrix import padded_channels
from smart_kernels.packing.two_four import RUN, TwoFourWeight
from smart_kernels.two_four_ops import Schedule

DTYPES = (torch.float16, torch.bfloat16)
# Groups of which more than two weights are kept. Random masks of 40 % have that many: half as many steps again, of half
# the cost of dense ones.
MAX_OVERFULL = 0.2


class CudaBackend(GpuBackend):
    name = "cuda"
    format = "2:4"

    def available(self) -> Verdict:
        why = two_four_ops.missing() or native.cuda_missing()
        return Verdict(why is None, why or "")

    def computes(self, geometry: Geometry, dtype: torch.dtype) -> Verdict:
        if dtype not in DTYPES:
            name = str(dtype).removeprefix("torch.")
            return Verdict(False, f"sparse tensor cores take float16 and bfloat16, not {name}")
        if geometry.groups > 1 and (channels := geometry.weight_shape[1]) < GROUP:
            why = f"sparse tensor cores drop two of {GROUP} input channels, groups of {channels} have no such"
            return Verdict(False, why)
        return Verdict(True)

    def suits(self, masks: Mapping[str, Tensor]) -> Verdict:
        share = max(overfull_share(mask) for mask in masks.values())
        if share <= MAX_OVERFULL:
            return Verdict(True)
        return Verdict(False, f"masks keep more than {KEPT} weights in {share:.0%} of groups of {GROUP} input channels")

    def accepts(self, packed: TwoFourWeight, geometry: Geometry) -> Verdict:
        if packed.groups == geometry.groups:
            return Verdict(True)
        return Verdict(
            False, f"the weight was packed for {packed.groups} groups, the convolution has {geometry.groups}"
        )

    def estimate_us(
        self,
        geometry: Geometry,
        input_shape: Sequence[int],
        density: float,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> float | None:
        if device.type != "cuda":
            return None
        computed = as_computed(geometry)
        read = (input_shape[0], computed.in_channels, *input_shape[2:])
        # Half of all slots are multiplied, at twice the rate; their values and two bits each are read. Of several
        # groups a slab has the runs that its own ones read.
        own = -(-ROWS * geometry.groups // geometry.weight_shape[0]) * geometry.weight_shape[1]
        slots = max(density, 0.5) * min(1.0, -(-own // RUN) * RUN / computed.in_channels)
        if read == tuple(input_shape):
            return layer_us(computed, read, device, dtype, OWN, arithmetic=slots, weights=slots + 1 / 16)
        # Zeros are written, and the input among them.
        inputs, outputs = math.prod(read), math.prod(computed.output_shape(read))
        moved = (inputs + 2 * math.prod(input_shape)) / (inputs + outputs)
        return layer_us(
            computed, read, device, dtype, OWN, arithmetic=slots, weights=slots + 1 / 16, moved=moved, kernels=3
        )

    def launch(
        self, packed: TwoFourWeight, geometry: Geometry, path: str | float, with_affine: bool, schedule: Schedule | None
    ) -> Launch:
        ops = torch.ops.smart_kernels
        operator = (ops.sparse_conv2d_affine_two_four if with_affine else ops.sparse_conv2d_two_four).default
        computed = as_computed(geometry)
        if computed.in_channels != geometry.in_channels:
            operator = partial(_with_padded_input, operator, computed.in_channels)
        tile, splits = schedule or Schedule()
        runs = packed.runs(path)
        if runs is not None and tile >= len(two_four_ops.TILES):
            tile = -1  # kernels of other generations read all columns
        return Launch(operator, (*packed.operand(path), computed.numbers), (tile, runs, splits))


def as_computed(geometry: Geometry) -> Geometry:
    """The convolution that the kernels are told of: of one group, whose input channels are a multiple of eight."""
    k, _, r, s = geometry.weight_shape
    return replace(geometry, weight_shape=(k, padded_channels(geometry.in_channels), r, s), groups=1)


def _with_padded_input(operator: Callable[..., Result], channels: int, x: Tensor, *arguments: object) -> Result:
    return operator(pad_channels(x, channels), *arguments)


def pad_channels(x: Tensor, channels: int) -> Tensor:
    """Copies (N, C, H, W) into so many channels, in channels_last: zeros lie behind its own."""
    n, own, h, w = x.shape
    padded = x.new_zeros(n, h, w, channels)
    padded[..., :own] = x.permute(0, 2, 3, 1)
    return padded.permute(0, 3, 1, 2)


def overfull_share(mask: Tensor) -> float:
    """The share of groups of four input channels of which a mask (K, C, R, S) keeps more than two."""
    padded = F.pad(mask, (0, 0, 0, 0, 0, -mask.shape[1] % GROUP))
    return float((padded.unflatten(1, (-1, GROUP)).sum(dim=2) > KEPT).float().mean())
