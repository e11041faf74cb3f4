"""Swapped networks that run as programs, whatever was measured."""

import torch
from networks import TwoPaths

from smart_kernels import native, swap
from smart_kernels.programs import Program

# Images that the machine's fastest kernels interleave: floats a vector.
LANES = {"avx512": 16, "avx2": 8}.get(next(iter(native.cpu_isas()), ""), 4)


def example(network, batch):
    return torch.rand(batch, 1 if network is TwoPaths else 2, 14, 17)


def forced(model, x, dtype=None):
    """The network swapped, with programs whatever was measured."""
    sparse = swap(model, x, backend="cpu", measure=False, dtype=dtype)
    sparse.runs_programs = True
    return sparse


def programs_of(sparse, x):
    return [module for module in sparse._graph_for(sparse.net, x).modules() if isinstance(module, Program)]
