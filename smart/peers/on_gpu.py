"""Dense networks as fast as NVIDIA GPUs run them: what sparse kernels have to beat there."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import smart_kernels
from smart.peers.ready import Ready


def lacks() -> str | None:
    """Why there is no GPU for them."""
    return None if torch.cuda.is_available() else "it needs an NVIDIA GPU, and torch sees none"


def cudnn(net: nn.Module, example: Tensor) -> Ready:
    """A CUDA graph of cuDNN with bias, residual and ReLU fused, algorithms measured, norms folded, channels_last."""
    dense = smart_kernels.swap(net, example, backend="dense").capture(example)
    return Ready(dense, "CUDA graph", net=dense)


def max_autotune(net: nn.Module, example: Tensor) -> Ready:
    """torch.compile with all its choices measured and a CUDA graph, of the fused network in channels_last."""
    part = fuse(copy.deepcopy(net)).to(memory_format=torch.channels_last)
    run = torch.compile(part, mode="max-autotune", dynamic=False)
    return Ready(lambda x: run(x.contiguous(memory_format=torch.channels_last)), "CUDA graph", counted=False)
