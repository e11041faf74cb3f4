"""The bitmap format: which weights a mask keeps, a bit each, and the values of those alone.

It is for whoever reads few weights for each output: small batches, whose time is that of reading weights, and small
memories. A kernel makes dense fragments of it while it loads them, and multiplies those on dense tensor cores.

A weight is cut into slabs of 32 output channels and blocks of 128 columns, see :mod:`matrix`; a block is four *steps*
of 32 columns, two by two 16 x 16 matrices of the instruction ``mma.m16n8k16`` (PTX ISA, "Matrix fragments for
mma.m16n8k16 with floating point type"). Each of the 32 lanes of a warp gives eight weights to each of these matrices:
its 32 of a step are one word of bits. Bit ``8 * m + 2 * r + i`` is element i of register r of matrix m; matrices are
counted row by row.

The values of a slab and block, its *chunk*, lie lane by lane, and those of a lane step by step in the order of its
bits. So a warp needs one prefix sum of 32 counts a chunk to tell its lanes where they begin, and from there each lane
reads on. Chunks begin at multiples of eight values, to be copied 16 bytes at a time.

A path of density d takes d + 1/16 of a dense copy in 16 bits, 0.2625 for 0.2, and half a percent for where chunks begin
and what fills them up. Both paths have their own. Values of the union stored once, beside two bitmaps, would take 0.36
+ 2/16 = 0.485 of one copy for two independent masks of 0.2: 0.2425 of two. But each path would read all of these 0.485
to find its own values, and reading less is what this format is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smart_kernels.packing.base import check_masked_weight
from smart_kernels.packing.fragments import COLUMNS, LANES, ROWS
from smart_kernels.packing.matrix import CHANNELS, MAX_INDEX, MatrixWeight
from smart_kernels.packing.overflow import BLOCK

STEPS = BLOCK // COLUMNS
SLOTS = ROWS * COLUMNS // LANES  # weights of a lane in a step, the bits of its word


class Operand(NamedTuple):
    """What kernels read for one path.

    Attributes:
        values: (values of all chunks,).
        bits: int32 (slabs * blocks, 32 lanes, 4 steps).
        starts: int32 (slabs * blocks + 1,), where the values of each slab and block begin.
        first_slab: where the path's slabs begin.
        largest: the most values that a chunk has.
    """

    values: Tensor
    bits: Tensor
    starts: Tensor
    first_slab: int
    largest: int


class BitmapWeight(MatrixWeight):
    """The format the module's docstring describes.

    Attributes:
        largest: the most values that a chunk has, a multiple of eight: what a kernel has room for.
    """

    format = "bitmap"

    def __init__(self, weight: Tensor, masks: Mapping[str, Tensor]) -> None:
        check_masked_weight(weight, masks)
        super().__init__(tuple(weight.shape), masks)
        if self.copies * self.slabs * self.blocks * ROWS * BLOCK > MAX_INDEX:
            raise ValueError(f"a weight of shape {self.shape} has more weights than an index can name")
        own = self._own(masks)
        kept = torch.cat([_by_lane(self._cut(self._as_matrix(mask))) for mask in own])
        weight = _by_lane(self._cut(self._as_matrix(weight.detach()))).repeat(self.copies, 1, 1, 1)
        lengths = _padded(kept.flatten(1).sum(1))
        starts = F.pad(lengths.cumsum(0), (1, 0))
        values = weight.new_zeros(int(starts[-1]))
        # Every zero positive: it may be a product of a lambda and a weight.
        values[_positions(kept, starts)] = weight[kept] + 0.0
        self.largest = int(lengths.max())
        self.register_buffer("values", values)
        self.register_buffer("bits", _as_words(kept))
        self.register_buffer("starts", starts.to(torch.int32))

    @classmethod
    def of(cls, weight: Tensor, masks: Mapping[str, Tensor], groups: int = 1) -> BitmapWeight:
        # Of several groups the matrix is that of their own input channels: only to be stored, no kernel runs it.
        return cls(weight, masks)

    @classmethod
    def has_kernels(cls, device: torch.device, dtype: torch.dtype, groups: int = 1) -> bool:
        return groups == 1 and super().has_kernels(device, dtype)

    def operand(self, path: str | float) -> Operand:
        """What kernels read for a path; the union of both masks for a lambda, packed when first asked for."""
        packed, name = self.of_path(path)
        first = packed._copy_of(name) * self.slabs
        return Operand(packed.values, packed.bits, packed.starts, first, packed.largest)

    def nonzeros(self, path: str) -> int:
        return int(_as_bools(self._own_bits(path)).sum())

    def disable(self) -> None:
        # Kernels find no values to read, and the backend refuses to start them.
        self.bits.zero_()
        self.starts.zero_()
        self.disabled = True

    def validate(self) -> None:
        self._mixes.clear()  # the values may be new ones
        self.disabled = False
        chunks = self.copies * self.slabs * self.blocks
        shapes = {"bits": (chunks, LANES, STEPS), "starts": (chunks + 1,), "values": (self.values.numel(),)}
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)}: {shape} is needed")
        if (dtypes := (self.bits.dtype, self.starts.dtype)) != (torch.int32, torch.int32):
            raise ValueError(f"bits and starts are {dtypes}: int32 is needed")
        kept = _as_bools(self.bits)
        lengths, starts = _padded(kept.flatten(1).sum(1)), self.starts.long()
        if int(starts[0]) != 0 or not torch.equal(starts.diff(), lengths) or int(starts[-1]) != self.values.numel():
            raise ValueError("values do not begin where the bits before them end: the packed weight is corrupt")
        if int(lengths.max()) > self.largest:
            raise ValueError(
                f"a chunk of {int(lengths.max())} values exceeds the {self.largest} of the masks it was packed with: "
                "swap the network that has these masks, or use smart_kernels.save and load"
            )
        for path in self.paths:
            if int(self.mask(path).sum()) != int(_as_bools(self._own_bits(path)).sum()):
                raise ValueError("bits are set of channels that there are not: the packed weight is corrupt")

    def _own_bits(self, path: str) -> Tensor:
        first, count = self._copy_of(path) * self.slabs * self.blocks, self.slabs * self.blocks
        return self.bits[first : first + count]

    def _decoded(self, path: str) -> tuple[Tensor, Tensor]:
        kept, first = _as_bools(self._own_bits(path)), self._copy_of(path) * self.slabs * self.blocks
        weight = self.values.new_zeros(kept.shape)
        weight[kept] = self.values[_positions(kept, self.starts[first : first + len(kept) + 1].long())]
        return tuple(self._from_matrix(self._joined(_by_row(each))) for each in (weight, kept))


def _padded(counts: Tensor) -> Tensor:
    """Counts of values as multiples of what is copied at once."""
    return (counts + CHANNELS - 1) // CHANNELS * CHANNELS


def _positions(kept: Tensor, starts: Tensor) -> Tensor:
    """Where the values of the weights that chunks (B, 32, 4, 32) keep lie, if they begin at ``starts`` (B + 1,)."""
    counts = kept.flatten(1).sum(1)
    before = F.pad(counts.cumsum(0), (1, 0))[:-1]
    return torch.arange(int(counts.sum()), device=kept.device) + (starts[:-1] - before).repeat_interleave(counts)


def _by_lane(blocks: Tensor) -> Tensor:
    """Blocks (B, 32 rows, 128 columns) as (B, 32 lanes, 4 steps, 32 weights of a lane)."""
    # (B; upper or lower matrix, upper or lower half, group; step, left or right matrix, left or right half, thread, i)
    parts = blocks.reshape(-1, 2, 2, 8, STEPS, 2, 2, 4, 2)
    return parts.permute(0, 3, 7, 4, 1, 5, 6, 2, 8).reshape(-1, LANES, STEPS, SLOTS)


def _by_row(lanes: Tensor) -> Tensor:
    """The inverse of :func:`_by_lane`."""
    parts = lanes.reshape(-1, 8, 4, STEPS, 2, 2, 2, 2, 2)
    return parts.permute(0, 4, 7, 1, 3, 5, 6, 2, 8).reshape(-1, ROWS, BLOCK)


def _as_words(kept: Tensor) -> Tensor:
    """Bools (..., 32) as int32 (...), the first in the lowest bit."""
    words = (kept.long() << torch.arange(SLOTS, device=kept.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _as_bools(words: Tensor) -> Tensor:
    """The inverse of :func:`_as_words`."""
    return (words[..., None] >> torch.arange(SLOTS, device=words.device, dtype=torch.int32) & 1).bool()
