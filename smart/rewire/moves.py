"""What one rewiring does to the masks of one path: prune and regrow, at the granularity of the pattern.

The overlap with the other path's masks is kept by moving within regions: what lives in both is pruned from both and
regrown where the other path lives, what lives in this path alone is regrown where neither does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smart.allocation import apportion
from smart.grouping import group_mask, group_norms, slabs_of, spread, spread_slabs
from smart_kernels.patterns import GROUP, NM, VNM, Block, Channel, Pattern, Unstructured


@dataclass
class Turn:
    """One layer in the turn of one path; all tensors are (K, C/groups, R, S).

    Attributes:
        weight, momentum: what ranks groups to prune, and to regrow.
        mask: before the turn.
        other: the other path's mask where the overlap with it is to be kept, else None.
    """

    weight: Tensor
    momentum: Tensor
    mask: Tensor
    other: Tensor | None = None


@dataclass
class Part:
    """Groups of one layer that may be exchanged for one another; all tensors are of one shape.

    Attributes:
        magnitude, momentum: of each group, at least 0.
        alive: bool, before.
        region: bool, where groups may be pruned and regrown.
    """

    magnitude: Tensor
    momentum: Tensor
    alive: Tensor
    region: Tensor


def move_groups(turns: Sequence[Turn], pattern: Pattern, rate: float, redistributes: bool) -> list[Tensor]:
    """New masks where any set of groups may live: of single weights, or of blocks."""
    alive = [group_mask(turn.mask, pattern) for turn in turns]
    norms = [(group_norms(turn.weight, pattern), group_norms(turn.momentum, pattern)) for turn in turns]
    for regions in regions_of(
        [None if turn.other is None else group_mask(turn.other, pattern) for turn in turns], alive
    ):
        parts = [Part(*norm, a, region) for norm, a, region in zip(norms, alive, regions, strict=True)]
        alive = exchange(parts, rate, redistributes)
    return [spread(a, pattern) for a in alive]


def move_within(turns: Sequence[Turn], pattern: NM, rate: float, redistributes: bool) -> list[Tensor]:
    """New masks where each group of m weights keeps n."""
    return [_move_one_within(turn, pattern, rate) for turn in turns]


def _move_one_within(turn: Turn, pattern: NM, rate: float) -> Tensor:
    def grouped(tensor: Tensor) -> Tensor:
        """(K, C, R, S) -> (K, C/m, R, S, m)."""
        return tensor.unflatten(1, (-1, pattern.m)).movedim(2, -1)

    alive = grouped(turn.mask)
    for (region,) in regions_of([None if turn.other is None else grouped(turn.other)], [alive]):
        part = Part(grouped(turn.weight).abs(), grouped(turn.momentum).abs(), alive, region)
        alive = exchange_within(part, rate)
    return alive.movedim(-1, 2).flatten(1, 2).contiguous()


def move_slabs(turns: Sequence[Turn], pattern: VNM, rate: float, redistributes: bool) -> list[Tensor]:
    """New masks where one slab of every m/4 lives, and in it n of every four input channels: both move."""
    return [_move_one_by_slabs(turn, pattern, rate) for turn in turns]


def _move_one_by_slabs(turn: Turn, pattern: VNM, rate: float) -> Tensor:
    """A slab that stays moves within; a new one begins with the weights of largest momentum.

    Slabs are ranked by what a path has of them: the L2 norm of its weights, and that of the largest n momenta of four.
    """

    def norms(tensor: Tensor) -> Tensor:
        """(K, C, R, S) -> (K/v, C / 4m, R, S, m/4)."""
        return slabs_of(tensor, pattern).square().sum((1, 4)).sqrt().movedim(2, -1)

    def as_mask(slabs: Tensor) -> Tensor:
        return spread_slabs(slabs.movedim(-1, 2), pattern)

    groups = turn.momentum.abs().unflatten(1, (-1, GROUP)).movedim(2, -1)
    best = (_places(-groups, torch.ones_like(groups, dtype=torch.bool)) < pattern.n).movedim(-1, 2).flatten(1, 2)
    alive = slabs_of(turn.mask, pattern).any(4).any(1).movedim(2, -1)
    part = Part(norms(turn.weight * turn.mask), norms(turn.momentum * best), alive, torch.ones_like(alive))
    kept = as_mask(exchange_within(part, rate))
    within = _move_one_within(Turn(turn.weight, turn.momentum, turn.mask), NM(pattern.n, GROUP), rate)
    return torch.where(as_mask(alive), within, best) & kept


def move_channels(turns: Sequence[Turn], pattern: Channel, rate: float, redistributes: bool) -> list[Tensor]:
    """New masks where whole output and input channels live: as many of each, in every layer, as before."""
    return [_move_one_by_channels(turn, rate) for turn in turns]


def _move_one_by_channels(turn: Turn, rate: float) -> Tensor:
    kept = {side: _channels(turn.mask, side) for side in (0, 1)}
    for side in (0, 1):
        # Weights in channels that the other side drops are dead whatever this side does.
        reached = kept[1][None, :, None, None] if side == 0 else kept[0][:, None, None, None]
        magnitude, momentum = (_channel_norms(each * reached, side) for each in (turn.weight, turn.momentum))
        other = None if turn.other is None else _channels(turn.other, side)
        for (region,) in regions_of([other], [kept[side]]):
            (kept[side],) = exchange([Part(magnitude, momentum, kept[side], region)], rate, redistributes=False)
    return (kept[0][:, None, None, None] & kept[1][None, :, None, None]).expand_as(turn.mask).contiguous()


def _channels(mask: Tensor, side: int) -> Tensor:
    """Output (side 0) or input channels (side 1) that live, bool."""
    return mask.transpose(0, side).flatten(1).any(1)


def _channel_norms(tensor: Tensor, side: int) -> Tensor:
    return tensor.transpose(0, side).flatten(1).square().sum(1).sqrt()


# Each takes the layers' turns, the pattern, the prune rate, and whether layers trade density; and returns their masks.
MOVES: dict[type, Callable[[Sequence[Turn], Pattern, float, bool], list[Tensor]]] = {
    Unstructured: move_groups,
    Block: move_groups,
    NM: move_within,
    VNM: move_slabs,
    Channel: move_channels,
}


def regions_of(others: Sequence[Tensor | None], alive: Sequence[Tensor]) -> list[list[Tensor]]:
    """Where groups of each layer may be exchanged: everywhere, or inside the other path's mask and then outside.

    ``others`` are the groups that live on the other path if the overlap with it is to be kept, else None.
    """
    if any(other is None for other in others):
        return [[torch.ones_like(a) for a in alive]]
    return [list(others), [~other for other in others]]


def exchange(parts: Sequence[Part], rate: float, redistributes: bool) -> list[Tensor]:
    """Prunes and regrows groups; the number of those that live, in all layers together, stays exactly the same.

    In each layer the ceil(rate * alive) live groups of smallest magnitude are pruned, but never the last one. As many
    are regrown at the dead ones of largest momentum: over all layers in proportion to the mean momentum of a layer's
    live groups, what a full layer cannot take going to the others; or with ``redistributes=False`` in the same layer.
    Only where no other dead group is left does one pruned here come back, largest first.

    Returns:
        Which groups live, of each layer.
    """
    flat = [
        [each.flatten() for each in (p.magnitude, p.momentum, p.alive & p.region, ~p.alive & p.region)] for p in parts
    ]
    counts = [int(live.count_nonzero()) for _, _, live, _ in flat]
    free = [int(dead.count_nonzero()) for _, _, _, dead in flat]
    removed = [min(math.ceil(rate * count), count - 1) if count else 0 for count in counts]
    if redistributes:
        shares = [
            float(momentum[live].mean()) if count else 0.0
            for (_, momentum, live, _), count in zip(flat, counts, strict=True)
        ]
        if sum(shares) == 0:
            shares = [float(count) for count in removed]
        grown = apportion(sum(removed), shares, free)
        returned = apportion(sum(removed) - sum(grown), [float(count) for count in removed], removed)
    else:
        grown = [min(count, room) for count, room in zip(removed, free, strict=True)]
        returned = [count - new for count, new in zip(removed, grown, strict=True)]
    result = []
    for i, (magnitude, momentum, live, dead) in enumerate(flat):
        pruned = _first(magnitude, live, removed[i])
        regrown = _first(-momentum, dead, grown[i])
        # `pruned` is sorted by magnitude: those that come back are at its end.
        alive = parts[i].alive.flatten().clone()
        alive[pruned[: removed[i] - returned[i]]] = False
        alive[regrown] = True
        result.append(alive.view_as(parts[i].alive))
    return result


def exchange_within(part: Part, rate: float) -> Tensor:
    """Prunes and regrows weights within groups along the last dimension, each of which keeps its number of live ones.

    Of the live weights the ceil(rate * alive) of smallest magnitude are pruned, but in no group more than it has dead
    ones to regrow; those of largest momentum are.

    Returns:
        Which weights live, shaped as in ``part``.
    """
    live, dead = part.alive & part.region, ~part.alive & part.region
    place = _places(part.magnitude, live)
    candidates = (live & (place < dead.sum(-1, keepdim=True))).flatten()
    count = min(math.ceil(rate * int(live.count_nonzero())), int(candidates.count_nonzero()))
    pruned = torch.zeros_like(candidates)
    pruned[_first(part.magnitude.flatten(), candidates, count)] = True
    pruned = pruned.view_as(part.alive)
    regrown = dead & (_places(-part.momentum, dead) < pruned.sum(-1, keepdim=True))
    return (part.alive & ~pruned) | regrown


def _places(score: Tensor, among: Tensor) -> Tensor:
    """The place of each element in the rising order of its group, those that do not count at the end."""
    scores = score.masked_fill(~among, math.inf)
    return scores.argsort(dim=-1, stable=True).argsort(dim=-1)


def _first(score: Tensor, among: Tensor, count: int) -> Tensor:
    """Indices (count,) of the smallest scores where ``among`` holds, in rising order; all flat. Ties: lowest index."""
    positions = torch.nonzero(among).flatten()
    scores = score[positions]
    if 0 < count < len(scores):
        # Selecting takes a tenth of sorting millions. What ties with the last one is left to the sort.
        near = scores <= scores.topk(count, largest=False, sorted=False).values.max()
        positions, scores = positions[near], scores[near]
    return positions[torch.sort(scores, stable=True).indices[:count]]
