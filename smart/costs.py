"""What masks leave of a network: counts of non-zero weights and of multiplications."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smart.layers import SmartConv2d
from smart.modes import eval_mode
from smart_kernels.paths import PATHS, Path, at_stage


def nonzeros(model: nn.Module) -> dict[str, int]:
    """Counts of convolution weights: ``dense`` (all), ``union``, ``clean`` and ``adv`` (alive in the masks).

    A convolution without masks counts as full in each.
    """
    counts = dict.fromkeys(("dense", "union", *PATHS), 0)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            for key, alive in _alive(layer).items():
                counts[key] += alive
    return counts


def macs(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """Multiply-accumulates of one image through convolutions and linear layers.

    Args:
        input_shape: (C, H, W).

    Returns:
        ``dense``, ``clean`` and ``adv``; and ``union``, the cost of a lambda strictly between 0 and 1.

    Raises:
        ValueError: ``input_shape`` is not three sizes.
    """
    counts = dict.fromkeys(("dense", "union", *PATHS), 0)
    for layer, uses in _uses(model, input_shape):
        for key, alive in _alive(layer).items():
            counts[key] += alive * uses
    return counts


def macs_at(model: nn.Module, input_shape: Sequence[int], path: Path) -> int:
    """Multiply-accumulates of one image on one path of any kind: a name, a lambda, or a path for each stage.

    Args, errors as for :func:`macs`.
    """
    return sum(alive_at(layer, path) * uses for layer, uses in _uses(model, input_shape))


def _uses(model: nn.Module, input_shape: Sequence[int]) -> list[tuple[nn.Conv2d | nn.Linear, int]]:
    """Each convolution and linear layer, as often as it is called, and how often one image uses each of its weights."""
    if isinstance(input_shape, Tensor) or len(input_shape) != 3:
        given = "a tensor" if isinstance(input_shape, Tensor) else tuple(input_shape)
        raise ValueError(f"input_shape is {given}: give the sizes (C, H, W) of one image")
    calls: list[tuple[nn.Conv2d | nn.Linear, int]] = []

    def note(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        # A weight of a convolution is used once per output pixel, one of a linear layer once per row.
        uses = output[0, 0].numel() if isinstance(layer, nn.Conv2d) else output[0].numel() // output.shape[-1]
        calls.append((layer, uses))

    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    parameter = next(model.parameters())
    try:
        with eval_mode(model), torch.no_grad():
            model(torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def alive_at(layer: nn.Conv2d | nn.Linear, path: Path) -> int:
    """Weights of a layer that live on a resolved path; strictly between the ends of the dial those of the union."""
    if not isinstance(layer, SmartConv2d):
        return layer.weight.numel()
    own = at_stage(path, layer.stage)
    return int((layer.masks[own] if isinstance(own, str) else layer.union()).count_nonzero())


def _alive(layer: nn.Conv2d | nn.Linear) -> dict[str, int]:
    full = layer.weight.numel()
    if not isinstance(layer, SmartConv2d):
        return dict.fromkeys(("dense", "union", *PATHS), full)
    masks = {"union": layer.union(), **layer.masks}
    return {"dense": full, **{key: int(mask.count_nonzero()) for key, mask in masks.items()}}
