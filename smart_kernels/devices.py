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


@functools.cache
def cpu_name() -> str:
    """The processor's name as its maker has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
