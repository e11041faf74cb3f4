"""The bitmap backend: dense tensor cores of NVIDIA GPUs, fed by weights that are decoded while they are loaded.

It multiplies the zeros, too, so it can be faster than dense convolutions only where reading weights is what takes the
time: at batch 1, and on small maps. And it holds the least: a bit a weight and the values that are kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from smart_kernels.backends.base import Verdict
from smart_kernels.backends.tensor_cores import Schedule, TensorCoreBackend, Work
from smart_kernels.geometry import Geometry
from smart_kernels.packing.bitmap import BitmapWeight

BIT = 1 / 16  # of a weight of 16 bits
# Above that less than half of the weight's bytes are saved, for as much to decode.
MAX_DENSITY = 0.45


class BitmapBackend(TensorCoreBackend):
    name = "bitmap"
    format = "bitmap"
    operator = "bitmap"

    def computes(self, geometry: Geometry, dtype: torch.dtype) -> Verdict:
        if geometry.groups > 1:
            return Verdict(False, f"the bitmap kernel takes one group, not {geometry.groups}")
        return super().computes(geometry, dtype)

    def suits(self, masks: Mapping[str, Tensor]) -> Verdict:
        density = max(float(mask.float().mean()) for mask in masks.values())
        if density <= MAX_DENSITY:
            return Verdict(True)
        return Verdict(False, f"masks keep {density:.0%}: above {MAX_DENSITY:.0%} bitmaps save less than half")

    def work(self, geometry: Geometry, density: float) -> Work:
        return Work(arithmetic=1.0, weights=density + BIT)

    def operand(
        self, packed: BitmapWeight, path: str | float, schedule: Schedule
    ) -> tuple[tuple[object, ...], tuple[object, ...]]:
        return packed.operand(path), tuple(schedule)
