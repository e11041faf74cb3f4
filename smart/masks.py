"""Masks at the start of training: what may be asked for, and how they are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from smart.allocation import allocate
from smart.grouping import group_count, group_mask, spread, spread_slabs
from smart.layers import SmartConv2d
from smart_kernels.paths import PATHS
from smart_kernels.patterns import GROUP, NM, SLAB, VNM, Channel, Pattern, Unstructured

UNSTRUCTURED = Unstructured()
DEFAULT_DENSITY = 0.2
OVERLAPS = ("independent", "disjoint", "shared", "nested")


def check_density(density: float | Mapping[str, float] | None, pattern: Pattern = UNSTRUCTURED) -> dict[str, float]:
    """The density of each path, from one number for both or a mapping with both; None: 0.2, or what the pattern says.

    Raises:
        ValueError: a density outside (0, 1], a mapping with other keys, or another density than n/m for N:M and V:N:M.
    """
    exact = pattern.n / pattern.m if isinstance(pattern, (NM, VNM)) else None
    if density is None:
        density = DEFAULT_DENSITY if exact is None else exact
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
        if exact is not None and abs(value - exact) > 1e-6:
            raise ValueError(
                f"density is {value}: pattern {pattern} keeps {pattern.n} of every {pattern.m} weights, which is "
                f"{exact:g}, give that or leave density out"
            )
    return {path: float(per_path[path]) if exact is None else exact for path in PATHS}


def check_overlap(overlap: str | float, density: Mapping[str, float], pattern: Pattern = UNSTRUCTURED) -> str | float:
    """Returns ``overlap``, with ``"independent"`` for ``"free"``.

    Raises:
        ValueError: it is unknown or cannot be had at these densities, or with this pattern.
    """
    overlap = "independent" if overlap == "free" else overlap
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
    elif isinstance(overlap, bool) or not isinstance(overlap, (int, float)) or not 0 <= overlap <= 1:
        raise ValueError(f"overlap is {overlap!r}: accepted are {', '.join(OVERLAPS)}, or a fraction in [0, 1]")
    elif overlap < least - 1e-9:
        raise ValueError(
            f"overlap is {overlap}: at densities {low} and {high} it is at least {least:.3f}, lower a density"
        )
    if isinstance(pattern, (Channel, VNM)) and overlap not in ("independent", "shared", "nested"):
        raise ValueError(f"overlap is {overlap!r}: masks of pattern '{pattern}' are independent, shared or nested")
    return overlap


def one_mask(overlap: str | float, density: Mapping[str, float]) -> bool:
    """Whether masks of this overlap and these densities are the same on both paths."""
    return density["clean"] == density["adv"] and (overlap in ("shared", "nested") or overlap == 1.0)


def random_masks(
    shape: Sequence[int],
    density: Mapping[str, float],
    overlap: str | float,
    generator: torch.Generator,
    pattern: Pattern = UNSTRUCTURED,
) -> dict[str, Tensor]:
    """One random mask per path that obeys a pattern.

    Unstructured masks have exactly max(1, round(density * numel)) ones each, blocks are counted alike; N:M masks have
    n of every m, V:N:M masks n of every four in one slab of m/4. Channels keep about sqrt(density) of each side, at
    least one.

    Args:
        shape: of the weight, (K, C/groups, R, S).
        density: per path, in (0, 1]; n/m for N:M.
        overlap: as for :func:`smart.convert`; a fraction is met up to rounding to whole weights, or blocks. Channels
            and V:N:M may be "independent", "shared" or "nested".
        generator: on the CPU.

    Returns:
        Bool tensors of ``shape`` on the CPU.

    Raises:
        ValueError: a weight that cannot be divided into the pattern's groups, or a density or an overlap that the
            pattern cannot have.
    """
    shape = tuple(shape)
    if why := pattern.misfit(shape):
        raise ValueError(f"a weight {shape} cannot have pattern {pattern}: {why}")
    density = check_density(density, pattern)
    overlap = check_overlap(overlap, density, pattern)
    if isinstance(pattern, Channel):
        return _channel_masks(shape, density, overlap, generator)
    if isinstance(pattern, NM):
        return _nm_masks(shape, pattern, overlap, generator)
    if isinstance(pattern, VNM):
        return _vnm_masks(shape, pattern, overlap, generator)
    groups = group_count(shape, pattern)
    grid = group_mask(torch.empty(shape, dtype=torch.bool, device="meta"), pattern).shape
    counts = {path: max(1, round(density[path] * groups)) for path in PATHS}
    return {
        path: spread(mask.reshape(grid), pattern) for path, mask in pick(groups, counts, overlap, generator).items()
    }


def pick(groups: int, counts: Mapping[str, int], overlap: str | float, generator: torch.Generator) -> dict[str, Tensor]:
    """Flat random masks (groups,) of both paths, of so many ones each, with an overlap of :func:`check_overlap`."""
    order = torch.randperm(groups, generator=generator)
    clean, adv = (counts[path] for path in PATHS)
    chosen = {"clean": order[:clean]}
    if overlap == "independent":
        chosen["adv"] = torch.randperm(groups, generator=generator)[:adv]
    else:
        # Two windows of one permutation: how far they lap over each other is the size of the intersection.
        common = max(round(_fraction(overlap) * min(clean, adv)), clean + adv - groups)
        chosen["adv"] = order[clean - common : clean - common + adv]
    masks = {path: torch.zeros(groups, dtype=torch.bool) for path in PATHS}
    for path, positions in chosen.items():
        masks[path][positions] = True
    return masks


def _fraction(overlap: str | float) -> float:
    return {"disjoint": 0.0, "shared": 1.0, "nested": 1.0}[overlap] if isinstance(overlap, str) else overlap


def _nm_masks(
    shape: tuple[int, ...], pattern: NM, overlap: str | float, generator: torch.Generator
) -> dict[str, Tensor]:
    """n of every m consecutive input channels, drawn for each group."""
    k, c, r, s = shape
    grid = (k, c // pattern.m, pattern.m, r, s)

    def places() -> Tensor:
        """A random order of the weights of each group."""
        return torch.rand(grid, generator=generator).argsort(dim=2).argsort(dim=2)

    place = places()
    masks = {"clean": place < pattern.n}
    if overlap == "independent":
        masks["adv"] = places() < pattern.n
    else:
        # As in pick, windows of one order in each group; what is left of the common weights, one in some groups.
        groups = place[:, :, 0].numel()
        total = round(_fraction(overlap) * pattern.n * groups)
        common = torch.full((groups,), total // groups)
        common[torch.randperm(groups, generator=generator)[: total % groups]] += 1
        first = (pattern.n - common).reshape(k, -1, 1, r, s)
        masks["adv"] = (place >= first) & (place < first + pattern.n)
    return {path: mask.flatten(1, 2) for path, mask in masks.items()}


def _vnm_masks(
    shape: tuple[int, ...], pattern: VNM, overlap: str | float, generator: torch.Generator
) -> dict[str, Tensor]:
    """One slab of every m/4, and in it n of every four, drawn for each path; one mask for both but if independent."""
    inside = _nm_masks(shape, NM(pattern.n, GROUP), overlap, generator)
    k, c, r, s = shape
    grid = (k // pattern.v, c // (SLAB * pattern.choices), pattern.choices, r, s)
    slabs: list[Tensor] = []
    for _ in PATHS:
        if overlap == "independent" or not slabs:
            slabs = [torch.rand(grid, generator=generator).argsort(dim=2) == 0, *slabs]
    kept = dict(zip(PATHS, slabs * len(PATHS), strict=False))
    return {path: mask & spread_slabs(kept[path], pattern) for path, mask in inside.items()}


def _channel_masks(
    shape: tuple[int, ...], density: Mapping[str, float], overlap: str | float, generator: torch.Generator
) -> dict[str, Tensor]:
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
    layers: Mapping[str, SmartConv2d],
    density: Mapping[str, float],
    overlap: str | float,
    seed: int,
    pattern: Pattern = UNSTRUCTURED,
    allocation: str = "uniform",
) -> None:
    """Gives every layer masks of its own by :func:`random_masks`, and zeroes its weight outside their union.

    Args:
        layers: by name; those whose masks are to be one have ``shares_mask``.
        allocation: how the density is divided among them, see :func:`smart.allocation.allocate`.

    Raises:
        ValueError: an overlap that a layer cannot have at its densities; the message names it.
    """
    generator = torch.Generator().manual_seed(seed)
    densities = allocate(allocation, [layer.weight for layer in layers.values()], density, pattern)
    for (name, layer), own in zip(layers.items(), densities, strict=True):
        try:
            masks = random_masks(
                layer.weight.shape, own, "shared" if layer.shares_mask else overlap, generator, pattern
            )
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
        for path, mask in masks.items():
            layer.set_mask(path, mask)
        layer.weight.mul_(layer.union())
