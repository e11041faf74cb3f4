"""PyTorch's own ways to run a dense network, each in the memory layout that is faster for the network and batch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from smart.peers.ready import Call, Ready, fastest

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def eager(net: nn.Module, example: Tensor) -> Ready:
    """PyTorch as written: convolution, batch norm, ReLU, one by one."""
    return _in_faster_layout(net, example)


def fused(net: nn.Module, example: Tensor) -> Ready:
    """Eager PyTorch with batch norms folded into the convolutions where one follows the other."""
    return _in_faster_layout(fuse(copy.deepcopy(net)), example)


def compiled(net: nn.Module, example: Tensor) -> Ready:
    """torch.compile of the fused network, for the example's shape only."""
    return _in_faster_layout(fuse(copy.deepcopy(net)), example, lambda part: torch.compile(part, dynamic=False))


def _in_faster_layout(net: nn.Module, example: Tensor, make: Callable[[nn.Module], Call] = lambda part: part) -> Ready:
    calls = {name: _in_layout(net, layout, make) for name, layout in LAYOUTS.items()}
    return fastest(calls, example)


def _in_layout(net: nn.Module, layout: torch.memory_format, make: Callable[[nn.Module], Call]) -> Call:
    run = make(copy.deepcopy(net).to(memory_format=layout))
    # Converting the images belongs to the price of the layout.
    return lambda x: run(x.contiguous(memory_format=layout))
