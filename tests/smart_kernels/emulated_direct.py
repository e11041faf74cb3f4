"""The direct kernel's own source, compiled with g++ for an emulated GPU: see tests/cpp/emulated_gpu.h."""

import ctypes
import functools

import torch
from emulated import compiled

from smart_kernels.direct_ops import TILES

POINTERS = "x values codes segments scale bias residual order first y second_scale second_bias second"
NUMBERS = (
    "batch height width channels out_channels out_height out_width pixels kernel_w stride_h stride_w pad_top pad_left "
    "dilation_h dilation_w taps groups group_channels group_outputs slabs slab_channels first_segment last_segment"
)
TRUTHS = "relu second_relu quads wide_output"


class Direct(ctypes.Structure):
    """``smart::cuda::Direct`` of csrc/cuda/direct.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS.split()),
        *((name, ctypes.c_int) for name in NUMBERS.split()),
        *((name, ctypes.c_bool) for name in TRUTHS.split()),
    )


@functools.cache
def emulated_direct() -> ctypes.CDLL:
    """Builds and loads it, once; needs g++."""
    library = compiled("direct")
    library.direct.argtypes = (ctypes.POINTER(Direct), ctypes.c_int, ctypes.c_bool)
    assert library.direct_bytes() == ctypes.sizeof(Direct)
    return library


def run_direct(x, values, codes, segments, geometry, slab_channels, segment_range, tile, *, scale=None, bias=None,
               residual=None, relu=False, order=None, first=None, affine=None, backwards=False, wide=True):  # fmt: skip
    """What the operator does on a GPU.

    Args:
        wide: whether neighbouring channels are read and written together where they may be.

    Returns:
        (N, K, P, Q) in channels_last; with ``affine``, scale, bias and relu of the second result, both.
    """
    n, k, p, q = geometry.output_shape(x.shape)
    _, of_group, r, s = geometry.weight_shape
    x = x.contiguous(memory_format=torch.channels_last)
    results = [
        torch.full((n, k, p, q), float("nan")).contiguous(memory_format=torch.channels_last)
        for _ in range(1 if affine is None else 2)
    ]
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    second_scale, second_bias, second_relu = affine or (None, None, False)
    tensors = [
        x, values, codes, segments, scale, bias, residual, order, first, results[0], second_scale, second_bias,
        None if affine is None else results[1],
    ]  # fmt: skip
    outputs = k // geometry.groups
    numbers = [
        n, *x.shape[2:], x.shape[1], k, p, q, n * p * q, s, *geometry.stride, geometry.padding[0], geometry.padding[2],
        *geometry.dilation, r * s, geometry.groups, of_group, outputs, -(-of_group // slab_channels), slab_channels,
        *segment_range,
    ]  # fmt: skip
    truths = [relu, second_relu, wide and of_group % 4 == slab_channels % 4 == 0, wide and outputs % 4 == 0]
    problem = Direct(*(None if each is None else each.data_ptr() for each in tensors), *numbers, *truths)
    emulated_direct().direct(ctypes.byref(problem), TILES.index(tile), backwards)
    return results[0] if affine is None else tuple(results)
