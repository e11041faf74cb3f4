"""Masks at the start of training, and what they leave: counts of non-zeros and multiplications."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from smart.layers import SmartConv2d, eval_mode
from smart_kernels.paths import PATHS
from smart_kernels.patterns import NM, Block, Channel, Pattern, Unstructured

UNSTRUCTURED = Unstructured()
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
    shape: Sequence[int],
    density: Mapping[str, float],
    overlap: str | float,
    generator: torch.Generator,
    pattern: Pattern = UNSTRUCTURED,
) -> dict[str, Tensor]:
    """One random mask per path that obeys a pattern.

    Unstructured and N:M masks have exactly max(1, round(density * numel)) ones each. Blocks are counted alike, as if
    all were of one size. Channels keep about sqrt(density) of each side, at least one.

    Args:
        shape: of the weight, (K, C/groups, R, S).
        density: per path, in (0, 1].
        overlap: as for :func:`smart.convert`; a fraction is met up to rounding to whole weights, or blocks. Channels
            may be "independent", "shared" or "nested".
        generator: on the CPU.

    Returns:
        Bool tensors of ``shape`` on the CPU.

    Raises:
        ValueError: a density that an N:M pattern cannot hold, or an overlap that channels cannot have.
    """
    shape = tuple(shape)
    if isinstance(pattern, Channel):
        return _channel_masks(shape, density, overlap, generator)
    if isinstance(pattern, Block):
        grid = (-(-shape[0] // pattern.out_channels), -(-shape[1] // pattern.in_channels), *shape[2:])
        blocks = _pick(_everywhere(grid), _counts(density, grid), overlap, generator)
        return {path: _grow(mask.reshape(grid), pattern, shape) for path, mask in blocks.items()}
    counts, candidates = _counts(density, shape), _everywhere(shape)
    if isinstance(pattern, NM):
        candidates = partial(_nm_candidates, shape, pattern)
        capacity = len(candidates(torch.Generator().manual_seed(0)))
        if max(counts.values()) > capacity:
            raise ValueError(
                f"density is {max(density.values())}: pattern {pattern} can keep at most "
                f"{capacity / math.prod(shape):.4g} of a weight {shape}, lower the density"
            )
        least = sum(counts.values()) - capacity
        if overlap == "disjoint" or not isinstance(overlap, str):
            wanted = 0 if overlap == "disjoint" else round(overlap * min(counts.values()))
            if least > wanted:
                raise ValueError(
                    f"overlap is {overlap!r}: masks of pattern {pattern} share the {capacity} places they may take, so "
                    f"at these densities at least {least} weights are in both; lower a density"
                )
    return {path: mask.reshape(shape) for path, mask in _pick(candidates, counts, overlap, generator, shape).items()}


def _counts(density: Mapping[str, float], shape: Sequence[int]) -> dict[str, int]:
    return {path: max(1, round(density[path] * math.prod(shape))) for path in PATHS}


Candidates = Callable[[torch.Generator], Tensor]  # draws the positions that may live, in random order


def _everywhere(shape: Sequence[int]) -> Candidates:
    return lambda generator: torch.randperm(math.prod(shape), generator=generator)


def _nm_candidates(shape: Sequence[int], pattern: NM, generator: torch.Generator) -> Tensor:
    """At most n positions of every m consecutive input channels, drawn for each group, in random order."""
    k, c, r, s = shape
    groups = -(-c // pattern.m)
    draw = torch.rand(k, groups, pattern.m, r, s, generator=generator)
    inside = torch.arange(groups * pattern.m).reshape(1, groups, pattern.m, 1, 1) < c
    chosen = draw.masked_fill(~inside, -1.0).argsort(dim=2, descending=True).argsort(dim=2) < pattern.n
    positions = torch.nonzero((chosen & inside).flatten(1, 2)[:, :c].flatten()).flatten()
    return positions[torch.randperm(len(positions), generator=generator)]


def _pick(
    candidates: Candidates,
    counts: Mapping[str, int],
    overlap: str | float,
    generator: torch.Generator,
    shape: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Flat masks of both paths, of so many positions each; ``shape`` if not all positions are candidates."""
    order = candidates(generator)
    clean, adv = (counts[path] for path in PATHS)
    chosen = {"clean": order[:clean]}
    if overlap == "independent":
        chosen["adv"] = candidates(generator)[:adv]
    else:
        # Two windows of one permutation: how far they lap over each other is the size of the intersection.
        fraction = {"disjoint": 0.0, "shared": 1.0, "nested": 1.0}.get(overlap, overlap)
        common = max(round(fraction * min(clean, adv)), clean + adv - len(order))
        chosen["adv"] = order[clean - common : clean - common + adv]
    numel = len(order) if shape is None else math.prod(shape)
    masks = {path: torch.zeros(numel, dtype=torch.bool) for path in PATHS}
    for path, positions in chosen.items():
        masks[path][positions] = True
    return masks


def _grow(blocks: Tensor, pattern: Block, shape: tuple[int, ...]) -> Tensor:
    """A mask of blocks as a mask of weights; the last blocks may be cut short."""
    weights = blocks.repeat_interleave(pattern.out_channels, 0).repeat_interleave(pattern.in_channels, 1)
    return weights[: shape[0], : shape[1]].contiguous()


def _channel_masks(
    shape: tuple[int, ...], density: Mapping[str, float], overlap: str | float, generator: torch.Generator
) -> dict[str, Tensor]:
    if overlap not in ("independent", "shared", "nested"):
        raise ValueError(f"overlap is {overlap!r}: masks of pattern 'channel' are independent, shared or nested")
    orders: list[Tensor] = []
    masks = {}
    for path in PATHS:
        if overlap == "independent" or not orders:
            orders = [torch.randperm(size, generator=generator) for size in shape[:2]]
        kept_out = max(1, round(math.sqrt(density[path]) * shape[0]))
        kept_in = min(shape[1], max(1, round(density[path] * shape[0] * shape[1] / kept_out)))
        # Where a weight has few input channels the output channels alone have to give the density.
        kept_out = min(shape[0], max(1, round(density[path] * shape[0] * shape[1] / kept_in)))
        masks[path] = torch.zeros(shape, dtype=torch.bool)
        masks[path][orders[0][:kept_out, None], orders[1][:kept_in]] = True
    return masks


@torch.no_grad()
def apply_random_masks(
    layers: Iterable[SmartConv2d],
    density: Mapping[str, float],
    overlap: str | float,
    seed: int,
    pattern: Pattern = UNSTRUCTURED,
) -> None:
    """Gives every layer masks of its own by :func:`random_masks`, and zeroes its weight outside their union."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        for path, mask in random_masks(layer.weight.shape, density, overlap, generator, pattern).items():
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
