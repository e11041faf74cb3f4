"""Masks of the pattern ``coupled`` at the start: how many channels each stream keeps, and which."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from smart.layers import SmartConv2d
from smart.masks import pick
from smart_kernels.coupling import Stream
from smart_kernels.paths import PATHS


class CoupledLayers:
    """Masked convolutions and the streams they write and read.

    Attributes:
        layers: by name.
        streams: as :func:`smart_kernels.coupling.find_streams` gave them.
    """

    def __init__(self, layers: Mapping[str, SmartConv2d], streams: Sequence[Stream]) -> None:
        self.layers, self.streams = layers, streams
        self._writes = {name: stream for stream in streams for name in stream.writers}
        self._reads = {name: stream for stream in streams for name in stream.readers}

    def sides(self, name: str) -> tuple[Stream, Stream]:
        """The stream that a layer writes, and the one it reads: those of its mask's dimensions 0 and 1."""
        return self._writes[name], self._reads[name]

    def shares_mask(self, stream: Stream) -> bool:
        """Whether one of a stream's layers has one mask for both paths, and with it all share its channels."""
        return any(self.layers[name].shares_mask for name in (*stream.writers, *stream.readers))

    def mask(self, name: str, kept: Mapping[Stream, Tensor]) -> Tensor:
        """A layer's mask (K, C/groups, R, S), given the channels (C,) that live in each stream."""
        out, into = (kept[stream] for stream in self.sides(name))
        return (out[:, None, None, None] & into[None, :, None, None]).expand_as(self.layers[name].weight).contiguous()

    def kept(self, path: str) -> dict[Stream, Tensor]:
        """The channels (C,) of each stream that live in the present masks of a path."""
        found: dict[Stream, Tensor] = {}
        for name, layer in self.layers.items():
            for side, stream in enumerate(self.sides(name)):
                if stream not in found:
                    found[stream] = layer.masks[path].transpose(0, side).flatten(1).any(1)
        return found

    def counts(self, density: float, multiple: int = 1) -> dict[Stream, int]:
        """How many channels each stream keeps, so that the layers together keep that part of their weights.

        All streams keep about the same part of their channels: about sqrt(density), more where whole streams leave
        layers only one side to drop from. They grow step by step, the stream first that is next to be rounded up, until
        the density is as near as it comes. Every stream keeps one step of channels at least.

        Args:
            multiple: the channels of a step; a stream that has no multiple of it may end with fewer.
        """
        counts = {
            stream: stream.channels if stream.whole else min(multiple, stream.channels) for stream in self.streams
        }
        wanted = density * sum(layer.weight.numel() for layer in self.layers.values())
        total = sum(self._alive(name, counts) for name in self.layers)

        def part_of_next(stream: Stream) -> float:
            """The part of all channels at which a stream's share is rounded up to one step more."""
            return (counts[stream] + multiple / 2) / stream.channels

        steps = [(part_of_next(stream), i) for i, stream in enumerate(self.streams)]
        heapq.heapify(steps)
        while total < wanted and steps:
            _, i = heapq.heappop(steps)
            stream = self.streams[i]
            if counts[stream] == stream.channels:
                continue
            grown = counts | {stream: min(counts[stream] + multiple, stream.channels)}
            touched = {*stream.writers, *stream.readers}
            added = sum(self._alive(name, grown) - self._alive(name, counts) for name in touched)
            if total + added - wanted > wanted - total:
                break
            counts, total = grown, total + added
            heapq.heappush(steps, (part_of_next(stream), i))
        return counts

    def _alive(self, name: str, counts: Mapping[Stream, int]) -> int:
        out, into = self.sides(name)
        return counts[out] * counts[into] * math.prod(self.layers[name].weight.shape[2:])


@torch.no_grad()
def apply_coupled_masks(
    coupled: CoupledLayers, density: Mapping[str, float], overlap: str | float, seed: int, multiple: int = 1
) -> None:
    """Gives layers random masks of channels that their streams agree on, and zeroes weights outside the union.

    Args:
        density: of each path, in (0, 1].
        overlap: of the channels of each stream: "independent", "shared" or "nested".
        multiple: of which the numbers of channels are multiples.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = {path: coupled.counts(density[path], multiple) for path in PATHS}
    drawn: dict[Stream, dict[str, Tensor]] = {}
    for stream in coupled.streams:
        own = "shared" if coupled.shares_mask(stream) else overlap
        drawn[stream] = pick(stream.channels, {path: counts[path][stream] for path in PATHS}, own, generator)
    for path in PATHS:
        kept = {stream: drawn[stream][path].to(_device(coupled)) for stream in coupled.streams}
        for name, layer in coupled.layers.items():
            layer.set_mask(path, coupled.mask(name, kept))
    for layer in coupled.layers.values():
        layer.weight.mul_(layer.union())


def _device(coupled: CoupledLayers) -> torch.device:
    return next(iter(coupled.layers.values())).weight.device
