"""The operators of the GPU kernels on CPU tensors: emulated GPUs answer in the place of a real one."""

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from emulated import emulated_hopper, emulated_library, run, run_bitmap
from emulated_direct import run_direct

from smart_kernels import bitmap_ops, direct_ops, native, two_four_ops
from smart_kernels.backends.gpu import GpuBackend
from smart_kernels.backends.wgmma import WgmmaBackend
from smart_kernels.geometry import Geometry
from smart_kernels.packing import bitmap
from smart_kernels.packing.two_four import Operand

# Both are there or neither: one library has them.
needs_operators = pytest.mark.skipif(two_four_ops.missing() is not None, reason=str(two_four_ops.missing()))


@pytest.fixture
def tiles_run() -> Iterator[list[str]]:
    """Operators answer on the CPU; gives the names of the tiles that ran."""
    if (why := native.missing()) or shutil.which("g++") is None:
        pytest.skip(why or "g++ is not installed")
    names = []

    def two_four(x, geometry, tile=-1, splits=0, **others):
        operand = Operand(*(others.pop(name) for name in Operand._fields))
        names.append(chosen(geometry, **others) if tile < 0 else (two_four_ops.TILES + two_four_ops.WGMMA_TILES)[tile])
        library = emulated_hopper() if names[-1] in two_four_ops.WGMMA_TILES else emulated_library()
        return run(library, x, operand, Geometry.of_numbers(geometry), names[-1], splits=splits or 1, **others)

    def of_bitmap(x, geometry, tile=-1, splits=0, **others):
        operand = bitmap.Operand(*(others.pop(name) for name in bitmap.Operand._fields))
        names.append("small" if tile < 0 else bitmap_ops.TILES[tile])
        return run_bitmap(x, operand, Geometry.of_numbers(geometry), names[-1], splits=splits or 1, **others)

    def direct(x, values, codes, segments, geometry, slab_channels, first_segment, last_segment, tile=-1, **others):
        names.append("small" if tile < 0 else direct_ops.TILES[tile])
        geometry, segment_range = Geometry.of_numbers(geometry), (first_segment, last_segment)
        return run_direct(x, values, codes, segments, geometry, slab_channels, segment_range, names[-1], **others)

    library = torch.library.Library("smart_kernels", "IMPL", "CPU")
    answer(library, "two_four", two_four)
    answer(library, "bitmap", of_bitmap)
    answer(library, "direct", direct)
    yield names
    library._destroy()


def chosen(geometry, column_runs=None, **_):
    """A tile that the operator could have chosen: as tall as what leaves out runs of columns together, or less."""
    return "narrow" if column_runs is not None and column_runs.shape[1] == -(-geometry[0] // 32) else "small"


def answer(library: torch.library.Library, kernel: str, convolve: Callable) -> None:
    """Both operators of a kernel call ``convolve`` with their arguments by name, those of an affine as one."""
    for operator in (f"sparse_conv2d_{kernel}", f"sparse_conv2d_affine_{kernel}"):
        schema = getattr(torch.ops.smart_kernels, operator).default._schema
        names = [argument.name for argument in schema.arguments]

        def call(*values, names=names):
            arguments = dict(zip(names, values, strict=False))
            affine = [arguments.pop(name) for name in names if name.startswith("affine_")]
            return convolve(**arguments, affine=affine or None)

        library.impl(operator, call)


@pytest.fixture
def on_any_device(monkeypatch):
    """The GPU backends support on any device what their kernels compute."""
    for backend in (GpuBackend, WgmmaBackend):
        monkeypatch.setattr(backend, "supports", lambda self, geometry, dtype, device: self.computes(geometry, dtype))
