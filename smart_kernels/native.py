"""The compiled library: loaded once, on import, and if it cannot be, the reason is kept for whoever asks."""

from __future__ import annotations

import ctypes
import warnings
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_C.abi3.so")
# Of its CPU part, which every build has.
OPERATORS = ("cpu_isas", "cpu_cycles", "sparse_conv2d_cpu", "sparse_conv2d_affine_cpu", "program_create", "program_run")


def _load() -> str | None:
    if not LIBRARY.exists():
        return (
            "the compiled library was not built: install a C++ compiler, "
            "then run `pip install --no-build-isolation -e .` again"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the compiled library {LIBRARY.name} does not load: {error}"
    lacking = [name for name in OPERATORS if not hasattr(torch.ops.smart_kernels, name)]
    if lacking:
        why = (
            f"the compiled library {LIBRARY.name} is older than the package, it lacks {lacking[0]}: "
            "run `pip install --no-build-isolation -e .` again"
        )
        warnings.warn(f"{why}; until then everything runs densely", RuntimeWarning, stacklevel=2)
        return why
    return None


_missing = _load()


def missing() -> str | None:
    """Why there is no compiled library, in one sentence; None if there is."""
    return _missing


def free_program(number: int) -> None:
    """Frees a program of the CPU kernels, unless that was done before."""
    ctypes.CDLL(str(LIBRARY)).smart_kernels_free_program(ctypes.c_int64(number))


def cpu_isas() -> list[str]:
    """Instruction sets of the library that this machine runs, fastest first; empty without the library."""
    return [] if _missing else torch.ops.smart_kernels.cpu_isas().split()


def cuda_missing() -> str | None:
    """Why the library runs nothing on a GPU here, in one sentence; None if it can."""
    return gpu_operator_missing("cuda_missing") or torch.ops.smart_kernels.cuda_missing() or None


def gpu_operator_missing(name: str) -> str | None:
    """Why the library lacks an operator of its CUDA part, in one sentence; None if it has it."""
    if _missing is None and not hasattr(torch.ops.smart_kernels, name):
        return "the library was built without CUDA: install nvcc 12 or later, and build again with SMART_BUILD_CUDA=1"
    return _missing
