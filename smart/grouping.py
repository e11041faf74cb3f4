"""Weights as the groups that a pattern lets live or die together.

Unstructured and N:M masks have groups of one weight, blocks are groups of one kernel tap; channels are no such groups,
each weight belongs to two, and are counted weight by weight; so are V:N:M masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from smart_kernels.patterns import SLAB, VNM, Block, Pattern


def group_count(shape: Sequence[int], pattern: Pattern) -> int:
    """How many groups a weight (K, C/groups, R, S) has."""
    return math.prod(shape) // (pattern.out_channels * pattern.in_channels if isinstance(pattern, Block) else 1)


def group_norms(tensor: Tensor, pattern: Pattern) -> Tensor:
    """The L2 norm of each group of a tensor like the weight: (K/k, C/c, R, S) for blocks k x c, else as given."""
    if not isinstance(pattern, Block):
        return tensor.abs()
    return _blocks(tensor, pattern).square().sum((1, 3)).sqrt()


def group_mask(mask: Tensor, pattern: Pattern) -> Tensor:
    """The groups that live in a mask that obeys the pattern, bool, shaped as by :func:`group_norms`."""
    return _blocks(mask, pattern)[:, 0, :, 0] if isinstance(pattern, Block) else mask


def spread(groups: Tensor, pattern: Pattern) -> Tensor:
    """The mask of weights whose groups are given: the inverse of :func:`group_mask`."""
    if not isinstance(pattern, Block):
        return groups
    return groups.repeat_interleave(pattern.out_channels, 0).repeat_interleave(pattern.in_channels, 1)


def slabs_of(tensor: Tensor, pattern: VNM) -> Tensor:
    """(K, C, R, S) as (K/v, v, C / 4m, m/4 slabs, 16, R, S)."""
    return tensor.unflatten(1, (-1, pattern.choices, SLAB)).unflatten(0, (-1, pattern.v))


def spread_slabs(slabs: Tensor, pattern: VNM) -> Tensor:
    """The weights (K, C, R, S) of slabs (K/v, C / 4m, m/4, R, S)."""
    return slabs.flatten(1, 2).repeat_interleave(pattern.v, 0).repeat_interleave(SLAB, 1)


def _blocks(tensor: Tensor, pattern: Block) -> Tensor:
    """(K, C, R, S) as (K/k, k, C/c, c, R, S)."""
    return tensor.unflatten(1, (-1, pattern.in_channels)).unflatten(0, (-1, pattern.out_channels))
