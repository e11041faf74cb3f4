"""The GPU kernels on emulated GPUs, each called in the same way."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from emulated import emulated_hopper, emulated_library, run, run_bitmap
from emulated_direct import run_direct
from exact import integers, layer, reference
from gpu_cases import DIRECT_CASES, HOPPER_CASES, TWO_FOUR_CASES

from smart_kernels import bitmap_ops, direct_ops, two_four_ops
from smart_kernels.backends.tensor_cores import as_computed, pad_channels
from smart_kernels.packing import BitmapWeight, PackedWeight, TwoFourWeight, UnstructuredWeight


class Kernel(NamedTuple):
    """A kernel under test.

    Attributes:
        run: x (N, C, H, W), a packed weight, its geometry, a path and a tile -> (N, K, P, Q); by keywords scale, bias,
            residual, relu, order, first, affine and backwards; with ``affine`` two results.
        packing: the format it reads.
        cases: of gpu_cases.py.
    """

    run: Callable
    packing: type[PackedWeight]
    dtypes: Sequence[torch.dtype]
    tiles: Sequence[str]
    cases: Mapping[str, tuple]


def two_four(x, packed, geometry, path, tile, **others):
    operand, runs = packed.operand(path), packed.runs(path)
    x, geometry = pad_channels(x, packed.channels), as_computed(geometry)
    return run(emulated_library(), x, operand, geometry, tile, column_runs=runs, **others)


def bitmap(x, packed, geometry, path, tile, **others):
    x, geometry = pad_channels(x, packed.channels), as_computed(geometry)
    return run_bitmap(x, packed.operand(path), geometry, tile, **others)


def hopper(x, packed, geometry, path, tile, **others):
    """``eager``: bulk copies arrive at once, not when they are waited for."""
    return run(emulated_hopper(), x, packed.operand(path), geometry, tile, **others)


def direct(x, packed, geometry, path, tile, **others):
    """``wide``: whether neighbouring channels are read and written together where they may be."""
    weight = (packed.path_values(path), packed.codes, packed.segments)
    return run_direct(x, *weight, geometry, packed.slab_channels, packed.segment_range(path), tile, **others)


BITMAP_CASES = {name: case for name, case in TWO_FOUR_CASES.items() if "groups" not in case[2]}
HALVES = (torch.float16, torch.bfloat16)
KERNELS = {
    "2:4": Kernel(two_four, TwoFourWeight, HALVES, two_four_ops.TILES, TWO_FOUR_CASES),
    "2:4 on Hopper": Kernel(hopper, TwoFourWeight, HALVES, two_four_ops.WGMMA_TILES, HOPPER_CASES),
    "bitmap": Kernel(bitmap, BitmapWeight, HALVES, bitmap_ops.TILES, BITMAP_CASES),
    "direct": Kernel(direct, UnstructuredWeight, (torch.float32,), direct_ops.TILES, DIRECT_CASES),
}


def check_epilogue(kernel, tile, dtype, channels, **arguments):
    """All that may follow the convolution, and a second result."""
    packed, geometry = layer(kernel.packing, (channels, 32, 3, 3), dtype=dtype, padding=1)
    x, residual = integers(2, 32, 5, 5, dtype=dtype), integers(2, channels, 5, 5, largest=9, dtype=dtype)
    scale, bias, second_scale, second_bias = integers(4, channels, largest=4)
    y, second = kernel.run(
        x, packed, geometry, "clean", tile, scale=scale, bias=bias, residual=residual, relu=True,
        affine=(second_scale, second_bias, True), **arguments,
    )  # fmt: skip
    expected = reference(x, packed, geometry, "clean", scale, bias, residual, relu=True)
    assert torch.equal(y, expected.to(dtype))
    after = (expected * second_scale[:, None, None] + second_bias[:, None, None]).relu()
    assert torch.equal(second, after.to(dtype))
