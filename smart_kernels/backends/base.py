"""What a backend is: one way to run a packed convolution, which says itself what it can run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from smart_kernels.geometry import Geometry
from smart_kernels.packing import FORMATS, PackedWeight


class Verdict(NamedTuple):
    """Whether something is possible, and if not, why, in one sentence."""

    ok: bool
    why: str = ""

    def __bool__(self) -> bool:
        return self.ok


class Backend(ABC):
    """Runs convolutions whose weight is packed in one format.

    Attributes:
        name: as ``swap(backend=...)`` takes it.
        format: the packed format it reads.
    """

    name: ClassVar[str]
    format: ClassVar[str]

    @abstractmethod
    def available(self) -> Verdict:
        """Whether this machine has what the backend needs."""

    @abstractmethod
    def supports(self, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Verdict:
        """Whether the backend computes this convolution on this device; it never computes another one instead."""

    def pack(self, weight: Tensor, masks: Mapping[str, Tensor]) -> PackedWeight:
        """Packs a weight (K, C/groups, R, S) and its masks for :meth:`run`."""
        return FORMATS[self.format](weight, masks)

    @abstractmethod
    def bind(
        self,
        packed: PackedWeight,
        geometry: Geometry,
        path: str | float,
        scale: Tensor | None,
        bias: Tensor | None,
        relu: bool,
    ) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Settles all of :meth:`run` but the input and the residual: what a module calls again and again.

        The call it returns holds on to the packed tensors of now.
        """

    def run(
        self,
        x: Tensor,
        packed: PackedWeight,
        geometry: Geometry,
        path: str | float,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        """relu(conv2d(x, packed.dense(path)) * scale + bias + residual), accumulated in float32, in x's dtype.

        Args:
            x: (N, C, H, W).
            scale, bias: (K,).
            residual: (N, K, P, Q).

        Returns:
            (N, K, P, Q).
        """
        return self.bind(packed, geometry, path, scale, bias, relu)(x, residual)
