"""Masks as bits: how they are stored on disk, eight weights a byte."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """Packs a bool tensor of any shape into uint8 (ceil(numel / 8),), row-major, first element in the lowest bit."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().flatten().numpy(), bitorder="little"))


def unpack_bits(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`pack_bits`.

    Raises:
        ValueError: ``bits`` is not what packing a mask of this shape gives.
    """
    numel = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != ((numel + 7) // 8,):
        raise ValueError(
            f"bit-packed mask has dtype {bits.dtype} and shape {tuple(bits.shape)}: "
            f"a mask of shape {tuple(shape)} takes uint8 ({(numel + 7) // 8},)"
        )
    flat = np.unpackbits(bits.cpu().numpy(), bitorder="little")
    if flat[numel:].any():
        raise ValueError("bit-packed mask has bits set beyond its last element: the data is corrupt")
    return torch.from_numpy(flat[:numel].astype(bool)).reshape(shape)
