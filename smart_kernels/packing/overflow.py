"""Dividing any mask into a part that satisfies 2:4 and *extra steps*, which hold the overflow and satisfy it too."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smart_kernels.packing.fragments import COLUMNS, GROUP, KEPT, ROWS

BLOCK = 128  # columns that a kernel holds in shared memory at a time, of which an extra step repeats any 32


class Extra(NamedTuple):
    """Extra steps, by block.

    Attributes:
        block: (E,), ascending.
        columns: (E, 32) of the block's 128.
        kept: bool (E, 32 rows, 32): which weights of these columns the step holds.
    """

    block: Tensor
    columns: Tensor
    kept: Tensor


def split(kept: Tensor) -> tuple[Tensor, Extra]:
    """Divides masks of blocks into a part that satisfies 2:4 and extra steps that hold the rest, and satisfy it too.

    A group with too many weights may give up any of them. So columns are taken greedily: at each turn the one that
    relieves the most rows, of equal ones the first.

    Args:
        kept: bool (B, 32, 128).

    Returns:
        What stays, likewise, and the extra steps.
    """
    left = kept.clone()
    blocks, columns, moved = [], [], []
    active = _is_overfull(left).nonzero().flatten()
    while len(active):
        part = left[active]
        step_columns, step_moved = _move_to_step(part)
        left[active] = part
        blocks.append(active)
        columns.append(step_columns)
        moved.append(step_moved)
        active = active[_is_overfull(part)]
    if not blocks:
        none = torch.zeros(0, dtype=torch.long, device=kept.device)
        return left, Extra(none, none.reshape(0, COLUMNS), kept.new_zeros(0, ROWS, COLUMNS))
    block = torch.cat(blocks)
    order = torch.argsort(block, stable=True)
    return left, Extra(block[order], torch.cat(columns)[order], torch.cat(moved)[order])


def _move_to_step(part: Tensor) -> tuple[Tensor, Tensor]:
    """Moves what fits from blocks (B, 32, 128) into one more step: its columns (B, 32) and what it took (B, 32, 32)."""
    index = torch.arange(len(part), device=part.device)
    tie_break = torch.arange(BLOCK - 1, -1, -1, device=part.device, dtype=torch.int16)
    columns = torch.zeros((len(part), COLUMNS), dtype=torch.long, device=part.device)
    moved = part.new_zeros(len(part), ROWS, COLUMNS)
    counts = _counts(part)
    for slot in range(COLUMNS):
        begin = slot // GROUP * GROUP
        free = moved[:, :, begin : begin + GROUP].sum(dim=2, dtype=torch.uint8) < KEPT
        movable = part.unflatten(2, (-1, GROUP)) & ((counts > KEPT) & free[:, :, None])[..., None]
        movable = movable.flatten(2)
        # Eight columns are added at once, as bytes of a word: none exceeds 32.
        gain = movable.view(torch.int64).sum(dim=1).view(torch.uint8)
        column = (gain.to(torch.int16) * BLOCK + tie_break).argmax(dim=1)
        taken = movable[index, :, column]
        part[index, :, column] &= ~taken
        counts[index, :, column // GROUP] -= taken.to(torch.uint8)
        columns[:, slot] = column
        moved[:, :, slot] = taken
    return columns, moved


def _is_overfull(kept: Tensor) -> Tensor:
    """Which blocks have a group of more than two: bool (B,)."""
    return (_counts(kept) > KEPT).flatten(1).any(dim=1)


def _counts(kept: Tensor) -> Tensor:
    """Weights in each group of four: uint8 (B, 32, 32)."""
    return kept.unflatten(2, (-1, GROUP)).sum(dim=3, dtype=torch.uint8)
