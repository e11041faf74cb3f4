"""The direct backend: exact float32 on NVIDIA GPUs without tensor cores, skipping every zero of any mask.

Tensor cores round float32 inputs to TF32. Where that is not wanted, dense convolutions run on the plain cores, and this
kernel is there beside them, on the non-zeros alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from smart_kernels import direct_ops, native
from smart_kernels.backends.base import Verdict
from smart_kernels.backends.gpu import GpuBackend, Launch
from smart_kernels.geometry import Geometry
from smart_kernels.packing.unstructured import UnstructuredWeight, slab_channels

# Each multiplication reads an operand from shared memory, which gives a quarter of what the cores can multiply: with
# more weights than this a dense kernel, which reads fewer, wins at half of the peak.
MAX_DENSITY = 0.4


class DirectBackend(GpuBackend):
    name = "direct"
    format = "unstructured"
    capability = None

    def available(self) -> Verdict:
        why = direct_ops.missing() or native.cuda_missing()
        return Verdict(why is None, why or "")

    def computes(self, geometry: Geometry, dtype: torch.dtype) -> Verdict:
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

    def launch(
        self, packed: UnstructuredWeight, geometry: Geometry, path: str | float, with_affine: bool, schedule: int | None
    ) -> Launch:
        """As the base class says; ``schedule`` is an index into ``direct_ops.TILES``."""
        ops = torch.ops.smart_kernels
        operator = (ops.sparse_conv2d_affine_direct if with_affine else ops.sparse_conv2d_direct).default
        weight = (packed.path_values(path), packed.codes, packed.segments)
        layer = (*weight, geometry.numbers, packed.slab_channels, *packed.segment_range(path))
        return Launch(operator, layer, (-1 if schedule is None else schedule,))
