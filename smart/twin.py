"""The dense twin of one path: the plain network that a sparse one must beat."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from smart.conditioning import FilmNorm, NoisyConv2d, NoisySmartConv2d
from smart.layers import DualBatchNorm2d, SmartConv2d, SmartNet
from smart_kernels.paths import PATHS
from smart_kernels.settle import private_copy, settle


class DenseTwin(nn.Module):
    """One path of a SmartNet as ordinary layers: masks multiplied into the weights once, that path's batch norms.

    It computes what ``model(x, path=path)`` computes in eval mode, without the cost of masking at each call.

    Raises:
        ValueError: ``path`` is no name; a lambda mixes two paths' norms, which no single network of these layers does.
            Or the path has noise in its weights, drawn anew at each call.
    """

    def __init__(self, model: SmartNet, path: str) -> None:
        super().__init__()
        if path not in PATHS:
            raise ValueError(f"path is {path!r}: a dense twin is of a named path, 'clean' or 'adv'")
        noisy = path != PATHS[0] and any(isinstance(m, (NoisyConv2d, NoisySmartConv2d)) for m in model.modules())
        if noisy:
            raise ValueError(
                f"path {path!r} of method {model.method!r} draws noise anew at each call: take 'clean', which has none"
            )
        self.register_buffer("mean", model.mean.clone())
        self.register_buffer("std", model.std.clone())
        self.net = _plain(copy.deepcopy(model.net), path)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> logits (N, classes)."""
        return self.net((x - self.mean) / self.std)


def dense_twin_of(model: nn.Module, path: str) -> nn.Module:
    """The plain network of one path: a :class:`DenseTwin`, or of a network without paths a copy with its zeros.

    What prunes or parametrizes weights before each call is settled in the copy: it would slow the dense network down.
    """
    if isinstance(model, SmartNet):
        return DenseTwin(model, path)
    twin = private_copy(model).eval().requires_grad_(False)
    settle(twin)
    return twin


def _plain(module: nn.Module, path: str) -> nn.Module:
    if isinstance(module, DualBatchNorm2d):
        return module.norms[path]
    if isinstance(module, FilmNorm):
        return module.folded(path)
    if isinstance(module, (SmartConv2d, NoisyConv2d)):
        k, c = module.weight.shape[:2]
        conv = nn.Conv2d(
            c * module.groups,
            k,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.bias is not None,
            module.padding_mode,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
        with torch.no_grad():
            conv.weight.copy_(module.effective_weight(path) if isinstance(module, SmartConv2d) else module.weight)
            if module.bias is not None:
                conv.bias.copy_(module.bias)
        return conv
    for name, child in module.named_children():
        setattr(module, name, _plain(child, path))
    return module
