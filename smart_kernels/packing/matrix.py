"""What the formats share whose kernels multiply matrices: the weight as output channels x columns, in slabs.

A *column* is an input channel at a tap, taps outermost and channels padded to a multiple of eight, what one copy of 16
bytes brings. 32 output channels are a *slab*, and 128 columns a *block*, what a kernel holds in shared memory at a
time. Both paths have their own slabs, the second's after the first's; once, where masks are equal.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from smart_kernels.packing.base import PackedWeight
from smart_kernels.packing.fragments import ROWS
from smart_kernels.packing.overflow import BLOCK

CHANNELS = 8  # 16 bytes
MAX_INDEX = 2**31 - 1  # indices are int32
MAX_MIXES = 4  # packed unions kept at once: each costs as much as a path

Own = TypeVar("Own", bound="MatrixWeight")


class MatrixWeight(PackedWeight):
    """A packed weight in slabs of 32 output channels, for kernels that run 16-bit floats on tensor cores.

    The weight of several groups is that of one, with nothing kept between an output channel and the input channels of
    other groups.

    Attributes:
        groups: of the convolution.
        copies: how many paths have slabs of their own.
        disabled: whether corrupt data was loaded into it.
        values: what is multiplied, as the format lays it out.
    """

    kernels_on = "cuda"
    kernel_dtypes = (torch.float16, torch.bfloat16)
    values: Tensor

    def __init__(self, shape: tuple[int, ...], masks: Mapping[str, Tensor], groups: int = 1) -> None:
        super().__init__(shape, tuple(masks))
        if shape[0] % groups:
            raise ValueError(f"{shape[0]} output channels cannot be split into {groups} groups")
        self.groups = groups
        self.disabled = False
        self.copies = 1 if torch.equal(masks[self.paths[0]], masks[self.paths[-1]]) else 2
        self._mixes: OrderedDict[float, MatrixWeight] = OrderedDict()

    @classmethod
    def of(cls: type[Own], weight: Tensor, masks: Mapping[str, Tensor], groups: int = 1) -> Own:
        return cls(weight, masks, groups)

    @property
    def in_channels(self) -> int:
        return self.shape[1] * self.groups

    @property
    def channels(self) -> int:
        """Input channels, padded."""
        return padded_channels(self.in_channels)

    @property
    def all_columns(self) -> int:
        return self.channels * self.shape[2] * self.shape[3]

    @property
    def slabs(self) -> int:
        """Slabs of one path."""
        return -(-self.shape[0] // ROWS)

    @property
    def columns(self) -> int:
        """Columns of a slab."""
        return self.all_columns

    @property
    def blocks(self) -> int:
        return -(-self.columns // BLOCK)

    def of_path(self: Own, path: str | float) -> tuple[Own, str]:
        """The packed weight that holds a path, and its name there: this one; for a lambda, the union of both masks."""
        if not isinstance(path, float):
            return self, path
        mixed = self._mixes.get(path)
        if mixed is None or mixed.values.device != self.values.device or mixed.values.dtype != self.values.dtype:
            weight, masks = self.unpack()
            first, second = (masks[self.paths[i]] for i in (0, -1))
            coefficient = torch.where(first & second, 1.0, torch.where(first, 1 - path, path))
            mixed = self.of(weight * coefficient.to(weight.dtype), {"mix": first | second}, self.groups)
            self._mixes[path] = mixed
            while len(self._mixes) > MAX_MIXES:
                self._mixes.popitem(last=False)
        return mixed, "mix"

    def dense(self, path: str | float) -> Tensor:
        packed, name = self.of_path(path)
        return packed._decoded(name)[0]

    def mask(self, path: str) -> Tensor:
        return self._decoded(path)[1]

    @abstractmethod
    def _decoded(self, path: str) -> tuple[Tensor, Tensor]:
        """The weight and the mask of a path, (K, C/groups, R, S)."""

    def _own(self, masks: Mapping[str, Tensor]) -> list[Tensor]:
        """The mask of each copy."""
        return [masks[self.paths[i]] for i in (0, -1)][: self.copies]

    def _copy_of(self, path: str) -> int:
        if path not in self.paths:
            raise ValueError(f"unknown path {path!r}: this weight has {self.paths}")
        return self.paths.index(path) if self.copies > 1 else 0

    def _as_matrix(self, weight: Tensor) -> Tensor:
        """(K, C/groups, R, S) as (32 * slabs, all columns)."""
        whole = _on_diagonal(weight, self.groups)
        padded = F.pad(whole, (0, 0, 0, 0, 0, self.channels - self.in_channels)).permute(0, 2, 3, 1).flatten(1)
        return F.pad(padded, (0, 0, 0, self.slabs * ROWS - self.shape[0]))

    def _from_matrix(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`_as_matrix`; there may be more columns, of nothing."""
        k, _, r, s = self.shape
        rows = rows[:k, : self.all_columns].reshape(k, r, s, self.channels)
        return _diagonal(rows[..., : self.in_channels].permute(0, 3, 1, 2), self.groups)

    def _cut(self, matrix: Tensor) -> Tensor:
        """(32 * slabs, columns) as (slabs * blocks, 32 rows, 128 columns), the last block filled up with zeros."""
        matrix = F.pad(matrix, (0, self.blocks * BLOCK - self.columns))
        return matrix.reshape(self.slabs, ROWS, self.blocks, BLOCK).transpose(1, 2).flatten(0, 1)

    def _joined(self, blocks: Tensor) -> Tensor:
        """The inverse of :meth:`_cut`, (32 * slabs, 128 * blocks)."""
        return blocks.reshape(self.slabs, self.blocks, ROWS, BLOCK).transpose(1, 2).flatten(2).flatten(0, 1)


def padded_channels(channels: int) -> int:
    """The input channels that columns are made of: a multiple of eight."""
    return -(-channels // CHANNELS) * CHANNELS


def _on_diagonal(weight: Tensor, groups: int) -> Tensor:
    """(K, C/groups, R, S) as (K, C, R, S), zero where input channels are of another group."""
    if groups == 1:
        return weight
    of_groups, index = weight.unflatten(0, (groups, -1)), torch.arange(groups, device=weight.device)
    whole = weight.new_zeros(*of_groups.shape[:2], groups, *of_groups.shape[2:])
    whole[index, :, index] = of_groups
    return whole.flatten(2, 3).flatten(0, 1)


def _diagonal(whole: Tensor, groups: int) -> Tensor:
    """The inverse of :func:`_on_diagonal`."""
    if groups == 1:
        return whole.contiguous()
    index = torch.arange(groups, device=whole.device)
    return whole.unflatten(1, (groups, -1)).unflatten(0, (groups, -1))[index, :, index].flatten(0, 1).contiguous()
