"""What networks take of a GPU's memory, by its allocator's own counts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[nn.Module, Tensor], Any]


def measure(net: nn.Module, calls: Sequence[Call], x: Tensor) -> tuple[int, int]:
    """Bytes that a copy of a network holds once it ran, and the most that it takes while it runs.

    What layers keep ready from call to call counts, on all paths that are called; the batch itself does not.

    Args:
        calls: run the network on a batch, each on one path.
        x: (N, C, H, W), on a GPU.
    """
    device = x.device
    with torch.inference_mode():
        for call in calls:
            call(net, x[:1])  # libraries take memory once, which is no network's
        before = _allocated(device)
        other = copy.deepcopy(net)
        for call in calls:
            call(other, x[:1])
        held = _allocated(device) - before
        torch.cuda.reset_peak_memory_stats(device)
        for call in calls:
            call(other, x)
        torch.cuda.synchronize(device)
        return held, torch.cuda.max_memory_allocated(device) - before


def peak(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call takes at most, beside what is allocated before it."""
    before = _allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _allocated(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)
