"""The CUDA backend: sparse tensor cores of NVIDIA GPUs on any mask that mostly keeps two weights of each four."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from smart_kernels import two_four_ops
from smart_kernels.backends.base import Verdict
from smart_kernels.backends.tensor_cores import Schedule, TensorCoreBackend, Work, as_computed
from smart_kernels.geometry import Geometry
from smart_kernels.packing.fragments import GROUP, KEPT, ROWS
from smart_kernels.packing.two_four import RUN, TwoFourWeight

# Groups of which more than two weights are kept. Random masks of 40 % have that many: half as many steps again, of half
# the cost of dense ones.
MAX_OVERFULL = 0.2


class CudaBackend(TensorCoreBackend):
    name = "cuda"
    format = "2:4"
    operator = "two_four"

    def computes(self, geometry: Geometry, dtype: torch.dtype) -> Verdict:
        if not (verdict := super().computes(geometry, dtype)):
            return verdict
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

    def work(self, geometry: Geometry, density: float) -> Work:
        # Half of all slots are multiplied, at twice the rate; their values and two bits each are read. Of several
        # groups a slab has the runs that its own ones read.
        own = -(-ROWS * geometry.groups // geometry.weight_shape[0]) * geometry.weight_shape[1]
        slots = max(density, 0.5) * min(1.0, -(-own // RUN) * RUN / as_computed(geometry).in_channels)
        return Work(arithmetic=slots, weights=slots + 1 / 16)

    def operand(
        self, packed: TwoFourWeight, path: str | float, schedule: Schedule
    ) -> tuple[tuple[object, ...], tuple[object, ...]]:
        (tile, splits), runs = schedule, packed.runs(path)
        if runs is not None and tile >= len(two_four_ops.TILES):
            tile = -1  # kernels of other generations read all columns
        return packed.operand(path), (tile, runs, splits)


def overfull_share(mask: Tensor) -> float:
    """The share of groups of four input channels of which a mask (K, C, R, S) keeps more than two."""
    padded = F.pad(mask, (0, 0, 0, 0, 0, -mask.shape[1] % GROUP))
    return float((padded.unflatten(1, (-1, GROUP)).sum(dim=2) > KEPT).float().mean())
