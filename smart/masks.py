"""Masks at the start of training, and what they leave: counts of non-zeros and multiplications."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from smart.layers import SmartConv2d, eval_mode
from smart_kernels.paths import PATHS

OVERLAPS = ("independent", "disjoint", "shared", "nested")


def check_density(density: float | Mapping[str, float]) -> dict[str, float]:
    """The density of each path, from one number for both or a mapping with both.

    Raises:
        ValueError: a density outside (0, 1], or a mapping with other keys.
    """
    per_path = dict(density) if isinstance(density, Mapping) else dict.fromkeys(PATHS, density)
    if set(per_path) != set(PATHS):
        raise ValueError(
            f"density has the keys {sorted(map(str, per_path))}: give one number, or one each for 'clean' and 'adv'"
        )
    for value in per_path.values():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise ValueError(
                f"density is {value!r}: it must be a number in (0, 1], such as 0.2 to keep a fifth of the weights"
            )
    return {path: float(per_path[path]) for path in PATHS}


def check_overlap(overlap: str | float, density: Mapping[str, float]) -> None:
    """Raises ValueError where ``overlap`` is unknown or cannot be had at these densities."""
    low, high = sorted(density.values())
    least = max(0.0, low + high - 1) / low
    if isinstance(overlap, str):
        if overlap not in OVERLAPS:
            raise ValueError(
                f"unknown overlap {overlap!r}: accepted are {', '.join(OVERLAPS)}, or a fraction in [0, 1]"
            )
        if overlap == "shared" and low != high:
            raise ValueError(f"overlap 'shared' at densities {low} and {high}: one mask has one density, use 'nested'")
        if overlap == "disjoint" and least > 1e-9:
            raise ValueError(
                f"overlap 'disjoint' at densities {low} and {high}: their sum must be at most 1, lower one"
            )
        return
    if isinstance(overlap, bool) or not isinstance(overlap, (int, float)) or not 0 <= overlap <= 1:
        raise ValueError(f"overlap is {overlap!r}: accepted are {', '.join(OVERLAPS)}, or a fraction in [0, 1]")
    if overlap < least - 1e-9:
        raise ValueError(
            f"overlap is {overlap}: at densities {low} and {high} it is at least {least:.3f}, lower a density"
        )


def random_masks(
    shape: Sequence[int], density: Mapping[str, float], overlap: str | float, generator: torch.Generator
) -> dict[str, Tensor]:
    """One random mask per path with exactly max(1, round(density * numel)) ones each.

    Args:
        shape: of the weight, (K, C/groups, R, S).
        density: per path, in (0, 1].
        overlap: as for :func:`smart.convert`; a fraction is met up to rounding to whole weights.
        generator: on the CPU.

    Returns:
        Bool tensors of ``shape`` on the CPU.
    """
    numel = torch.Size(shape).numel()
    clean, adv = (max(1, round(density[path] * numel)) for path in PATHS)
    order = torch.randperm(numel, generator=generator)
    chosen = {"clean": order[:clean]}
    if overlap == "independent":
        chosen["adv"] = torch.randperm(numel, generator=generator)[:adv]
    else:
        # Two windows of one permutation: how far they lap over each other is the size of the intersection.
        fraction = {"disjoint": 0.0, "shared": 1.0, "nested": 1.0}.get(overlap, overlap)
        common = max(round(fraction * min(clean, adv)), clean + adv - numel)
        chosen["adv"] = order[clean - common : clean - common + adv]
    masks = {path: torch.zeros(numel, dtype=torch.bool) for path in PATHS}
    for path, positions in chosen.items():
        masks[path][positions] = True
    return {path: mask.reshape(tuple(shape)) for path, mask in masks.items()}


@torch.no_grad()
def apply_random_masks(
    layers: Iterable[SmartConv2d], density: Mapping[str, float], overlap: str | float, seed: int
) -> None:
    """Gives every layer masks of its own by :func:`random_masks`, and zeroes its weight outside their union."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        for path, mask in random_masks(layer.weight.shape, density, overlap, generator).items():
            layer.set_mask(path, mask)
        layer.weight.mul_(layer.union())


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
    if len(input_shape) != 3:
        raise ValueError(f"input_shape is {tuple(input_shape)}: give the sizes (C, H, W) of one image")
    counts = dict.fromkeys(("dense", "union", *PATHS), 0)

    def count(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        # A weight of a convolution is used once per output pixel, one of a linear layer once per row.
        uses = output[0, 0].numel() if isinstance(layer, nn.Conv2d) else output[0].numel() // output.shape[-1]
        for key, alive in _alive(layer).items():
            counts[key] += alive * uses

    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    parameter = next(model.parameters())
    try:
        with eval_mode(model), torch.no_grad():
            model(torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def _alive(layer: nn.Conv2d | nn.Linear) -> dict[str, int]:
    full = layer.weight.numel()
    if not isinstance(layer, SmartConv2d):
        return dict.fromkeys(("dense", "union", *PATHS), full)
    masks = {"union": layer.union(), **layer.masks}
    return {"dense": full, **{key: int(mask.count_nonzero()) for key, mask in masks.items()}}
