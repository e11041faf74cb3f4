"""Dense competitors: each makes, of a network and an example, the fastest call it knows for that network."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

Call = Callable[[Tensor], Tensor]


def eager(net: nn.Module, example: Tensor) -> Call:
    """PyTorch as written: convolution, batch norm, ReLU, one by one."""
    return net


def fused(net: nn.Module, example: Tensor) -> Call:
    """Eager PyTorch with batch norms folded into the convolutions where one follows the other."""
    return fuse(copy.deepcopy(net))


def compiled(net: nn.Module, example: Tensor) -> Call:
    """torch.compile of the fused network; it compiles for the example's shape on the first call."""
    return torch.compile(fuse(copy.deepcopy(net)), dynamic=False)


PEERS: dict[str, Callable[[nn.Module, Tensor], Call]] = {"eager": eager, "fused": fused, "compile": compiled}
