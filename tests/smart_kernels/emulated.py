"""The kernels' own source on tensor cores, compiled with g++ for an emulated GPU: see tests/cpp/emulated_gpu.h."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from smart_kernels import bitmap_ops
from smart_kernels.two_four_ops import TILES, WGMMA_TILES

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
FLAGS = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-psabi", "-Werror"]
POINTERS = "x scale bias residual order first y second_scale second_bias second partial"
NUMBERS = (
    "batch height width channels out_channels out_height out_width pixels kernel_w stride_h stride_w pad_top pad_left "
    "dilation_h dilation_w columns steps blocks slabs first_slab splits"
)


def fields(names: str, kind: type) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class ImplicitGemm(ctypes.Structure):
    """``smart::cuda::ImplicitGemm`` of csrc/cuda/implicit_gemm.h."""

    _fields_ = (
        *fields(POINTERS, ctypes.c_void_p),
        *fields(NUMBERS, ctypes.c_int),
        *fields("relu second_relu", ctypes.c_bool),
    )


class TwoFour(ImplicitGemm):
    """``smart::cuda::TwoFour`` of csrc/cuda/two_four.h."""

    _fields_ = (
        *fields("values extra_values metadata extra_metadata extra_columns extra_starts column_runs", ctypes.c_void_p),
        ("run_slabs", ctypes.c_int),
    )


class Bitmap(ImplicitGemm):
    """``smart::cuda::Bitmap`` of csrc/cuda/bitmap.h."""

    _fields_ = (*fields("values bits starts", ctypes.c_void_p), ("largest", ctypes.c_int))


def compiled(name: str) -> ctypes.CDLL:
    """A kernel of tests/cpp for the emulated GPU; needs g++."""
    source = ROOT / "tests" / "cpp" / f"{name}.cpp"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.so"
        subprocess.run(["g++", *FLAGS, f"-I{ROOT / 'csrc'}", str(source), "-o", str(file)], check=True)
        return ctypes.CDLL(str(file))


@functools.cache
def emulated_library() -> ctypes.CDLL:
    """The 2:4 kernel for all GPUs, built once."""
    library = compiled("two_four")
    library.widen.restype, library.widen.argtypes = ctypes.c_float, (ctypes.c_uint16, ctypes.c_bool)
    library.narrow.restype, library.narrow.argtypes = ctypes.c_uint16, (ctypes.c_float, ctypes.c_bool)
    library.two_four.argtypes = (ctypes.POINTER(TwoFour), ctypes.c_bool, ctypes.c_int, ctypes.c_bool)
    library.choose_splits.argtypes = (ctypes.c_int64, ctypes.c_int, ctypes.c_int)
    assert library.two_four_bytes() == ctypes.sizeof(TwoFour)
    return library


@functools.cache
def emulated_hopper() -> ctypes.CDLL:
    """The 2:4 kernel for Hopper, built once."""
    library = compiled("wgmma")
    library.takes.restype, library.takes.argtypes = ctypes.c_bool, (ctypes.POINTER(TwoFour),)
    library.wgmma.argtypes = (ctypes.POINTER(TwoFour), *[ctypes.c_bool] * 4)
    assert library.two_four_bytes() == ctypes.sizeof(TwoFour)
    return library


@functools.cache
def emulated_bitmap() -> ctypes.CDLL:
    """The bitmap kernel, built once."""
    library = compiled("bitmap")
    library.bitmap.argtypes = (ctypes.POINTER(Bitmap), ctypes.c_bool, ctypes.c_int, ctypes.c_bool)
    assert library.bitmap_bytes() == ctypes.sizeof(Bitmap)
    return library


def run(library, x, operand, geometry, tile, *, backwards=False, eager=False, **others):
    """What the 2:4 operator does on a GPU, to a path's :class:`smart_kernels.packing.two_four.Operand`.

    Args:
        library: of :func:`emulated_library`, or of :func:`emulated_hopper` for ``WGMMA_TILES``.
        backwards: threads run in the other order.
        eager: Hopper's bulk copies arrive at once, not when they are waited for.
        others: what :func:`problem_of` takes.

    Returns:
        (N, K, P, Q) in channels_last; with ``affine``, scale, bias and relu of the second result, both.
    """
    problem, results, held = problem_of(x, operand, geometry, **others)
    brain = x.dtype == torch.bfloat16
    if tile in WGMMA_TILES:
        library.wgmma(ctypes.byref(problem), brain, tile == WGMMA_TILES[0], backwards, eager)
    else:
        library.two_four(ctypes.byref(problem), brain, TILES.index(tile), backwards)
    del held
    return results[0] if len(results) == 1 else tuple(results)


def run_bitmap(x, operand, geometry, tile, *, backwards=False, **epilogue):
    """As :func:`run`, of the bitmap operator and a :class:`smart_kernels.packing.bitmap.Operand`."""
    problem, results, held = gemm_of(Bitmap, x, operand.first_slab, geometry, **epilogue)
    set_fields(problem, Bitmap, [operand.values, operand.bits, operand.starts, operand.largest])
    tile = bitmap_ops.TILES.index(tile)
    emulated_bitmap().bitmap(ctypes.byref(problem), x.dtype == torch.bfloat16, tile, backwards)
    del held
    return results[0] if len(results) == 1 else tuple(results)


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


def set_fields(problem, struct, values):
    """Sets the fields that a struct adds to its base: numbers, and the addresses of tensors."""
    for (name, _), value in zip(struct._fields_, values, strict=True):
        setattr(problem, name, value if isinstance(value, int) else address(value))


def problem_of(x, operand, geometry, *, column_runs=None, **epilogue):
    """What a launch of the 2:4 kernels is told; see :func:`gemm_of`."""
    columns, run_slabs = None, 0
    if column_runs is not None:
        columns, run_slabs = column_runs.shape[2] * 16, -(-geometry.weight_shape[0] // 32 // column_runs.shape[1])
    problem, results, held = gemm_of(TwoFour, x, operand.first_slab, geometry, columns, **epilogue)
    tensors = [
        operand.values, operand.extra_values, operand.metadata, operand.extra_metadata, operand.extra_columns,
        operand.extra_starts, column_runs, run_slabs,
    ]  # fmt: skip
    set_fields(problem, TwoFour, tensors)
    return problem, results, held


def gemm_of(struct, x, first_slab, geometry, columns=None, *, scale=None, bias=None, residual=None, relu=False,
            order=None, first=None, affine=None, splits=1):  # fmt: skip
    """What a launch is told of all but the weight, the tensors it writes, and those it reads, to be kept alive."""
    n, k, p, q = geometry.output_shape(x.shape)
    if columns is None:
        columns = x.shape[1] * geometry.weight_shape[2] * geometry.weight_shape[3]
    x = x.contiguous(memory_format=torch.channels_last)
    results = [
        torch.full((n, k, p, q), float("nan"), dtype=x.dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(1 if affine is None else 2)
    ]
    partial = torch.full((splits, n, p, q, -(-k // 8) * 8), float("nan")) if splits > 1 else None
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    second_scale, second_bias, second_relu = affine or (None, None, False)
    tensors = [
        x, scale, bias, residual, order, first, results[0], second_scale, second_bias,
        None if affine is None else results[1], partial,
    ]  # fmt: skip
    numbers = [
        n, *x.shape[2:], x.shape[1], k, p, q, n * p * q, geometry.weight_shape[3], *geometry.stride,
        geometry.padding[0], geometry.padding[2], *geometry.dilation, columns, -(-columns // 32), -(-columns // 128),
        -(-k // 32), first_slab, splits,
    ]  # fmt: skip
    problem = struct(*map(address, tensors), *numbers, relu, second_relu)
    return problem, results, tensors
