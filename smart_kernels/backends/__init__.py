"""Backends: one file a way to run a packed convolution."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from smart_kernels.backends.base import Affine, Backend, Run, SampleRun, Verdict
from smart_kernels.backends.bitmap import BitmapBackend
from smart_kernels.backends.channels import ChannelsBackend
from smart_kernels.backends.cpu import CpuBackend
from smart_kernels.backends.cuda import CudaBackend
from smart_kernels.backends.dense import DenseBackend
from smart_kernels.backends.direct import DirectBackend
from smart_kernels.backends.triton import TritonBackend
from smart_kernels.backends.wgmma import WgmmaBackend
from smart_kernels.geometry import Geometry

# In the order of preference where nothing was measured; dense, which runs everything, is last.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        ChannelsBackend(),
        TritonBackend(),
        CudaBackend(),
        WgmmaBackend(),
        BitmapBackend(),
        DirectBackend(),
        CpuBackend(),
        DenseBackend(),
    )
}

__all__ = ["BACKENDS", "Affine", "Backend", "Run", "SampleRun", "Verdict", "find", "of_format", "runnable"]


def find(name: str) -> Backend:
    """The backend of this name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: accepted are {', '.join(map(repr, BACKENDS))}")
    return BACKENDS[name]


def of_format(format: str) -> list[Backend]:
    """The backends that read one packed format, in their order of preference."""
    return [backend for backend in BACKENDS.values() if backend.format == format]


def runnable(
    name: str, geometry: Geometry, masks: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> Backend | None:
    """The backend of this name, or the first other that runs a convolution on a device from the same packed weight.

    Plans are made on one machine and followed on another, which may lack what they were made for.

    Returns:
        The backend; None if none of its packed format runs the convolution there.

    Raises:
        ValueError: there is no backend of this name.
    """
    planned = find(name)
    if planned.supports(geometry, dtype, device):
        return planned
    others = (each for each in of_format(planned.format) if each.supports(geometry, dtype, device))
    return next((each for each in others if each.suits(masks)), None)
