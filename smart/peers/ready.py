"""What every peer makes of a network: a call that runs it, in the fastest of the ways the peer has."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smart_kernels.timing import percentile

Call = Callable[[Tensor], Tensor]
NEAR = 1.5  # times the shortest time: a call can be that much slower by chance


@dataclass(frozen=True)
class Ready:
    """A network made ready to run.

    Attributes:
        call: (N, C, H, W) of the example's shape -> the output, which may be overwritten by the next call.
        mode: how it runs, where there was a choice.
        net: what runs, if its copies do so without a CUDA graph: a graph's memory no allocator counts call by call.
        counted: whether the allocator counts the memory of ``call`` itself.
    """

    call: Call
    mode: str = ""
    net: nn.Module | None = None
    counted: bool = True


def fastest(choices: Mapping[str, Call], example: Tensor, budget_s: float = 0.5) -> Ready:
    """Of several ways to run one network, that with the smallest median of a short measurement in turns.

    Each runs once untimed and once timed; only those near the fastest go on, as large batches take seconds a call.

    Args:
        choices: mode -> call.
        budget_s: seconds after which those that are left run no more.
    """
    with torch.inference_mode():
        for call in choices.values():
            call(example)
        seconds = {mode: [_seconds(call, example)] for mode, call in choices.items()}
        near = [mode for mode in choices if seconds[mode][0] < NEAR * min(seconds.values())[0]]
        begin = time.perf_counter()
        while len(near) > 1 and time.perf_counter() - begin < budget_s:
            for mode in near:
                seconds[mode].append(_seconds(choices[mode], example))
    mode = min(near, key=lambda mode: percentile(seconds[mode], 50))
    return Ready(choices[mode], mode)


def _seconds(call: Call, example: Tensor) -> float:
    start = time.perf_counter()
    call(example)
    if example.is_cuda:
        torch.cuda.synchronize(example.device)
    return time.perf_counter() - start
