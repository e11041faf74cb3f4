"""The CUDA backend's 2:4 weights on Hopper's own sparse instruction, fed by its tensor memory accelerator."""

from __future__ import annotations

import torch

from smart_kernels import two_four_ops
from smart_kernels.backends.base import Verdict
from smart_kernels.backends.cuda import CudaBackend
from smart_kernels.backends.tensor_cores import Schedule
from smart_kernels.geometry import Geometry
from smart_kernels.packing.two_four import TwoFourWeight

COPIED_CHANNELS = 32  # and 64 where they divide: what a row of shared memory has
# Of a tensor map in im2col mode: strides, what a tap adds, and the box's corners, signed numbers of eight bits.
MAX_STRIDE, MAX_OFFSET, CORNERS = 8, 255, (-128, 127)


class WgmmaBackend(CudaBackend):
    """Reads the packed weights of the ``cuda`` backend; samples with paths of their own run on that one's kernel."""

    name = "wgmma"

    def available(self) -> Verdict:
        if not (available := super().available()):
            return available
        reasons = [two_four_ops.wgmma_missing(device) for device in range(torch.cuda.device_count())]
        return Verdict(None in reasons, "" if None in reasons else reasons[0])

    def supports(self, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Verdict:
        if not (verdict := super().supports(geometry, dtype, device)):
            return verdict
        why = two_four_ops.wgmma_missing(torch.cuda.current_device() if device.index is None else device.index)
        return Verdict(why is None, why or "")

    def computes(self, geometry: Geometry, dtype: torch.dtype) -> Verdict:
        if not (verdict := super().computes(geometry, dtype)):
            return verdict
        if geometry.in_channels % COPIED_CHANNELS:
            return Verdict(
                False,
                f"the wgmma kernel copies {COPIED_CHANNELS} channels at a time, which {geometry.in_channels} input "
                "channels do not divide into",
            )
        if max(geometry.stride) > MAX_STRIDE:
            return Verdict(False, f"the wgmma kernel takes strides up to {MAX_STRIDE}, not {geometry.stride}")
        sides = zip(geometry.padding[::2], geometry.padding[1::2], strict=True)
        for (before, after), size, stride, dilation in zip(
            sides, geometry.weight_shape[2:], geometry.stride, geometry.dilation, strict=True
        ):
            reach = (size - 1) * dilation
            # Where the box of an image ends: by the stride, its last pixel may come a little earlier.
            corners = (-before, after - reach, after - reach - stride + 1)
            if reach > MAX_OFFSET or min(corners) < CORNERS[0] or max(corners) > CORNERS[1]:
                return Verdict(
                    False,
                    f"the wgmma kernel's copies cannot reach {reach} pixels beside padding {geometry.padding}",
                )
        return Verdict(True)

    def own_schedule(self, packed: TwoFourWeight) -> Schedule:
        """The tile that has no more channels than there are."""
        return Schedule(len(two_four_ops.TILES) + (packed.slabs <= 2))
