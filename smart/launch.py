"""The process group of a command that torchrun started, and the device of each of its processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, until the block ends; gives the device of this one.

    Each takes a GPU of its own, or with ``device`` "cpu" a share of the CPU. A program that torchrun did not start is
    alone, and on ``device``.

    Raises:
        ValueError: more processes than GPUs on this machine, or a device for all of them.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield device
        return
    device = _own(device, int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _own(device: torch.device, place: int) -> torch.device:
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise ValueError(f"device is {device} for every process: leave it out, each takes a GPU of its own")
    found = torch.cuda.device_count()
    if place >= found:
        raise ValueError(
            f"process {place + 1} of this machine finds {found} GPUs: start as many processes as there are, or give "
            "--device cpu"
        )
    return torch.device("cuda", place)
