"""The dense backend: torch's own convolution on masked copies. It runs everywhere and skips nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from smart_kernels import native
from smart_kernels.backends import fused_cudnn
from smart_kernels.backends.base import Affine, Backend, Run, SampleRun, Verdict
from smart_kernels.backends.gpu_costs import Efficiency, layer_us
from smart_kernels.geometry import Geometry
from smart_kernels.packing import PackedWeight

if TYPE_CHECKING:
    from smart_kernels.paths import Samples

# One thread's float32 multiplications and additions a microsecond, about, by instruction set: they rank, no more.
FLOPS_PER_US = {"avx512": 100e3, "avx2": 60e3, "plain": 20e3}
CALL_US = 10.0
# A weight of at most so many numbers takes its scale in when a path is bound: one copy more, one pass over the output
# less. For larger ones, of deep layers with small maps, the copy would cost more.
FOLDED = 2**16


class DenseBackend(Backend):
    name = "dense"
    format = "dense"

    def available(self) -> Verdict:
        return Verdict(True)

    def supports(self, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Verdict:
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
            return layer_us(geometry, input_shape, device, dtype, Efficiency())
        if device.type != "cpu" or not (isas := native.cpu_isas()):
            return None
        outputs = math.prod(geometry.output_shape(input_shape)) / geometry.weight_shape[0]
        flops = 2 * math.prod(geometry.weight_shape) * outputs
        return CALL_US + flops / (FLOPS_PER_US[isas[0]] * torch.get_num_threads())

    def bind(
        self,
        packed: PackedWeight,
        geometry: Geometry,
        path: str | float,
        scale: Tensor | None,
        bias: Tensor | None,
        relu: bool,
        affine: Affine | None = None,
    ) -> Run:
        return bind_weight(packed.dense(path), geometry, scale, bias, relu, affine)

    def runs_samples(self, packed: PackedWeight) -> bool:
        return getattr(packed, "shared", False) and len(packed.paths) == 2

    def bind_samples(
        self,
        packed: PackedWeight,
        geometry: Geometry,
        scale: Tensor | None,
        bias: Tensor | None,
        relu: bool,
        affine: Affine | None = None,
    ) -> SampleRun:
        """As the base class says, where both paths have one mask."""
        convolve = self.bind(packed, geometry, packed.paths[0], None, None, False)

        def run(x: Tensor, residual: Tensor | None, samples: Samples) -> Tensor | tuple[Tensor, Tensor]:
            def of(numbers: Tensor) -> Tensor:
                return numbers[samples.choice][:, :, None, None]

            y = convolve(x, None)
            y = y if scale is None else y * of(scale)
            y = y if bias is None else y + of(bias)
            y = y if residual is None else y + residual
            y = y.relu() if relu else y
            if affine is None:
                return y
            second = y * of(affine.scale) + of(affine.bias)
            return y, second.relu() if affine.relu else second

        return run


def bind_weight(
    weight: Tensor,
    geometry: Geometry,
    scale: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    affine: Affine | None = None,
) -> Run:
    """A convolution of a dense weight (K, C/groups, R, S) of ``geometry`` and what follows it, ready to run.

    On a GPU it takes its scale in, lies in channels_last and runs on cuDNN's fused convolutions where these apply.
    """
    on_gpu = fused_cudnn.is_on_gpu(weight)
    if scale is not None and (on_gpu or weight.numel() <= FOLDED):
        weight, scale = fold(weight, scale)
    if on_gpu:
        weight = weight.contiguous(memory_format=torch.channels_last)
    plain = _bind_plain(weight, geometry, scale, bias, relu, affine)
    if scale is None and fused_cudnn.applies(weight, geometry, relu, affine is not None):
        return fused_cudnn.bind(weight, geometry, bias, plain)
    return plain


def fold(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weight (K, ...) times the scale (K,), and what is left of the scale: nothing, if that loses no accuracy.

    Each product is rounded once more, as the weights were. float16 has so small a range that a product may also leave
    it, or come where numbers lie wide apart: then both are returned as they are.
    """
    folded = weight * scale[:, None, None, None]
    if weight.dtype != torch.float16:
        return folded, None
    if torch.compiler.is_compiling():
        return weight, scale
    exact = weight.float() * scale.float()[:, None, None, None]
    lost, largest = ((each.flatten(1).abs().amax(1)) for each in (folded.float() - exact, exact))
    holds = bool((lost <= torch.finfo(torch.float16).eps * largest).all())
    return (folded, None) if holds else (weight, scale)


def _bind_plain(
    weight: Tensor,
    geometry: Geometry,
    scale: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    affine: Affine | None,
) -> Run:
    top, bottom, left, right = geometry.padding
    even = (top, left) == (bottom, right)
    padding = (top, left) if even else (0, 0)
    conv_bias = bias if scale is None else None
    if scale is not None:
        scale = scale[:, None, None]
        shift = torch.zeros_like(scale) if bias is None else bias[:, None, None]

    # As which it is several times faster, and which is what a fully connected layer would be.
    matrix = weight.flatten(1) if geometry == Geometry(geometry.weight_shape) and weight.shape[2:] == (1, 1) else None

    def run(x: Tensor, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        if matrix is not None and x.shape[2:] == (1, 1):
            y = F.linear(x.flatten(1), matrix, conv_bias)[:, :, None, None]
        else:
            x = x if even else F.pad(x, (left, right, top, bottom))
            y = F.conv2d(x, weight, conv_bias, geometry.stride, padding, geometry.dilation, geometry.groups)
        if scale is not None:
            y = torch.addcmul(shift, y, scale)
        if residual is not None:
            y = y.add_(residual)
        y = y.relu_() if relu else y
        return y if affine is None else (y, affine(y))

    return run
