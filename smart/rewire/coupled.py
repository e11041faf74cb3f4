"""What one rewiring does to the masks of coupled channels: all layers around a stream move together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from smart.coupled_masks import CoupledLayers
from smart.rewire.moves import Part, exchange, regions_of
from smart_kernels.coupling import Stream
from smart_kernels.paths import PATHS

Kept = dict[str, dict[Stream, Tensor]]  # path -> stream -> its channels (C,) that live, bool


def move_streams(
    coupled: CoupledLayers,
    streams: Sequence[Stream],
    paths: Sequence[str],
    momentum: Mapping[str, Tensor],
    rate: float,
    keeps_overlap: bool,
) -> tuple[Kept, dict[Stream, Tensor]]:
    """Exchanges channels of streams, each of which keeps as many as before.

    A channel's score is the L2 norm over the weights of all coupled layers that it reaches: rows of those that write it
    and columns of those that read it, as far as they lie in channels that live on the other side.

    Args:
        streams: those whose turn it is.
        paths: on which they move, alike.
        momentum: of each layer (K, C/groups, R, S), what ranks channels to regrow.

    Returns:
        The channels that live afterwards, and those of each stream that are regrown.
    """
    kept = {path: coupled.kept(path) for path in PATHS}
    regrown = {}
    for stream in streams:
        if stream.whole:
            continue
        before = kept[paths[0]][stream]
        magnitude = _norms(coupled, stream, {n: each.weight for n, each in coupled.layers.items()}, kept, paths)
        gradient = _norms(coupled, stream, momentum, kept, paths)
        (other,) = [path for path in PATHS if path not in paths] or [None]
        alive = before
        for (region,) in regions_of([kept[other][stream] if keeps_overlap and other else None], [before]):
            (alive,) = exchange([Part(magnitude, gradient, alive, region)], rate, redistributes=False)
        regrown[stream] = alive & ~before
        for path in paths:
            kept[path][stream] = alive
    return kept, regrown


def _norms(
    coupled: CoupledLayers, stream: Stream, tensors: Mapping[str, Tensor], kept: Kept, paths: Sequence[str]
) -> Tensor:
    """The L2 norm (C,) of what tensors like the layers' weights hold for each channel of a stream."""
    total = torch.zeros(stream.channels, device=next(iter(tensors.values())).device)
    for side, names in enumerate((stream.writers, stream.readers)):
        for name in names:
            across = coupled.sides(name)[1 - side]
            reached = torch.stack([kept[path][across] for path in paths]).any(0)
            total += tensors[name].transpose(0, side)[:, reached].flatten(1).square().sum(1)
    return total.sqrt()


@torch.no_grad()
def start_rows(
    coupled: CoupledLayers, regrown: Mapping[Stream, Tensor], masks: Mapping[str, Tensor], seed: int
) -> None:
    """Draws the weights that compute regrown channels which only regrown, zero weights read; before masks are set.

    Such a channel would never learn: through columns of zeros no gradient comes back to its rows, and from rows of
    zeros no activation comes to its columns. What is drawn is as large as the layer's other weights are, and columns
    still begin at zero, so that the network computes what it did.

    Args:
        masks: of the layers, that are going to be set.
    """
    generator = torch.Generator().manual_seed(seed)
    for stream, channels in regrown.items():
        if stream.read_elsewhere or not bool(channels.any()):
            continue
        for name in stream.writers:
            layer = coupled.layers[name]
            alive = layer.union()
            new = masks[name] & ~alive & channels[:, None, None, None]
            drawn = torch.randn(layer.weight.shape, generator=generator).to(layer.weight)
            layer.weight.copy_(torch.where(new, layer.weight[alive].square().mean().sqrt() * drawn, layer.weight))
