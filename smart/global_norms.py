"""Batch norms that norm by the whole batch where several processes train on shares of it.

So one process and several with the same batch compute the same, up to rounding; and running statistics, of each path
its own, are the same in all processes. torch's own, SyncBatchNorm, does not run on CPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def global_norms(model: nn.Module) -> Iterator[None]:
    """Until the block ends, all batch norms of ``model`` norm by the batches of all processes, where they train.

    Every process must run the same layers in the same order, on as many images.
    """
    norms = {module for module in model.modules() if type(module) is nn.BatchNorm2d}
    for norm in norms:
        norm.__class__ = _GlobalBatchNorm2d
    try:
        yield
    finally:
        for norm in norms:
            norm.__class__ = nn.BatchNorm2d


class _GlobalBatchNorm2d(nn.BatchNorm2d):
    """The same module with the same parameters and buffers, while several processes train it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, var = _NormByAll.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                factor = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                count = x.numel() // x.shape[1] * dist.get_world_size()
                self.running_mean.lerp_(mean, factor)
                self.running_var.lerp_(var * (count / (count - 1)), factor)
        return y


class _NormByAll(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias over the batches of all processes; returns mean and var, (C,), too.

    The gradients of weight and bias are those of this process's images; the gradient of x takes account of what x does
    to the other processes' outputs.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        values = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        own_var, own_mean = torch.var_mean(values, (0, 2, 3), correction=0)
        gathered = _gather(torch.stack([own_mean, own_var]))
        mean = gathered[:, 0].mean(0)
        # The spread within each process's images, and that between their means.
        var = (gathered[:, 1] + (gathered[:, 0] - mean).square()).mean(0)
        inverse = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.mark_non_differentiable(mean, var)
        y = (values - _by_channel(mean)) * _by_channel(inverse if weight is None else inverse * weight)
        y = y if bias is None else y + _by_channel(bias)
        return y.to(x.dtype), mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, inverse = ctx.saved_tensors
        normed = (x.to(mean.dtype) - _by_channel(mean)) * _by_channel(inverse)
        grad = grad.to(mean.dtype)
        of_bias, of_weight = grad.sum((0, 2, 3)), (grad * normed).sum((0, 2, 3))
        over_all = _gather(torch.stack([of_bias, of_weight])).mean(0) / (x.numel() // x.shape[1])
        of_x = grad - _by_channel(over_all[0]) - normed * _by_channel(over_all[1])
        of_x = of_x * _by_channel(inverse if weight is None else inverse * weight)
        if weight is None:
            return of_x.to(x.dtype), None, None, None
        return of_x.to(x.dtype), of_weight, of_bias, None


def _gather(own: Tensor) -> Tensor:
    """(...) of each process -> (processes, ...)."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.contiguous())
    return torch.stack(parts)


def _by_channel(values: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, 1)."""
    return values[:, None, None]
