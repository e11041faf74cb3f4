"""Sparsity patterns: the vocabulary shared by training, which makes masks, and kernels, which skip their zeros.

Every pattern describes which sets of weights of a convolution (K, C/groups, R, S) live or die together, or how many of
a group may live. Each has a spelling, as in ``create_model(pattern="2:4")``, can tell whether a mask obeys it, and why
a weight of some shape (K, C/groups, R, S) cannot be divided into its groups, as the end of a sentence (None if it can).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

GROUP = 4  # input channels of which V:N:M keeps n
SLAB = 16  # input channels that V:N:M keeps or drops together


@dataclass(frozen=True)
class Unstructured:
    """Any weight may be zero: what the method trains."""

    def __str__(self) -> str:
        return "unstructured"

    def holds(self, mask: Tensor) -> bool:
        return True

    def misfit(self, shape: Sequence[int]) -> str | None:
        return None


@dataclass(frozen=True)
class NM:
    """At most ``n`` of every ``m`` consecutive input channels live, for each output channel and tap (NVIDIA's 2:4)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(f"pattern {self.n}:{self.m}: the first number must be at least 1 and below the second")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def holds(self, mask: Tensor) -> bool:
        padded = F.pad(mask.int(), (0, 0, 0, 0, 0, -mask.shape[1] % self.m))
        groups = padded.unflatten(1, (-1, self.m)).sum(dim=2)
        return bool((groups <= self.n).all())

    def misfit(self, shape: Sequence[int]) -> str | None:
        return f"its {shape[1]} input channels are no multiple of {self.m}" if shape[1] % self.m else None


@dataclass(frozen=True)
class VNM:
    """N of every four input channels, in one of m/4 slabs: V:N:M, whose density is n/m.

    Of every ``m / 4`` neighbouring slabs of 16 input channels ``v`` output channels keep one, each tap for itself; in
    it each of them keeps at most ``n`` of every four. So a GPU multiplies 2:4 and leaves the other slabs out. The name
    is that of VENOM (Castro et al., arXiv 2310.02065), which keeps four single columns of m; slabs can be copied.
    """

    v: int
    n: int
    m: int

    def __post_init__(self) -> None:
        if self.v < 1 or not 0 < self.n < GROUP or self.m % GROUP or self.m <= GROUP:
            raise ValueError(
                f"pattern {self}: of V:N:M, V must be at least 1, N 1 to {GROUP - 1}, and M a multiple of {GROUP}, "
                f"above {GROUP}, such as 64:2:8"
            )

    def __str__(self) -> str:
        return f"{self.v}:{self.n}:{self.m}"

    @property
    def choices(self) -> int:
        """Slabs of which one lives."""
        return self.m // GROUP

    def holds(self, mask: Tensor) -> bool:
        k, c = mask.shape[:2]
        padded = F.pad(mask, (0, 0, 0, 0, 0, -c % (SLAB * self.choices), 0, -k % self.v))
        slabs = padded.unflatten(1, (-1, self.choices, SLAB)).unflatten(0, (-1, self.v))
        return NM(self.n, GROUP).holds(mask) and bool((slabs.any(4).any(1).sum(2) <= 1).all())

    def misfit(self, shape: Sequence[int]) -> str | None:
        for channels, side, what in ((shape[0], self.v, "out"), (shape[1], SLAB * self.choices, "in")):
            if channels % side:
                return f"its {channels} {what}put channels are no multiple of {side}"
        return None


@dataclass(frozen=True)
class Block:
    """Blocks of ``out_channels`` x ``in_channels`` weights of one kernel tap live or die together."""

    out_channels: int
    in_channels: int

    def __post_init__(self) -> None:
        if self.out_channels < 1 or self.in_channels < 1:
            raise ValueError(f"pattern {self}: both sides of a block must be at least 1")

    def __str__(self) -> str:
        return f"block:{self.out_channels}x{self.in_channels}"

    def holds(self, mask: Tensor) -> bool:
        k, c = mask.shape[:2]
        for k0 in range(0, k, self.out_channels):
            rows = mask[k0 : k0 + self.out_channels]
            for c0 in range(0, c, self.in_channels):
                block = rows[:, c0 : c0 + self.in_channels].flatten(0, 1)
                if not bool((block == block[:1]).all()):
                    return False
        return True

    def misfit(self, shape: Sequence[int]) -> str | None:
        for channels, side, what in ((shape[0], self.out_channels, "out"), (shape[1], self.in_channels, "in")):
            if channels % side:
                return f"its {channels} {what}put channels are no multiple of {side}"
        return None


@dataclass(frozen=True)
class Channel:
    """Whole output channels and whole input channels are dropped; what is left is dense."""

    def __str__(self) -> str:
        return "channel"

    def holds(self, mask: Tensor) -> bool:
        out_alive = mask.flatten(1).any(dim=1)
        in_alive = mask.transpose(0, 1).flatten(1).any(dim=1)
        return bool((mask == (out_alive[:, None] & in_alive)[:, :, None, None]).all())

    def misfit(self, shape: Sequence[int]) -> str | None:
        return None


@dataclass(frozen=True)
class Coupled(Channel):
    """Channels whose layers agree on them: all that write into a sum, and all that read it, keep the same ones.

    Of one layer it asks no more than :class:`Channel`; which layers are coupled :mod:`smart_kernels.coupling` finds.
    The name is that of structural pruning, as in DepGraph (Fang et al., arXiv 2301.12900).

    Attributes:
        multiple: of which the numbers of kept channels are multiples, as far as layers have as many; hardware that
            takes 16 channels at a time fills up any others.
    """

    multiple: int = 1

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise ValueError(f"pattern {self}: channels are kept in multiples of 1 or more")

    def __str__(self) -> str:
        return "coupled" if self.multiple == 1 else f"coupled:{self.multiple}"


Pattern = Unstructured | NM | VNM | Block | Channel | Coupled
SPELLINGS = (
    "unstructured, N:M such as 2:4, V:N:M such as 64:2:8, block:KxC such as block:64x16, channel, coupled, coupled:16"
)


def parse(text: str | Pattern) -> Pattern:
    """Reads a pattern's spelling: ``"unstructured"``, ``"2:4"``, ``"64:2:8"``, ``"block:64x16"`` or ``"channel"``.

    Also ``"coupled"`` and its multiples such as ``"coupled:16"``, and ``"channels"`` for ``"channel"``.

    Raises:
        ValueError: any other text.
    """
    if isinstance(text, Pattern):
        return text
    if text == "unstructured":
        return Unstructured()
    if text in ("channel", "channels"):
        return Channel()
    if match := re.fullmatch(r"coupled(?::(\d+))?", text):
        return Coupled(int(match[1] or 1))
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(\d+):(\d+):(\d+)", text):
        return VNM(*map(int, match.groups()))
    if match := re.fullmatch(r"block:(\d+)x(\d+)", text):
        return Block(int(match[1]), int(match[2]))
    raise ValueError(
        f"unknown pattern {text!r}: accepted are 'unstructured', 'N:M' such as '2:4', "
        "'V:N:M' such as '64:2:8', 'block:KxC' such as 'block:64x16', 'channel', 'coupled', and 'coupled:16'"
    )


def describe(masks: list[Tensor]) -> Pattern | str:
    """The most regular pattern that all masks obey, or ``"dense"`` where they keep everything."""
    if all(bool(mask.all()) for mask in masks):
        return "dense"
    candidates = [Channel(), Block(64, 16), Block(16, 16), VNM(64, 2, 8), NM(1, 4), NM(2, 4)]
    return next((pattern for pattern in candidates if all(pattern.holds(mask) for mask in masks)), Unstructured())
