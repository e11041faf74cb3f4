"""What a backend is: one way to run a packed convolution, which says itself what it can run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from smart_kernels.geometry import Geometry
from smart_kernels.packing import FORMATS, PackedWeight

if TYPE_CHECKING:
    from smart_kernels.paths import Samples


class Verdict(NamedTuple):
    """Whether something is possible, and if not, why, in one sentence."""

    ok: bool
    why: str = ""

    def __bool__(self) -> bool:
        return self.ok


class Affine(NamedTuple):
    """A second result of a convolution's epilogue: relu(y * scale + bias).

    Attributes:
        scale, bias: (K,).
        relu: whether it is rectified.
    """

    scale: Tensor
    bias: Tensor
    relu: bool

    def __call__(self, y: Tensor) -> Tensor:
        """(N, K, P, Q) -> (N, K, P, Q)."""
        second = torch.addcmul(self.bias[:, None, None], y, self.scale[:, None, None])
        return second.relu_() if self.relu else second


class NoGradient(torch.autograd.Function):
    """Passes a result on, and refuses the backward pass through it: silence would look like a gradient of zero.

    Registering this with an operator would cost every call ten microseconds outside inference mode.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            "the sparse kernels compute no gradients: take them through the original network, which computes the same"
        )


Result = Tensor | tuple[Tensor, Tensor]  # the second is that of an affine
Run = Callable[[Tensor, Tensor | None], Result]
SampleRun = Callable[[Tensor, Tensor | None, "Samples"], Result]


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

    def suits(self, masks: Mapping[str, Tensor]) -> Verdict:
        """Whether these masks drop what the backend can skip; without it the backend would be another dense one."""
        return Verdict(True)

    def gains_on_full(self, geometry: Geometry, input_shape: Sequence[int]) -> bool:
        """Whether the backend may be faster than dense where there are no zeros to skip."""
        return False

    def pack(self, weight: Tensor, masks: Mapping[str, Tensor], groups: int = 1) -> PackedWeight:
        """Packs a weight (K, C/groups, R, S) and its masks for :meth:`run`."""
        return FORMATS[self.format].of(weight, masks, groups)

    @abstractmethod
    def bind(
        self,
        packed: PackedWeight,
        geometry: Geometry,
        path: str | float,
        scale: Tensor | None,
        bias: Tensor | None,
        relu: bool,
        affine: Affine | None = None,
    ) -> Run:
        """Settles all of :meth:`run` but the input and the residual: what a module calls again and again.

        The call it returns holds on to the packed tensors of now. With ``affine`` it returns both results.
        """

    def accepts(self, packed: PackedWeight, geometry: Geometry) -> Verdict:
        """Whether the backend runs a convolution that it supports from this weight of its format."""
        return Verdict(True)

    def runs_samples(self, packed: PackedWeight) -> bool:
        """Whether :meth:`bind_samples` can run this weight."""
        return False

    def bind_samples(
        self,
        packed: PackedWeight,
        geometry: Geometry,
        scale: Tensor | None,
        bias: Tensor | None,
        relu: bool,
        affine: Affine | None = None,
    ) -> SampleRun:
        """As :meth:`bind`, for batches of which each sample has its own path, in one launch and in one batch.

        Args:
            scale, bias, and those of affine: (2, K), one row a path.
        """
        raise NotImplementedError(f"the {self.name} backend runs one path at a time")

    def estimate_us(
        self,
        geometry: Geometry,
        input_shape: Sequence[int],
        density: float,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> float | None:
        """About how long a call takes, in microseconds, to rank backends by; None where there is no model of it."""
        return None

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
