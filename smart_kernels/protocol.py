"""How layers of the original network are read: what counts as a convolution or a norm, their masks, their paths.

Beside torch's own layers, any module takes part that follows a protocol:

* ``.masks`` on a convolution or fully connected layer maps path names to bool masks like its ``.weight``. A weight
  without masks drops where it is zero.
* ``.norms`` maps path names to batch norms, between which a lambda mixes; if it does something else,
  ``.mixes = False`` says so, and the module runs as it is.
* ``.reads_path = True`` on a module whose own code reads the path of the call: it runs as it is.
* ``.unswappable`` says in a sentence why a layer cannot be swapped, as one that draws random numbers.

A network may say how many ``.stages`` it has, and each of these modules which ``.stage`` it is in, from 0: then each
stage can run on a path of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from smart_kernels.geometry import Geometry
from smart_kernels.paths import PATHS


def reads_path(module: nn.Module) -> bool:
    """Whether what a module computes depends on the path of the call under way."""
    return hasattr(module, "masks") or hasattr(module, "norms") or getattr(module, "reads_path", False)


def is_conv(module: nn.Module) -> bool:
    """An nn.Conv2d that computes what nn.Conv2d does, or a masked convolution by protocol."""
    if hasattr(module, "masks"):
        return module.weight.dim() == 4
    plain = isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward
    return plain and type(module.weight) in (Tensor, nn.Parameter) and module.weight.is_floating_point()


def is_linear(module: nn.Module) -> bool:
    """A plain nn.Linear, or a masked one by protocol."""
    if hasattr(module, "masks"):
        return module.weight.dim() == 2
    plain = type(module) is nn.Linear and type(module.weight) in (Tensor, nn.Parameter)
    return plain and module.weight.is_floating_point()


def is_norm(module: nn.Module) -> bool:
    """A batch norm that keeps running statistics, or several of them by protocol; without hooks."""
    if is_hooked(module) or not getattr(module, "mixes", True):
        return False
    if hasattr(module, "norms"):
        return all(norm.running_mean is not None for norm in module.norms.values())
    return type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) and module.running_mean is not None


def is_hooked(module: nn.Module) -> bool:
    """Whether something else of the user's runs when the module does."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_zeros(module: nn.Module, paths: tuple[str, ...]) -> bool:
    """Whether some path of a layer drops some weight."""
    return not all(bool(mask.all()) for mask in masks_of(module, paths).values())


def paths_of(model: nn.Module) -> tuple[str, ...]:
    """The path names the model's masks and norms agree on; one path for a network that has neither.

    Raises:
        ValueError: they do not agree, or name no path.
    """
    found = set()
    for name, module in model.named_modules():
        for kind in ("masks", "norms"):
            if hasattr(module, kind):
                found.add(_names(getattr(module, kind), f"{name}.{kind}".removeprefix(".")))
    if len(found) > 1:
        raise ValueError(f"modules of the model disagree on the paths' names: {sorted(found)}; all must have the same")
    return found.pop() if found else PATHS[:1]


def _names(entries: Mapping[str, object], what: str) -> tuple[str, ...]:
    if not isinstance(entries, (Mapping, nn.ModuleDict)) or not len(entries):
        raise ValueError(f"{what} is {entries!r}: a dict is needed, path -> mask or norm; or no such attribute")
    return tuple(entries)


def stage_of(module: nn.Module) -> int:
    """The stage of the network that a layer or norm is in."""
    stage = getattr(module, "stage", 0)
    return stage if isinstance(stage, int) else 0


def stages_of(model: nn.Module) -> int:
    """How many stages a network says that it has; 0 if it has none."""
    stages = getattr(model, "stages", 0)
    return stages if isinstance(stages, int) else 0


def masks_of(module: nn.Module, paths: tuple[str, ...]) -> dict[str, Tensor]:
    """The bool mask of each path, like the layer's weight."""
    if hasattr(module, "masks"):
        return {path: module.masks[path] for path in paths}
    return dict.fromkeys(paths, module.weight.detach() != 0)


def as_conv_weight(tensor: Tensor) -> Tensor:
    """A weight or mask (K, C) of a fully connected layer as (K, C, 1, 1); that of a convolution as it is."""
    return tensor[:, :, None, None] if tensor.dim() == 2 else tensor


def geometry_of(module: nn.Module) -> Geometry:
    """Of a convolution, or of a fully connected layer as the 1x1 convolution it is."""
    return Geometry.of((*module.weight.shape, 1, 1)) if is_linear(module) else Geometry.of_module(module)


def norm_affine(module: nn.Module, paths: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A batch norm in eval mode as scale and bias (C,) of each path: y = x * scale + bias."""
    norms = getattr(module, "norms", None) or {path: module for path in paths}
    scales, biases = {}, {}
    for path in paths:
        norm = norms[path]
        # In float64: the division is done once, so its rounding need not add to the network's.
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.detach().double()
        bias = -norm.running_mean.double() * scale
        if norm.bias is not None:
            bias = bias + norm.bias.detach().double()
        scales[path], biases[path] = scale.to(norm.running_var.dtype), bias.to(norm.running_var.dtype)
    return scales, biases
