"""The 2:4 format of sparse tensor cores, for any mask: what fits 2:4 where it is, and the rest in extra steps.

A weight is a matrix of output channels x *columns*; a column is an input channel at a tap, taps outermost and channels
padded to a multiple of eight, what one copy of 16 bytes brings. It is cut into *slabs* of 32 output channels and
*blocks* of 128 columns, what a kernel holds in shared memory at a time, and a block into four *steps* of 32 columns,
one instruction deep.

Sparse tensor cores take two weights of each group of four columns. Masks of 20 % exceed that in 2.7 % of groups: what
is too much is the *overflow*, 0.72 % of weights. It goes into *extra steps* of the same slab and block, whose 32
columns are any of the block's 128, repeated: the kernel gathers them from the shared memory where they lie. So overflow
needs no second pass over input or output, and any mask is exact, a full one too. ``extra_starts[slab * blocks +
block]`` says where the extra steps of a slab and block begin.

Masks may keep nothing of whole runs of 16 columns for 64 output channels, as V:N:M masks do. Where a quarter of these
runs can be left out, they are: a slab then has the columns of the runs that its 64 channels keep, one after the other,
and ``column_runs`` says which these are. The kernel copies no others. Where 32 channels leave out another quarter, each
slab has runs of its own.

Both paths have their own slabs, the second's after the first's (once, where masks are equal). Values shared by both
would halve the memory, but the union of two masks of 20 % exceeds 2:4 in 14 % of groups: more steps for each path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smart_kernels.packing.base import check_masked_weight
from smart_kernels.packing.fragments import COLUMNS, ROWS, decode, encode, positions
from smart_kernels.packing.matrix import MAX_INDEX, MatrixWeight
from smart_kernels.packing.overflow import BLOCK, split

STEPS = BLOCK // COLUMNS
RUN = 16  # columns that are left out together
TALL = (2, 1)  # slabs that leave out the same runs: what a tile of the kernel has, which reads less a product if tall
MAX_RUNS = 0.75  # the part of the runs of taller tiles up to which lists of fewer are worth their smaller tiles


class Operand(NamedTuple):
    """What kernels read for one path.

    Attributes:
        values, metadata: (slabs, steps, 2, 32, 8) and int32 (slabs, steps, 32), as :mod:`fragments` has them.
        extra_values, extra_metadata: the same of the extra steps, (extra, ...).
        extra_columns: uint8 (extra, 32), columns of the block in the order in which lanes read them.
        extra_starts: int32 (slabs * blocks + 1,).
        first_slab: where the path's slabs begin.
    """

    values: Tensor
    metadata: Tensor
    extra_values: Tensor
    extra_metadata: Tensor
    extra_columns: Tensor
    extra_starts: Tensor
    first_slab: int


class TwoFourWeight(MatrixWeight):
    """The format the module's docstring describes.

    Attributes:
        disabled: whether corrupt data was loaded into it.
    """

    format = "2:4"

    def __init__(self, weight: Tensor, masks: Mapping[str, Tensor], groups: int = 1) -> None:
        check_masked_weight(weight, masks)
        super().__init__(tuple(weight.shape), masks, groups)
        if self.all_columns > MAX_INDEX - BLOCK:
            raise ValueError(f"a weight of shape {self.shape} has more taps and input channels than an index can name")
        own = self._own(masks)
        self.register_buffer("column_runs", self._find_runs(own))
        kept = torch.cat([self._as_blocks(mask, i) for i, mask in enumerate(own)])
        weight = torch.cat([self._as_blocks(weight.detach(), i) for i in range(self.copies)])
        regular, extra = split(kept)
        values, metadata = encode(self._as_steps(weight), self._as_steps(regular))
        tiles = weight[extra.block].gather(2, extra.columns[:, None].expand(-1, ROWS, -1))
        extra_values, extra_metadata = encode(tiles, extra.kept)
        counts = torch.bincount(extra.block, minlength=len(kept))
        shape = (self.copies * self.slabs, self.steps)
        self.register_buffer("values", values.unflatten(0, shape))
        self.register_buffer("metadata", metadata.unflatten(0, shape))
        self.register_buffer("extra_values", extra_values)
        self.register_buffer("extra_metadata", extra_metadata)
        self.register_buffer("extra_columns", _as_lanes_read(extra.columns).to(torch.uint8))
        self.register_buffer("extra_starts", torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32))

    @property
    def columns(self) -> int:
        """Columns of a slab: all, or those of the runs it has."""
        return self.all_columns if self.column_runs is None else self.column_runs.shape[2] * RUN

    @property
    def tall(self) -> int | None:
        """Slabs that leave out the same runs of columns, which no tile may exceed; None if all columns are there."""
        return None if self.column_runs is None else -(-self.slabs // self.column_runs.shape[1])

    @property
    def steps(self) -> int:
        """Steps of a slab, without extra ones."""
        return -(-self.columns // COLUMNS)

    def extra_steps(self, path: str | float) -> int:
        """Extra steps of all slabs of a path: those of the overflow."""
        operand = self.operand(path)
        starts = operand.extra_starts.view(-1)[operand.first_slab * self.blocks :]
        return int(starts[self.slabs * self.blocks] - starts[0])

    def overflow(self, path: str) -> int:
        """Weights of a path that lie in extra steps."""
        begin, end = self._extra_range(path)
        _, kept = decode(self.extra_values[begin:end], self.extra_metadata[begin:end])
        return int(kept.sum())

    def operand(self, path: str | float) -> Operand:
        """What kernels read for a path; the union of both masks for a lambda, packed when first asked for."""
        packed, name = self.of_path(path)
        return Operand(
            packed.values,
            packed.metadata,
            packed.extra_values,
            packed.extra_metadata,
            packed.extra_columns,
            packed.extra_starts,
            packed._copy_of(name) * self.slabs,
        )

    def runs(self, path: str | float) -> Tensor | None:
        """The runs of columns that the slabs of :meth:`operand` have; None if all.

        Returns:
            int32 (1 or 2 paths, tiles of 64 or 32 output channels, runs), ascending, then -1 for none.
        """
        return self.of_path(path)[0].column_runs

    def disable(self) -> None:
        # Kernels find no extra steps, and the backend refuses to start them.
        self.extra_starts.fill_(-1)
        self.disabled = True

    def validate(self) -> None:
        self._mixes.clear()  # the values may be new ones
        self.disabled = False
        slabs, extra = self.copies * self.slabs, len(self.extra_values)
        shapes = {
            "values": (slabs, self.steps, 2, 32, 8),
            "metadata": (slabs, self.steps, 32),
            "extra_values": (extra, 2, 32, 8),
            "extra_metadata": (extra, 32),
            "extra_columns": (extra, COLUMNS),
            "extra_starts": (slabs * self.blocks + 1,),
        }
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)}: {shape} is needed")
        dtypes = [getattr(self, name).dtype for name in ("metadata", "extra_metadata", "extra_starts", "extra_columns")]
        if dtypes != [torch.int32, torch.int32, torch.int32, torch.uint8] or self.values.dtype != (
            self.extra_values.dtype
        ):
            raise ValueError(f"the indices are {dtypes}: int32, and uint8 for columns, are needed")
        self._validate_runs()
        lengths = self.extra_starts.long().diff()
        if int(self.extra_starts[0]) != 0 or int(self.extra_starts[-1]) != extra or bool((lengths < 0).any()):
            raise ValueError("extra steps must ascend from 0 to their number: the packed weight is corrupt")
        for metadata in (self.metadata, self.extra_metadata):
            index = positions(metadata)
            if bool((index[..., 0] >= index[..., 1]).any()):
                raise ValueError("two values of a group do not ascend in position: the packed weight is corrupt")
        columns = _by_column(self.extra_columns).long()
        block = torch.arange(slabs * self.blocks, device=lengths.device).repeat_interleave(lengths)
        if bool((columns >= BLOCK).any()):
            raise ValueError("an extra step names a column that its block has not: the packed weight is corrupt")
        for path in self.paths:
            self._validate_positions(path, block, columns)

    def _validate_runs(self) -> None:
        if (runs := self.column_runs) is None:
            return
        shapes = [(self.copies, -(-self.slabs // tall)) for tall in TALL]
        if runs.dtype != torch.int32 or runs.shape[:2] not in shapes:
            raise ValueError(f"column_runs is {runs.dtype} {tuple(runs.shape)}: int32 for each path and tile is needed")
        runs = runs.long()
        inside = (runs >= -1) & (runs < self.all_columns // RUN)
        # Ascending, and nothing after the first -1.
        follows = (runs[..., 1:] > runs[..., :-1]) & (runs[..., :-1] >= 0)
        if not bool(inside.all()) or not bool((follows | (runs[..., 1:] == -1)).all()):
            raise ValueError("runs of columns do not ascend, or there are no such: the packed weight is corrupt")

    def _validate_positions(self, path: str, block: Tensor, columns: Tensor) -> None:
        counts = self._counts(path, block, columns)
        if bool((counts > 1).any()):
            raise ValueError("a weight is held twice: the packed weight is corrupt")
        if int(self._from_blocks(counts, self._copy_of(path)).sum()) != int(counts.sum()):
            raise ValueError("there are weights of channels that there are not: the packed weight is corrupt")

    # ---- where things are ----

    def _find_runs(self, masks: Sequence[Tensor]) -> Tensor | None:
        """The runs of 16 columns of which each 64, or 32, output channels keep anything, as ``runs`` gives them."""
        if self.channels % RUN:
            return None
        matrix = torch.stack([self._as_matrix(mask) for mask in masks])
        of_slab = matrix.reshape(len(masks), self.slabs, ROWS, -1, RUN).any(4).any(2)
        found, fewest = None, of_slab.shape[2]
        for tall in TALL:
            alive = F.pad(of_slab, (0, 0, 0, -self.slabs % tall)).unflatten(1, (-1, tall)).any(2)
            longest = int(alive.sum(2).max())
            if 0 < longest <= MAX_RUNS * fewest:
                # Those alive first, in their order.
                order = torch.argsort(~alive, dim=2, stable=True)[..., :longest]
                found, fewest = torch.where(alive.gather(2, order), order, -1).to(torch.int32), longest
        return found

    def _columns_of(self, copy: int) -> Tensor:
        """Where each column of each slab lies among all: (slabs, columns), beyond the last where there is none."""
        runs = self.column_runs[copy].long().repeat_interleave(self.tall, dim=0)[: self.slabs]
        runs = torch.where(runs < 0, self.all_columns // RUN, runs)
        return (runs[..., None] * RUN + torch.arange(RUN, device=runs.device)).flatten(1)

    def _as_blocks(self, weight: Tensor, copy: int) -> Tensor:
        """(K, C/groups, R, S) of a path as (slabs * blocks, 32 rows, 128 columns)."""
        matrix = self._as_matrix(weight)
        if self.column_runs is not None:
            index = self._columns_of(copy).repeat_interleave(ROWS, dim=0)
            matrix = F.pad(matrix, (0, RUN)).gather(1, index)
        return self._cut(matrix)

    def _as_steps(self, blocks: Tensor) -> Tensor:
        """(copies * slabs * blocks, 32, 128) as tiles (copies * slabs * steps, 32, 32), the last block cut short."""
        steps = blocks.reshape(-1, self.blocks, ROWS, STEPS, COLUMNS).transpose(2, 3)
        return steps.flatten(1, 2)[:, : self.steps].flatten(0, 1)

    def _from_blocks(self, blocks: Tensor, copy: int) -> Tensor:
        """The inverse of :meth:`_as_blocks`."""
        rows = self._joined(blocks)[:, : self.columns]
        if self.column_runs is not None:
            index = self._columns_of(copy).repeat_interleave(ROWS, dim=0)
            rows = rows.new_zeros(len(rows), self.all_columns + RUN).scatter(1, index, rows)
        return self._from_matrix(rows)

    def _extra_range(self, path: str) -> tuple[int, int]:
        first = self._copy_of(path) * self.slabs * self.blocks
        return int(self.extra_starts[first]), int(self.extra_starts[first + self.slabs * self.blocks])

    def _regular(self, path: str) -> tuple[Tensor, Tensor]:
        """Weights and what is kept of a path without its extra steps: (slabs * blocks, 32, 128)."""
        first = self._copy_of(path) * self.slabs
        tiles = decode(self.values[first : first + self.slabs], self.metadata[first : first + self.slabs])
        missing = self.blocks * STEPS - self.steps
        return tuple(
            F.pad(each.unflatten(0, (self.slabs, self.steps)), (0, 0, 0, 0, 0, missing))
            .reshape(-1, STEPS, ROWS, COLUMNS)
            .transpose(1, 2)
            .flatten(2)
            for each in tiles
        )

    def _counts(self, path: str, block: Tensor, columns: Tensor) -> Tensor:
        """How often a path holds each weight: (slabs * blocks, 32, 128)."""
        begin, end = self._extra_range(path)
        counts = self._regular(path)[1].int()
        _, kept = decode(self.extra_values[begin:end], self.extra_metadata[begin:end])
        step, row, slot = torch.nonzero(kept, as_tuple=True)
        where = (block[begin:end][step] - self._copy_of(path) * len(counts), row, columns[begin:end][step, slot])
        return counts.index_put(where, torch.ones_like(row, dtype=torch.int32), accumulate=True)

    def _decoded(self, path: str) -> tuple[Tensor, Tensor]:
        weight, mask = self._regular(path)
        begin, end = self._extra_range(path)
        tiles, kept = decode(self.extra_values[begin:end], self.extra_metadata[begin:end])
        first = self._copy_of(path) * len(mask)
        lengths = self.extra_starts.long().diff()[first : first + len(mask)]
        block = torch.arange(len(mask), device=mask.device).repeat_interleave(lengths)
        step, row, slot = torch.nonzero(kept, as_tuple=True)
        where = (block[step], row, _by_column(self.extra_columns[begin:end]).long()[step, slot])
        weight = weight.index_put(where, tiles[step, row, slot])
        mask = mask.index_put(where, torch.ones_like(row, dtype=torch.bool))
        return self._from_blocks(weight, self._copy_of(path)), self._from_blocks(mask, self._copy_of(path))


def _as_lanes_read(columns: Tensor) -> Tensor:
    """(E, 32) by column as thread t of four reads them: columns 2 t, 2 t + 1 of each eight, in eight bytes."""
    return columns.reshape(-1, 4, 4, 2).transpose(1, 2).reshape(-1, COLUMNS)


def _by_column(as_read: Tensor) -> Tensor:
    """The inverse of :func:`_as_lanes_read`."""
    return as_read.reshape(-1, 4, 4, 2).transpose(1, 2).reshape(-1, COLUMNS)
