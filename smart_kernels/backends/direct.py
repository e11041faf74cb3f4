"""The direct backend: exact float32 on NVIDIA GPUs without tensor cores, skipping every zero of any mask.

Tensor cores round float32 inputs to TF32. Where that is not wanted, dense convolutions run on the plain cores, and this
kernel is there beside them, on the non-zeros alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smart_kernels import direct_ops, native
from smart_kernels.backends.base import Affine, Backend, Result, Run, SampleRun, Verdict, guarded, not_on
from smart_kernels.geometry import Geometry
from smart_kernels.packing.unstructured import UnstructuredWeight, slab_channels

if TYPE_CHECKING:
    from smart_kernels.paths import Samples

# Each multiplication reads an operand from shared memory, which gives a quarter of what the cores can multiply: with
# more weights than this a dense kernel, which reads fewer, wins at half of the peak.
MAX_DENSITY = 0.4


class DirectBackend(Backend):
    name = "direct"
    format = "unstructured"

    def available(self) -> Verdict:
        why = direct_ops.missing() or native.cuda_missing()
        return Verdict(why is None, why or "")

    def supports(self, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Verdict:
        if device.type != "cuda":
            return not_on(device)
        if not (available := self.available()):
            return available
        return self.computes(geometry, dtype)

    def computes(self, geometry: Geometry, dtype: torch.dtype) -> Verdict:
        """Whether the kernel can run this convolution, wherever that may be."""
        if dtype != torch.float32:
            return Verdict(False, f"the direct kernel takes float32, not {str(dtype).removeprefix('torch.')}")
        _, channels, r, s = geometry.weight_shape
        if slab_channels(channels, r * s) * r * s > direct_ops.MAX_CODES:
            return Verdict(False, f"the direct kernel takes at most {direct_ops.MAX_CODES} taps, not {r}x{s}")
        return Verdict(True)

    def suits(self, masks: Mapping[str, Tensor]) -> Verdict:
        density = max(float(mask.float().mean()) for mask in masks.values())
        if density <= MAX_DENSITY:
            return Verdict(True)
        return Verdict(False, f"masks keep {density:.0%}: above {MAX_DENSITY:.0%} the direct kernel gains nothing")

    def bind(
        self,
        packed: UnstructuredWeight,
        geometry: Geometry,
        path: str | float,
        scale: Tensor | None,
        bias: Tensor | None,
        relu: bool,
        affine: Affine | None = None,
        tile: int = -1,
    ) -> Run:
        """As the base class says; ``tile`` is an index into ``direct_ops.TILES``, to measure one."""
        call = _bind(packed, geometry, path, scale, bias, relu, affine, tile)
        return lambda x, residual: call(x, residual, None, None)

    def runs_samples(self, packed: UnstructuredWeight) -> bool:
        return len(packed.paths) == 2

    def bind_samples(
        self,
        packed: UnstructuredWeight,
        geometry: Geometry,
        scale: Tensor | None,
        bias: Tensor | None,
        relu: bool,
        affine: Affine | None = None,
        tile: int = -1,
    ) -> SampleRun:
        call = _bind(packed, geometry, packed.paths[1], scale, bias, relu, affine, tile)

        def run(x: Tensor, residual: Tensor | None, samples: Samples) -> Result:
            return call(x, residual, samples.order, samples.first)

        return run


def _bind(
    packed: UnstructuredWeight,
    geometry: Geometry,
    path: str | float,
    scale: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    affine: Affine | None,
    tile: int,
) -> Callable[..., Result]:
    ops = torch.ops.smart_kernels
    op = (ops.sparse_conv2d_direct if affine is None else ops.sparse_conv2d_affine_direct).default
    last_arguments: tuple[object, ...] = (tile,) if affine is None else (*affine, tile)
    values, codes, segments = packed.path_values(path), packed.codes, packed.segments
    numbers, of_slab, (begin, end) = geometry.numbers, packed.slab_channels, packed.segment_range(path)

    def run(x: Tensor, residual: Tensor | None, order: Tensor | None, first: Tensor | None) -> Result:
        weight = (values, codes, segments, numbers, of_slab, begin, end)
        return op(x, *weight, scale, bias, residual, relu, order, first, *last_arguments)

    return guarded(run, packed)
