"""Packed weights: one file a format. ``packed.dense(path)`` gives the masked weight back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from smart_kernels.packing.base import PackedWeight, check_masked_weight
from smart_kernels.packing.bitmap import BitmapWeight
from smart_kernels.packing.block import BlockWeight
from smart_kernels.packing.channels import ChannelWeight
from smart_kernels.packing.dense import DenseWeight
from smart_kernels.packing.two_four import TwoFourWeight
from smart_kernels.packing.unstructured import UnstructuredWeight

FORMATS: dict[str, type[PackedWeight]] = {
    cls.format: cls
    for cls in (UnstructuredWeight, BlockWeight, TwoFourWeight, BitmapWeight, ChannelWeight, DenseWeight)
}

__all__ = [
    "FORMATS",
    "BitmapWeight",
    "BlockWeight",
    "ChannelWeight",
    "DenseWeight",
    "PackedWeight",
    "TwoFourWeight",
    "UnstructuredWeight",
    "pack",
]


def pack(weight: Tensor, masks: Mapping[str, Tensor], format: str = "auto", groups: int = 1) -> PackedWeight:
    """Packs a weight for the kernels.

    Args:
        weight: (K, C/groups, R, S), floating point, finite where a mask keeps it.
        masks: for one or two paths, the bool mask (K, C/groups, R, S) of the weights it keeps.
        format: a name in ``FORMATS``; ``"auto"`` takes the one that needs the fewest bytes, of those with kernels for
            the weight's device and dtype.
        groups: of the convolution.

    Raises:
        ValueError, TypeError: a shape, dtype, number of masks or format that cannot be packed.
    """
    check_masked_weight(weight, masks)
    if format == "auto":
        formats = [cls for cls in FORMATS.values() if cls.has_kernels(weight.device, weight.dtype, groups)]
        return min((cls.of(weight, masks, groups) for cls in formats), key=lambda packed: packed.nbytes)
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: accepted are 'auto', {', '.join(map(repr, FORMATS))}")
    return FORMATS[format].of(weight, masks, groups)
