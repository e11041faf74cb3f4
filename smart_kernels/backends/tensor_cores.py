"""What the backends share whose CUDA C++ kernels multiply packed weights of 16-bit floats on tensor cores."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from smart_kernels import native
from smart_kernels.backends.base import Result, Verdict
from smart_kernels.backends.gpu import GpuBackend, Launch
from smart_kernels.backends.gpu_costs import OWN, layer_us
from smart_kernels.geometry import Geometry
from smart_kernels.packing.matrix import MatrixWeight, padded_channels

DTYPES = (torch.float16, torch.bfloat16)


class Work(NamedTuple):
    """What a kernel does of the dense convolution's: shares of its multiplications, and of the weight's bytes."""

    arithmetic: float
    weights: float


class Schedule(NamedTuple):
    """How the operators cut up a layer: ``tile`` and ``splits`` as they take them."""

    tile: int = -1
    splits: int = 0


class TensorCoreBackend(GpuBackend):
    """A backend of one kernel.

    Attributes:
        operator: the kernel's name among the operators, ``sparse_conv2d_<operator>``.
    """

    operator: ClassVar[str]

    @abstractmethod
    def operand(
        self, packed: MatrixWeight, path: str | float, schedule: Schedule
    ) -> tuple[tuple[object, ...], tuple[object, ...]]:
        """The operator's arguments of the weight, and those of how it is to run, which come last."""

    @abstractmethod
    def work(self, geometry: Geometry, density: float) -> Work:
        """For weights of which this share is kept."""

    def available(self) -> Verdict:
        why = native.gpu_operator_missing(f"sparse_conv2d_{self.operator}") or native.cuda_missing()
        return Verdict(why is None, why or "")

    def computes(self, geometry: Geometry, dtype: torch.dtype) -> Verdict:
        if dtype not in DTYPES:
            name = str(dtype).removeprefix("torch.")
            return Verdict(False, f"the kernels on tensor cores take float16 and bfloat16, not {name}")
        return Verdict(True)

    def estimate_us(
        self,
        geometry: Geometry,
        input_shape: Sequence[int],
        density: float,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> float | None:
        if device.type != "cuda":
            return None
        computed = as_computed(geometry)
        read = (input_shape[0], computed.in_channels, *input_shape[2:])
        work = self.work(geometry, density)._asdict()
        if read == tuple(input_shape):
            return layer_us(computed, read, device, dtype, OWN, **work)
        # Zeros are written, and the input among them.
        inputs, outputs = math.prod(read), math.prod(computed.output_shape(read))
        moved = (inputs + 2 * math.prod(input_shape)) / (inputs + outputs)
        return layer_us(computed, read, device, dtype, OWN, **work, moved=moved, kernels=3)

    def launch(
        self, packed: MatrixWeight, geometry: Geometry, path: str | float, with_affine: bool, schedule: Schedule | None
    ) -> Launch:
        name = f"sparse_conv2d_affine_{self.operator}" if with_affine else f"sparse_conv2d_{self.operator}"
        operator, computed = getattr(torch.ops.smart_kernels, name).default, as_computed(geometry)
        if computed.in_channels != geometry.in_channels:
            operator = partial(_with_padded_input, operator, computed.in_channels)
        weight, tuning = self.operand(packed, path, schedule or Schedule())
        return Launch(operator, (*weight, computed.numbers), tuning)


def as_computed(geometry: Geometry) -> Geometry:
    """The convolution that the kernels are told of: of one group, whose input channels are a multiple of eight."""
    k, _, r, s = geometry.weight_shape
    return replace(geometry, weight_shape=(k, padded_channels(geometry.in_channels), r, s), groups=1)


def _with_padded_input(operator: Callable[..., Result], channels: int, x: Tensor, *arguments: object) -> Result:
    return operator(pad_channels(x, channels), *arguments)


def pad_channels(x: Tensor, channels: int) -> Tensor:
    """Copies (N, C, H, W) into so many channels, in channels_last: zeros lie behind its own."""
    n, own, h, w = x.shape
    padded = x.new_zeros(n, h, w, channels)
    padded[..., :own] = x.permute(0, 2, 3, 1)
    return padded.permute(0, 3, 1, 2)
