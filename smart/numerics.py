"""How a run computes: precision, the layout of images in memory, and whether twice the same means the same numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

AMP = ("off", "bf16")


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """The context in which convolutions and matrix products run in the precision ``amp``, a word of ``AMP``.

    Weights, norms' statistics, losses and the optimizer stay in float32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


@contextmanager
def memory_format(model: nn.Module, channels_last: bool) -> Iterator[torch.memory_format]:
    """Puts weights and masks into the order in which channels come last, if so told, and at the end puts them back.

    Gives the format that images should have. Values are the same in either.
    """
    if not channels_last:
        yield torch.contiguous_format
        return
    model.to(memory_format=torch.channels_last)
    try:
        yield torch.channels_last
    finally:
        model.to(memory_format=torch.contiguous_format)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Lets torch run only operations that give the same numbers each time, if so told, until the block ends.

    On a GPU this can cost much of the speed; where an operation has no such implementation torch raises RuntimeError.
    cuDNN chooses its algorithms without timing them. cuBLAS reads its setting when it is first used: a program that has
    used it before should set CUBLAS_WORKSPACE_CONFIG to :4096:8 itself.
    """
    if not wanted:
        yield
        return
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = flags
