"""About how long layers take on a GPU, from two floors: arithmetic at the peak, and bytes at the memory's bandwidth.

Peaks come from the makers' data sheets (``gpus.json``). What share of them kernels reach is assumed, not measured:
these numbers rank backends where nothing is measured, and leave out hopeless ones where something is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from smart_kernels.geometry import Geometry

GPUS = Path(__file__).with_name("gpus.json")
UNKNOWN = "A100"  # taken for a GPU that the table does not have


@dataclass(frozen=True)
class Gpu:
    """What bounds a GPU.

    Attributes:
        tflops: 10^12 multiplications and additions a second, of what multiplies dense matrices of the dtype.
        plain_tflops: the same without tensor cores, in float32.
        terabytes_per_s: of its memory.
    """

    tflops: float
    plain_tflops: float
    terabytes_per_s: float

    @classmethod
    def of(cls, name: str, dtype: str) -> Gpu:
        """From the table of data sheets.

        Raises:
            ValueError: it has no such GPU.
        """
        table = json.loads(GPUS.read_text(encoding="utf-8"))
        if name not in table:
            raise ValueError(f"unknown GPU {name!r}: {', '.join(table)} are known; give others as numbers")
        entry = table[name]
        key = {"bfloat16": "float16"}.get(dtype, dtype)
        return cls(entry[f"{key}_tflops"], entry["float32_tflops"], entry["terabytes_per_s"])

    @classmethod
    def of_device(cls, device: torch.device, dtype: torch.dtype) -> Gpu:
        """The one at hand, or one to stand for it."""
        name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""
        known = (each for each in json.loads(GPUS.read_text(encoding="utf-8")) if each in name)
        return cls.of(next(known, UNKNOWN), "float16" if dtype.itemsize == 2 else "tf32")


@dataclass(frozen=True)
class Efficiency:
    """The share of the peaks that kernels reach, and what starting one takes, in microseconds: assumptions."""

    arithmetic: float = 0.6
    memory: float = 0.8
    start_us: float = 2.0


# Of this package's own kernels, until they are measured: half of what is assumed of cuDNN's arithmetic.
OWN = Efficiency(arithmetic=0.3)


@dataclass(frozen=True)
class Floors:
    """One layer at one batch size, in microseconds.

    Attributes:
        arithmetic_us, memory_us: its two floors.
        expected_us: with the efficiencies assumed.
    """

    arithmetic_us: float
    memory_us: float
    expected_us: float

    @classmethod
    def of(cls, flops: float, tflops: float, nbytes: float, gpu: Gpu, efficiency: Efficiency) -> Floors:
        """Of arithmetic at a peak, and of bytes that are read and written."""
        arithmetic_us, memory_us = flops / tflops / 1e6, nbytes / gpu.terabytes_per_s / 1e6
        expected_us = max(arithmetic_us / efficiency.arithmetic, memory_us / efficiency.memory) + efficiency.start_us
        return cls(arithmetic_us, memory_us, expected_us)

    @property
    def us(self) -> float:
        """The larger floor."""
        return max(self.arithmetic_us, self.memory_us)


def layer_us(
    geometry: Geometry,
    input_shape: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    efficiency: Efficiency,
    *,
    arithmetic: float = 1.0,
    weights: float = 1.0,
    moved: float = 0.0,
    kernels: int = 1,
) -> float:
    """Microseconds expected of a convolution with its epilogue; without a residual.

    Args:
        input_shape: (N, C, H, W).
        arithmetic: share of the dense convolution's arithmetic that is done.
        weights: bytes of the weight read, of those of the dense one.
        moved: times that input and output are read or written beyond the once of each that every layer takes,
            by other kernels.
        kernels: that are started.
    """
    gpu = Gpu.of_device(device, dtype)
    outputs = math.prod(geometry.output_shape(input_shape))
    dense = math.prod(geometry.weight_shape)
    flops = 2.0 * dense * outputs / geometry.weight_shape[0] * arithmetic
    activations = math.prod(input_shape) + outputs
    floors = Floors.of(flops, gpu.tflops, (activations + dense * weights) * dtype.itemsize, gpu, efficiency)
    # Kernels beside the convolution run before and after it.
    moving = Floors.of(0.0, gpu.tflops, activations * moved * dtype.itemsize, gpu, efficiency)
    return floors.expected_us + moving.expected_us + (kernels - 2) * efficiency.start_us
