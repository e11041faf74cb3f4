"""How many weights each layer keeps when the network keeps a given part of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from smart.grouping import group_count, group_norms
from smart_kernels.paths import PATHS
from smart_kernels.patterns import NM, VNM, Coupled, Pattern

# How many groups each layer keeps, given the layers' weights, their pattern, how many groups each has, and the density.
Allocation = Callable[[Sequence[Tensor], Pattern, Sequence[int], float], list[int]]


def _uniform(weights: Sequence[Tensor], pattern: Pattern, groups: Sequence[int], density: float) -> list[int]:
    """Every layer the same part."""
    return [max(1, round(density * count)) for count in groups]


def _erk(weights: Sequence[Tensor], pattern: Pattern, groups: Sequence[int], density: float) -> list[int]:
    """Erdos-Renyi kernel: a part in proportion to (K + C + R + S) / (K C R S) (Evci et al., arXiv 1911.11134)."""
    shares = [sum(weight.shape) / weight.numel() * count for weight, count in zip(weights, groups, strict=True)]
    return _none_empty(apportion(_total(groups, density), shares, groups))


def _global(weights: Sequence[Tensor], pattern: Pattern, groups: Sequence[int], density: float) -> list[int]:
    """As many as a layer has among the largest groups of the whole network."""
    norms = [group_norms(weight.detach(), pattern).flatten() for weight in weights]
    layer = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
    largest = torch.cat([each.cpu() for each in norms]).topk(_total(groups, density)).indices
    return _none_empty(torch.bincount(layer[largest], minlength=len(groups)).tolist())


ALLOCATIONS: dict[str, Allocation] = {"uniform": _uniform, "erk": _erk, "global": _global}


def check_allocation(allocation: str, pattern: Pattern) -> None:
    """Raises ValueError where ``allocation`` is unknown, or contradicts the pattern."""
    if allocation not in ALLOCATIONS:
        raise ValueError(f"unknown allocation {allocation!r}: accepted are {', '.join(ALLOCATIONS)}")
    if isinstance(pattern, (NM, VNM)) and allocation != "uniform":
        raise ValueError(
            f"allocation is {allocation!r}: with pattern {pattern} every layer keeps {pattern.n} of {pattern.m} "
            "weights, so take 'uniform'"
        )
    if isinstance(pattern, Coupled) and allocation != "uniform":
        raise ValueError(
            f"allocation is {allocation!r}: with pattern {pattern} no layer has channels of its own, so take 'uniform'"
        )


def allocate(
    allocation: str, weights: Sequence[Tensor], density: Mapping[str, float], pattern: Pattern
) -> list[dict[str, float]]:
    """The density of each path in each layer.

    The network's density is met exactly up to whole groups of the pattern: over all layers with ``"erk"`` and
    ``"global"``, in each of them with ``"uniform"``. Every layer keeps one group at least.

    Args:
        weights: of the layers, each (K, C/groups, R, S).

    Raises:
        ValueError: an unknown allocation, or one that contradicts the pattern.
    """
    check_allocation(allocation, pattern)
    if allocation == "uniform":
        return [dict(density) for _ in weights]
    groups = [group_count(weight.shape, pattern) for weight in weights]
    kept = {path: ALLOCATIONS[allocation](weights, pattern, groups, density[path]) for path in PATHS}
    return [{path: kept[path][i] / count for path in PATHS} for i, count in enumerate(groups)]


def _total(groups: Sequence[int], density: float) -> int:
    return max(len(groups), round(density * sum(groups)))


def _none_empty(counts: list[int]) -> list[int]:
    """Gives layers that were left with nothing one group of the layer that has most."""
    for i, count in enumerate(counts):
        if count == 0:
            counts[counts.index(max(counts))] -= 1
            counts[i] = 1
    return counts


def apportion(total: int, shares: Sequence[float], capacity: Sequence[int]) -> list[int]:
    """Splits ``total`` into whole parts in proportion to ``shares``, none above its capacity.

    What full parts cannot take is spread over the others in proportion again; parts whose shares are all zero are
    filled in proportion to the room left. The sum is min(total, sum of capacity).
    """
    given = [0] * len(capacity)
    left = min(total, sum(capacity))
    while left:
        room = {i: capacity[i] - given[i] for i in range(len(capacity)) if given[i] < capacity[i]}
        weights = {i: shares[i] for i in room}
        if sum(weights.values()) == 0:
            weights = {i: float(r) for i, r in room.items()}
        scale = left / sum(weights.values())
        exact = {i: weight * scale for i, weight in weights.items()}
        parts = {i: math.floor(e) for i, e in exact.items()}
        by_remainder = sorted(room, key=lambda i: parts[i] - exact[i])
        for i in by_remainder[: left - sum(parts.values())]:
            parts[i] += 1
        for i, part in parts.items():
            given[i] += min(part, room[i])
        left = min(total, sum(capacity)) - sum(given)
    return given
