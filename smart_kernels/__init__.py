"""Convolutions that skip the zeros of sparse weights, one or two expert paths over shared values."""

from smart_kernels.export import export
from smart_kernels.exported import Exported, load_exported
from smart_kernels.io import FileError, load, save
from smart_kernels.model import SparseModel
from smart_kernels.ops import sparse_conv2d
from smart_kernels.packing import PackedWeight, pack
from smart_kernels.planner import DenseFallbackError
from smart_kernels.swap import swap
from smart_kernels.timings import Timings
from smart_kernels.twin import DenseTwin, dense_twin
from smart_kernels.verify import VerificationError, verify

__version__ = "0.1.0"

__all__ = [
    "DenseFallbackError",
    "DenseTwin",
    "Exported",
    "FileError",
    "PackedWeight",
    "SparseModel",
    "Timings",
    "VerificationError",
    "dense_twin",
    "export",
    "load",
    "load_exported",
    "pack",
    "save",
    "sparse_conv2d",
    "swap",
    "verify",
]
