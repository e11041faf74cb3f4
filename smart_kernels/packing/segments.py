"""What the formats share that keep the values of two paths once, in three segments of each row.

A row holds what only the first path keeps, what both keep, and what only the second keeps. So the first path is the
contiguous run of segments 0-1, the second is 1-2, their union 0-2.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict

from torch import Tensor

from smart_kernels.packing.base import PackedWeight

SEGMENTS = 3
MAX_MIXES = 4  # mixed value sets kept at once: each costs as much as the values themselves


class SegmentedWeight(PackedWeight):
    """A packed weight whose buffer ``values`` is shared by its paths.

    Attributes:
        segments: where each segment begins.
        disabled: whether corrupt data was loaded into it.
    """

    values: Tensor
    segments: Tensor

    def __init__(self, shape: tuple[int, ...], paths: tuple[str, ...]) -> None:
        super().__init__(shape, paths)
        self._mixes: OrderedDict[float, Tensor] = OrderedDict()

    def segment_range(self, path: str | float) -> tuple[int, int]:
        """The segments (first, last) of each row that a path runs over."""
        if isinstance(path, float):
            return 0, SEGMENTS
        if path not in self.paths:
            raise ValueError(f"unknown path {path!r}: this weight has {self.paths}")
        if len(self.paths) == 1:
            return 0, SEGMENTS
        return (0, 2) if path == self.paths[0] else (1, SEGMENTS)

    def path_values(self, path: str | float) -> Tensor:
        """The values a path multiplies by, as they lie: the stored ones, or for a lambda the mix of both paths."""
        if not isinstance(path, float):
            return self.values
        mixed = self._mixes.get(path)
        if mixed is None or mixed.device != self.values.device or mixed.dtype != self.values.dtype:
            mixed = self._mixes[path] = self._mix(path)
            while len(self._mixes) > MAX_MIXES:
                self._mixes.popitem(last=False)
        return mixed

    @abstractmethod
    def _mix(self, path: float) -> Tensor:
        """The values times 1 - lambda where only the first path keeps them, lambda where only the second does."""

    def disable(self) -> None:
        # No kernel finds anything to walk: that of the CPU refuses segments that do not end at the number of values,
        # and backends refuse to start those of GPUs, where nobody looks.
        self.segments.fill_(-1)
        self.disabled = True

    def validate(self) -> None:
        self._mixes.clear()  # the values may be new ones
        self.disabled = False
