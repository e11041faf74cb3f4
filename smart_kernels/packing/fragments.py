"""Fragments of sparse tensor cores: tiles of 32 x 32 weights as threads of a warp hold them.

The instruction is ``mma.sp::ordered_metadata.m16n8k32`` of 16-bit floats (PTX ISA, "Matrix fragments for sparse
mma.m16n8k32"): a 16 x 32 matrix of which each group of four neighbours in a row holds at most two weights. Two of them,
one above the other, are a tile: the metadata of both fill one register of each thread, of which the instruction's
sparsity selector picks the half that it reads.

Lane ``4 * g + t`` holds, of each 16 x 32 matrix, eight values: register i has rows ``g`` (i even) or ``g + 8`` (odd)
and compressed columns ``2 * t`` and ``2 * t + 1`` (i < 2), or those plus 8. Its 16 bytes lie together, so that a thread
reads them at once. Metadata are two bits a value, the position in its group: lane ``4 * g + 2 * i + h`` holds those of
matrix i, columns ``16 * h`` to ``16 * h + 15``, row ``g`` in the low half of its word and row ``g + 8`` in the high
one.

An empty slot is a negative zero, and a weight of zero a positive one: so a fragment tells which weights were kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 32
COLUMNS = 32
LANES = 32
GROUP, KEPT = 4, 2
NIBBLES = COLUMNS // 2 // GROUP  # groups in the half of a row, whose metadata one lane holds


def _positions_of(bits: int) -> list[int]:
    """Two ascending positions in a group, among them all that a mask of four bits keeps."""
    kept_first = sorted(range(GROUP), key=lambda position: not bits >> position & 1)
    return sorted(kept_first[:KEPT])


_POSITIONS = [_positions_of(bits) for bits in range(2**GROUP)]


def encode(tiles: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Compresses tiles of weights.

    Args:
        tiles: (T, 32, 32), output channels x columns.
        kept: bool, likewise: at most two of each four neighbours in a row.

    Returns:
        Values (T, 2, 32 lanes, 8), and metadata int32 (T, 32 lanes).
    """
    groups, kept = tiles.unflatten(2, (-1, GROUP)), kept.unflatten(2, (-1, GROUP))
    bits = (kept.to(torch.uint8) << torch.arange(GROUP, device=tiles.device, dtype=torch.uint8)).sum(dim=3)
    index = torch.tensor(_POSITIONS, device=tiles.device)[bits]
    empty = tiles.new_full((), -0.0)
    slots = torch.where(kept.gather(3, index), groups.gather(3, index) + 0.0, empty).flatten(2)
    # (T, matrix, upper or lower rows, g, left or right columns, t, two of a register)
    slots = slots.reshape(-1, 2, 2, 8, 2, 4, 2)
    values = slots.permute(0, 1, 3, 5, 4, 2, 6).reshape(-1, 2, LANES, 8).contiguous()
    nibbles = index[..., 0] | index[..., 1] << 2
    shifts = 4 * torch.arange(NIBBLES, device=tiles.device)
    halves = (nibbles.unflatten(2, (2, NIBBLES)) << shifts).sum(dim=3)  # (T, 32, left or right)
    words = halves.reshape(-1, 2, 2, 8, 2).permute(0, 3, 1, 4, 2)  # (T, g, matrix, left or right, upper or lower)
    words = words[..., 0] | words[..., 1] << 16
    words = torch.where(words >= 2**31, words - 2**32, words)
    return values, words.reshape(-1, LANES).to(torch.int32)


def decode(values: Tensor, metadata: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`encode`: tiles (T, 32, 32) with positive zeros where nothing is kept, and what is kept."""
    slots = values.reshape(-1, 2, 8, 4, 2, 2, 2).permute(0, 1, 5, 2, 4, 3, 6)
    slots = slots.reshape(-1, ROWS, COLUMNS // GROUP, KEPT)
    full = ~((slots == 0) & torch.signbit(slots))
    index = positions(metadata)
    kept = torch.zeros((*slots.shape[:3], GROUP), dtype=torch.bool, device=values.device).scatter(3, index, full)
    tiles = values.new_zeros(kept.shape).scatter(3, index, torch.where(full, slots, 0.0))
    return tiles.flatten(2), kept.flatten(2)


def positions(metadata: Tensor) -> Tensor:
    """Metadata as positions in a group: int64 (T, 32 rows, 8 groups, 2); ascending wherever the metadata are valid."""
    words = (metadata.long() & 0xFFFFFFFF).reshape(-1, 8, 2, 2, 1)
    halves = words >> torch.tensor([0, 16], device=metadata.device) & 0xFFFF  # (T, g, matrix, left or right, upper)
    halves = halves.permute(0, 2, 4, 1, 3).reshape(-1, ROWS, 2, 1)
    nibbles = (halves >> 4 * torch.arange(NIBBLES, device=metadata.device)) & 0xF
    return torch.stack([nibbles & 3, nibbles >> 2], dim=-1).flatten(2, 3)
