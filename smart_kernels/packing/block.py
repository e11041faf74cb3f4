"""The block format of the GPU kernels: blocks of output x input channels of one tap are kept or dropped whole.

Output channels are cut into *tiles*, what one program of a kernel computes, and a tile into rows of blocks: one row
where blocks are as tall as the tile, several where they are finer. An *item* is what a kernel multiplies at a time: the
blocks of one tile at one slab of input channels and one tap. It is known by its *code*, ``(slab * R + r) * S + s``.

The items of a tile are cut into three *segments*: items only the first path keeps anything of, items both do, items
only the second does. So the first path is the contiguous run of segments 0-1, the second is 1-2, their union 0-2: a
path is two end points, and nothing is stored twice. Within a segment codes ascend, by slab and then by tap, so that
neighbours read the same input. ``segments[tile * 3 + i]`` is where segment i of a tile begins; one more entry closes
the last tile.

Blocks lie in the order in which items visit them: a kernel streams values from one end of its run to the other. Where a
tile has several rows of blocks, an item holds only those that the union keeps: ``starts`` says which block comes first,
and ``rows`` which of them a path keeps: bit j of the first path and bit ``MAX_ROWS + j`` of the second stand for row j.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from smart_kernels.packing.base import check_masked_weight
from smart_kernels.packing.segments import SEGMENTS, SegmentedWeight

MAX_ROWS = 8  # of blocks in a tile, so that the bits of both paths fit 16
MAX_CODES = 2**31 - 1  # codes are int32
# Tensor cores take 16 numbers of a sum at a time; 64 outputs are the smallest tile of Hopper's fast instructions.
OUT_SIZES = (128, 64, 32, 16, 8, 4, 2, 1)
IN_SIZES = (64, 32, 16, 8, 4, 2, 1)
FINEST = 16
TILE = 64


class BlockWeight(SegmentedWeight):
    """The format the module's docstring describes.

    Blocks are the largest whose weights live or die together on every path; masks without any regularity get blocks
    of one weight, which no kernel takes.

    Attributes:
        block: output and input channels of a block; at the edges of the weight blocks are padded with zeros.
        rows_per_tile: rows of blocks in a tile.
    """

    format = "block"
    kernels_on = "cuda"

    def __init__(self, weight: Tensor, masks: Mapping[str, Tensor]) -> None:
        check_masked_weight(weight, masks)
        super().__init__(tuple(weight.shape), tuple(masks))
        first, second = (masks[self.paths[i]] for i in (0, -1))
        self.block = block_of([first, second] if len(masks) > 1 else [first])
        self.rows_per_tile = max(1, tile_channels(weight.shape[0], self.block[0]) // self.block[0])
        if self.codes_per_tile > MAX_CODES:
            raise ValueError(f"a weight of shape {self.shape} has more taps and input channels than a code can name")

        # (tiles, rows of blocks, codes) of each path.
        first, second = (self._by_item(_kept_blocks(mask, self.block)) for mask in (first, second))
        union = first | second
        of_first, of_second = first.any(dim=1), second.any(dim=1)
        tile, code = torch.nonzero(union.any(dim=1), as_tuple=True)
        segment = 1 + of_second[tile, code].long() - of_first[tile, code].long()
        order = torch.argsort(tile * SEGMENTS + segment, stable=True)
        tile, code, segment = tile[order], code[order], segment[order]
        counts = torch.bincount(tile * SEGMENTS + segment, minlength=self.tiles * SEGMENTS)
        present = union[tile, :, code]  # (items, rows)
        item, row = torch.nonzero(present, as_tuple=True)

        self.register_buffer("values", self._blocks(weight.detach())[tile[item], row, code[item]])
        self.register_buffer("codes", code.to(torch.int32))
        self.register_buffer("segments", torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32))
        self._lengths = counts.view(-1, SEGMENTS).sum(0).tolist()
        rows, starts = code.new_zeros(0), code.new_zeros(0)
        if self.rows_per_tile > 1:
            bit = 1 << torch.arange(self.rows_per_tile, device=code.device)
            rows = (first[tile, :, code] * bit).sum(1) + ((second[tile, :, code] * bit).sum(1) << MAX_ROWS)
            starts = _exclusive_sum(present.sum(dim=1))
        self.register_buffer("rows", rows.to(torch.int32))
        self.register_buffer("starts", starts.to(torch.int32))

    @property
    def tile(self) -> int:
        """Output channels of a tile."""
        return self.rows_per_tile * self.block[0]

    @property
    def tiles(self) -> int:
        return -(-self.shape[0] // self.tile)

    @property
    def codes_per_tile(self) -> int:
        """How many codes there are: slabs of input channels times taps."""
        return -(-self.shape[1] // self.block[1]) * self.shape[2] * self.shape[3]

    def items_per_tile(self, path: str | float) -> int:
        """Items a path has in an average tile, rounded up."""
        first, last = self.segment_range(path)
        return -(-sum(self._lengths[first:last]) // self.tiles)

    def _mix(self, path: float) -> Tensor:
        _, _, _, of_first, of_second = self._positions()
        coefficient = torch.where(of_first & of_second, 1.0, torch.where(of_first, 1 - path, path))
        return self.values * coefficient.to(self.values.dtype)[:, None, None]

    def dense(self, path: str | float) -> Tensor:
        return self._scatter(self.path_values(path), path)

    def mask(self, path: str) -> Tensor:
        return self._scatter(torch.ones_like(self.values, dtype=torch.bool), path)

    def validate(self) -> None:
        super().validate()
        if self.values.dim() != 3 or tuple(self.values.shape[1:]) != self.block:
            raise ValueError(f"the values have shape {tuple(self.values.shape)}: blocks of {self.block} are needed")
        dtypes = {name: getattr(self, name).dtype for name in ("codes", "segments", "rows", "starts")}
        if set(dtypes.values()) != {torch.int32}:
            raise ValueError(f"the indices are {dtypes}: int32 is needed")
        if self.codes.dim() != 1 or self.segments.shape != (self.tiles * SEGMENTS + 1,):
            raise ValueError(f"{self.segments.numel()} segment offsets: {self.tiles * SEGMENTS + 1} are needed")
        items = len(self.codes)
        lengths = self.segments.long().diff()
        if int(self.segments[0]) != 0 or int(self.segments[-1]) != items or bool((lengths < 0).any()):
            raise ValueError("segment offsets must ascend from 0 to the number of items: the packed weight is corrupt")
        self._lengths = lengths.view(-1, SEGMENTS).sum(0).tolist()
        if bool((self.codes < 0).any()) or bool((self.codes >= self.codes_per_tile).any()):
            raise ValueError("a code names no slab and tap of the weight: the packed weight is corrupt")
        tile, _ = self._tiles_and_segments()
        if len(torch.unique(tile * self.codes_per_tile + self.codes)) != items:
            raise ValueError("a tile holds the same slab and tap twice: the packed weight is corrupt")
        self._validate_rows(items)
        if len(self.values) != int(self._present().sum()):
            raise ValueError(f"{len(self.values)} blocks for {int(self._present().sum())} that the items hold")
        self._validate_padding()

    def _validate_rows(self, items: int) -> None:
        needed = (items,) if self.rows_per_tile > 1 else (0,)
        if self.rows.shape != needed or self.starts.shape != needed:
            raise ValueError(f"{self.rows.numel()} rows and {self.starts.numel()} starts: {needed[0]} are needed")
        if self.rows_per_tile == 1:
            return
        _, segment = self._tiles_and_segments()
        of_first, of_second = self._rows_of(0), self._rows_of(1)
        known = (1 << self.rows_per_tile) - 1
        expected = 1 + of_second.any(1).long() - of_first.any(1).long()
        if bool((self.rows & ~(known | known << MAX_ROWS)).any()) or not bool(self._present().any(1).all()):
            raise ValueError("an item keeps no row of blocks, or one the tile has not: the packed weight is corrupt")
        if not torch.equal(expected, segment):
            raise ValueError("an item lies in the segment of another path: the packed weight is corrupt")
        if not torch.equal(self.starts.long(), _exclusive_sum(self._present().sum(1))):
            raise ValueError("an item does not begin where the one before ends: the packed weight is corrupt")

    def _validate_padding(self) -> None:
        """A kernel multiplies the padding by zeros: only finite padding leaves no trace."""
        tile, row, code, _, _ = self._positions()
        indices = tile * self.rows_per_tile + row, code // (self.shape[2] * self.shape[3])
        for dim, (index, size, channels) in enumerate(zip(indices, self.block, self.shape[:2], strict=True), start=1):
            rest = channels % size
            padding = self.values[index == channels // size].narrow(dim, rest, size - rest)
            if bool((index * size >= channels).any()) or bool((padding != 0).any()):
                raise ValueError("a block holds weights of channels that there are not: the packed weight is corrupt")

    # ---- where things are ----

    def _by_item(self, kept: Tensor) -> Tensor:
        """(block rows, slabs, R, S) -> (tiles, rows of blocks in a tile, codes)."""
        flat = kept.flatten(1)
        flat = F.pad(flat, (0, 0, 0, self.tiles * self.rows_per_tile - len(flat)))
        return flat.unflatten(0, (self.tiles, self.rows_per_tile))

    def _blocks(self, weight: Tensor) -> Tensor:
        """The weight (K, C, R, S), padded, as (tiles, rows of blocks, codes, out, in)."""
        k, c, r, s = weight.shape
        out, inner = self.block
        padded = F.pad(weight, (0, 0, 0, 0, 0, -c % inner, 0, self.tiles * self.tile - k))
        blocks = padded.reshape(self.tiles, self.rows_per_tile, out, -1, inner, r * s)
        return blocks.permute(0, 1, 3, 5, 2, 4).flatten(2, 3)

    def _scatter(self, values: Tensor, path: str | float) -> Tensor:
        """The (K, C, R, S) whose blocks are those of ``values`` that a path keeps, and zeros."""
        k, c, r, s = self.shape
        out, inner = self.block
        tile, row, code, of_first, of_second = self._positions()
        first, last = self.segment_range(path)
        kept = (of_first & (first == 0)) | (of_second & (last == SEGMENTS))
        blocks = values.new_zeros((self.tiles, self.rows_per_tile, self.codes_per_tile, out, inner))
        blocks[tile[kept], row[kept], code[kept]] = values[kept]
        blocks = blocks.unflatten(2, (-1, r * s)).permute(0, 1, 4, 2, 5, 3)
        return blocks.reshape(self.tiles * self.tile, -1, r, s)[:k, :c].contiguous()

    def _tiles_and_segments(self) -> tuple[Tensor, Tensor]:
        """The tile (items,) and the segment (items,) of each item."""
        index = torch.arange(self.tiles * SEGMENTS, device=self.codes.device)
        index = index.repeat_interleave(self.segments.long().diff())
        return index // SEGMENTS, index % SEGMENTS

    def _rows_of(self, path: int) -> Tensor:
        """Which rows of blocks of each item a path keeps: bool (items, rows of blocks)."""
        if self.rows_per_tile == 1:
            _, segment = self._tiles_and_segments()
            return (segment <= 1 if path == 0 else segment >= 1)[:, None]
        bit = path * MAX_ROWS + torch.arange(self.rows_per_tile, device=self.rows.device)
        return (self.rows[:, None] >> bit & 1).bool()

    def _present(self) -> Tensor:
        """Which rows of blocks each item holds: bool (items, rows of blocks)."""
        return self._rows_of(0) | self._rows_of(1)

    def _positions(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of each block its tile, row in the tile and code, and whether the first and the second path keep it."""
        item, row = torch.nonzero(self._present(), as_tuple=True)
        tile, _ = self._tiles_and_segments()
        return tile[item], row, self.codes.long()[item], self._rows_of(0)[item, row], self._rows_of(1)[item, row]


