"""Backends: one file a way to run a packed convolution."""

from __future__ import annotations

from smart_kernels.backends.base import Affine, Backend, Run, SampleRun, Verdict
from smart_kernels.backends.channels import ChannelsBackend
from smart_kernels.backends.cpu import CpuBackend
from smart_kernels.backends.cuda import CudaBackend
from smart_kernels.backends.dense import DenseBackend
from smart_kernels.backends.direct import DirectBackend
from smart_kernels.backends.triton import TritonBackend
from smart_kernels.backends.wgmma import WgmmaBackend

# In the order of preference where nothing was measured; dense, which runs everything, is last.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        ChannelsBackend(),
        TritonBackend(),
        CudaBackend(),
        WgmmaBackend(),
        DirectBackend(),
        CpuBackend(),
        DenseBackend(),
    )
}

__all__ = ["BACKENDS", "Affine", "Backend", "Run", "SampleRun", "Verdict", "find"]


def find(name: str) -> Backend:
    """The backend of this name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: accepted are {', '.join(map(repr, BACKENDS))}")
    return BACKENDS[name]
