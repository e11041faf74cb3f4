"""The unstructured format of the CPU kernels: any zeros may be skipped, and two paths share every stored value.

A non-zero is its value and a *code* that says which input channel and tap it multiplies. The stream of non-zeros is cut
twice:

* into *rows* (slab, k): output channel k over one slab of neighbouring input channels, slab by slab. A kernel runs a
  slab through every output channel while the slab's input sits in the L1 cache. Codes are relative to the slab,
  ``(channel in slab * R + r) * S + s``, so they fit a byte: five bytes a non-zero in float32.
* each row into three *segments*: weights only the first path keeps, weights both keep, weights only the second keeps.
  So the first path is the contiguous run of segments 0-1, the second is 1-2, their union 0-2: a kernel switches path
  by other end points, and no index is stored twice.

``segments[row * 3 + i]`` is where segment i of a row begins; one more entry closes the last row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from smart_kernels.packing.base import check_masked_weight
from smart_kernels.packing.segments import SEGMENTS, SegmentedWeight

MAX_TAPS = 2**15  # the largest code is an int16


def slab_channels(in_channels: int, taps: int) -> int:
    """Input channels a slab: about 144 weights a row, as long as codes fit a byte.

    144 is 16 channels of a 3x3 kernel, whose panel for a tile of eight AVX-512 vectors takes 30 KB, most of an L1
    cache; longer rows would spill, shorter ones spend more on parking sums between slabs.
    """
    return max(1, min(in_channels, 64, max(144, min(taps * 4, 256)) // taps))


class UnstructuredWeight(SegmentedWeight):
    """The format the module's docstring describes."""

    format = "unstructured"

    def __init__(self, weight: Tensor, masks: Mapping[str, Tensor]) -> None:
        check_masked_weight(weight, masks)
        super().__init__(tuple(weight.shape), tuple(masks))
        k, c, r, s = weight.shape
        if r * s > MAX_TAPS:
            raise ValueError(f"a kernel of {r}x{s} taps is too large for this format: at most {MAX_TAPS} taps")
        self.slab_channels = slab_channels(c, r * s)

        weight = weight.detach()
        first, second = (masks[self.paths[i]] for i in (0, -1))
        where = torch.nonzero(first | second)  # (nnz, 4), row-major: codes ascend within a segment
        out_channel, channel = where[:, 0], where[:, 1]
        row = channel // self.slab_channels * k + out_channel
        segment = 1 + second[tuple(where.T)].long() - first[tuple(where.T)].long()
        order = torch.argsort(row * SEGMENTS + segment, stable=True)
        code = (channel % self.slab_channels * r + where[:, 2]) * s + where[:, 3]
        counts = torch.bincount(row * SEGMENTS + segment, minlength=self.rows * SEGMENTS)

        wide = self.slab_channels * r * s > 256
        self.register_buffer("values", weight[tuple(where.T)][order].contiguous())
        self.register_buffer("codes", code[order].to(torch.int16 if wide else torch.uint8))
        self.register_buffer("segments", torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32))

    @property
    def rows(self) -> int:
        """Rows of the stream: slabs times K."""
        return -(-self.shape[1] // self.slab_channels) * self.shape[0]

    def _mix(self, path: float) -> Tensor:
        coefficients = self.values.new_tensor([1 - path, 1.0, path]).repeat(self.rows)
        return self.values * coefficients.repeat_interleave(self._segment_lengths())

    def dense(self, path: str | float) -> Tensor:
        first, last = self.segment_range(path)
        position, segment = self._positions()
        kept = (segment >= first) & (segment < last)
        flat = self.values.new_zeros(torch.Size(self.shape).numel())
        flat[position[kept]] = self.path_values(path)[kept]
        return flat.reshape(self.shape)

    def mask(self, path: str) -> Tensor:
        first, last = self.segment_range(path)
        position, segment = self._positions()
        flat = torch.zeros(torch.Size(self.shape).numel(), dtype=torch.bool, device=self.values.device)
        flat[position[(segment >= first) & (segment < last)]] = True
        return flat.reshape(self.shape)

    def nonzeros(self, path: str) -> int:
        first, last = self.segment_range(path)
        return int(self._segment_lengths().view(-1, SEGMENTS)[:, first:last].sum())

    def validate(self) -> None:
        super().validate()
        k, c, r, s = self.shape
        if self.values.dim() != 1 or self.codes.shape != self.values.shape:
            raise ValueError(f"{self.codes.numel()} codes for {self.values.numel()} values: as many are needed")
        if self.segments.shape != (self.rows * SEGMENTS + 1,):
            raise ValueError(f"{self.segments.numel()} segment offsets: {self.rows * SEGMENTS + 1} are needed")
        lengths = self._segment_lengths()
        if int(self.segments[0]) != 0 or int(self.segments[-1]) != len(self.values) or bool((lengths < 0).any()):
            raise ValueError("segment offsets must ascend from 0 to the number of values: the packed weight is corrupt")
        slab = torch.arange(self.rows, device=lengths.device) // k
        channels = (c - slab * self.slab_channels).clamp(max=self.slab_channels)
        limit = (channels * r * s).repeat_interleave(lengths.view(-1, SEGMENTS).sum(dim=1))
        codes = self.codes.long()
        if bool((codes < 0).any()) or bool((codes >= limit).any()):
            raise ValueError("a code points outside its slab of input channels: the packed weight is corrupt")

    def _segment_lengths(self) -> Tensor:
        return self.segments.long().diff()

    def _positions(self) -> tuple[Tensor, Tensor]:
        """Flat positions (nnz,) in the dense weight, and the segment (nnz,) of each value."""
        k, c, r, s = self.shape
        index = torch.arange(self.rows * SEGMENTS, device=self.values.device).repeat_interleave(self._segment_lengths())
        row, segment = index // SEGMENTS, index % SEGMENTS
        code = self.codes.long()
        channel = row // k * self.slab_channels + code // (r * s)
        return (row % k * c + channel) * (r * s) + code % (r * s), segment
