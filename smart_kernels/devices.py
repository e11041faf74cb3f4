"""What runs the kernels, by name: times measured on one device say nothing of another."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

from smart_kernels import native


def name(device: torch.device) -> str:
    """The processor or GPU, with what else decides on speed: instruction set and threads of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        isa = next(iter(native.cpu_isas()), "no kernels")
        return f"{cpu_name()}, {isa}, {torch.get_num_threads()} threads"
    return str(device)


def usable(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: this machine, or this build of torch, has none.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used here ({reason}): give another, as 'cpu'") from error


@functools.cache
def cpu_name() -> str:
    """The processor's name as its maker has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