def block_of(masks: list[Tensor]) -> tuple[int, int]:
    """The largest blocks (output channels, input channels) whose weights live or die together in all masks.

    Blocks of more than 16 channels a side are taken only where they need no more padding at the edges than 16 do.
    """
    if not any(all(is_constant(mask, pair) for mask in masks) for pair in ((2, 1), (1, 2))):
        return 1, 1  # as most masks have it: no need to try all
    k, c = masks[0].shape[:2]
    sizes = [(out, inner) for out in OUT_SIZES for inner in IN_SIZES if _pads_little(k, out) and _pads_little(c, inner)]
    for block in sorted(sizes, key=lambda size: (min(size) >= FINEST, size[0] * size[1]), reverse=True):
        if all(is_constant(mask, block) for mask in masks):
            return block
    raise AssertionError("blocks of one weight hold for every mask")


def tile_channels(out_channels: int, block: int) -> int:
    """Output channels a tile: as tall as fast instructions want it, no taller than there are channels.

    Each input value read serves a tile once, so taller tiles read less; but what a taller tile keeps is the union of
    what its rows of blocks keep.
    """
    if block < FINEST:
        return block
    return max(block, min(TILE, 1 << (out_channels - 1).bit_length()))


def _pads_little(channels: int, size: int) -> bool:
    return size <= FINEST or -channels % size == -channels % FINEST


def is_constant(mask: Tensor, block: tuple[int, int]) -> bool:
    """Whether a mask (K, C, R, S) keeps or drops each block (output channels, input channels) of a tap whole."""
    return torch.equal(_kept_blocks(mask, block), _pool(mask, block, True).all(dim=3).all(dim=1))


def _kept_blocks(mask: Tensor, block: tuple[int, int]) -> Tensor:
    """Which blocks hold anything the mask (K, C, R, S) keeps: bool (K / out, C / in, R, S), both rounded up."""
    return _pool(mask, block, False).any(dim=3).any(dim=1)


def _pool(mask: Tensor, block: tuple[int, int], padding: bool) -> Tensor:
    out, inner = block
    padded = F.pad(mask, (0, 0, 0, 0, 0, -mask.shape[1] % inner, 0, -mask.shape[0] % out), value=padding)
    return padded.unflatten(1, (-1, inner)).unflatten(0, (-1, out))


def _exclusive_sum(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts
