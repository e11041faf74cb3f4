"""The 2:4 kernel's own source, compiled with g++ for an emulated GPU: see tests/cpp/emulated_gpu.h."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-psabi", "-Werror"]
POINTERS = (
    "x values extra_values metadata extra_metadata extra_columns extra_starts scale bias residual y second_scale "
    "second_bias second"
)
NUMBERS = (
    "batch height width channels out_channels out_height out_width pixels kernel_w stride_h stride_w pad_top pad_left "
    "dilation_h dilation_w columns steps blocks slabs first_slab"
)
TILES = ("large", "flat", "small", "narrow")


class TwoFour(ctypes.Structure):
    """``smart::cuda::TwoFour`` of csrc/cuda/two_four.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS.split()),
        *((name, ctypes.c_int) for name in NUMBERS.split()),
        ("relu", ctypes.c_bool),
        ("second_relu", ctypes.c_bool),
    )


def compile_library(folder: Path) -> ctypes.CDLL:
    """Builds and loads it; needs a C++ compiler."""
    file = folder / "two_four.so"
    source = ROOT / "tests" / "cpp" / "two_four.cpp"
    subprocess.run([shutil.which("g++"), *FLAGS, f"-I{ROOT / 'csrc'}", str(source), "-o", str(file)], check=True)
    library = ctypes.CDLL(str(file))
    library.widen.restype, library.widen.argtypes = ctypes.c_float, (ctypes.c_uint16, ctypes.c_bool)
    library.narrow.restype, library.narrow.argtypes = ctypes.c_uint16, (ctypes.c_float, ctypes.c_bool)
    library.two_four.argtypes = (ctypes.POINTER(TwoFour), ctypes.c_bool, ctypes.c_int, ctypes.c_bool)
    assert library.two_four_bytes() == ctypes.sizeof(TwoFour)
    return library


def run(library, x, packed, geometry, path, tile, *, scale=None, bias=None, residual=None, relu=False, affine=None,
        backwards=False):  # fmt: skip
    """What the operator does on a GPU: (N, K, P, Q) in channels_last, with ``affine`` the second result beside it."""
    operand = packed.operand(path)
    n, k, p, q = geometry.output_shape(x.shape)
    x = x.contiguous(memory_format=torch.channels_last)
    results = [
        torch.full((n, k, p, q), float("nan"), dtype=x.dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(1 if affine is None else 2)
    ]
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    second_scale, second_bias, second_relu = affine or (None, None, False)
    tensors = [
        x, operand.values, operand.extra_values, operand.metadata, operand.extra_metadata, operand.extra_columns,
        operand.extra_starts, scale, bias, residual, results[0], second_scale, second_bias,
        None if affine is None else results[1],
    ]  # fmt: skip
    numbers = [
        n, *x.shape[2:], x.shape[1], k, p, q, n * p * q, geometry.weight_shape[3], *geometry.stride,
        geometry.padding[0], geometry.padding[2], *geometry.dilation, packed.columns, packed.steps, packed.blocks,
        packed.slabs, operand.first_slab,
    ]  # fmt: skip
    pointers = [None if each is None else each.data_ptr() for each in tensors]
    problem = TwoFour(*pointers, *numbers, relu, second_relu)
    library.two_four(ctypes.byref(problem), x.dtype == torch.bfloat16, TILES.index(tile), backwards)
    return results[0] if affine is None else tuple(results)
