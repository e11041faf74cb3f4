"""The shape of a convolution: what torch.nn.functional.conv2d takes beside tensors, checked and in one form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral

from torch import nn

MAX_NUMBER = 1024  # of strides, dilations and paddings: far larger ones overflow sizes, and come from corrupt files


@dataclass(frozen=True)
class Geometry:
    """A convolution of a weight (K, C/groups, R, S).

    Attributes:
        weight_shape: (K, C/groups, R, S).
        stride, dilation: (height, width).
        padding: zeros added at (top, bottom, left, right).
        numbers: all of the above as the one list that custom operators take.
    """

    weight_shape: tuple[int, int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    numbers: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        numbers = [*self.weight_shape, *self.stride, *self.padding, *self.dilation, self.groups]
        object.__setattr__(self, "numbers", numbers)
        if len(self.weight_shape) != 4 or min(self.weight_shape) < 1:
            raise ValueError(
                f"weight has shape {tuple(self.weight_shape)}: (K, C/groups, R, S) is needed, none of them 0"
            )
        if min(self.stride) < 1 or min(self.dilation) < 1 or self.groups < 1:
            raise ValueError(
                f"stride {self.stride}, dilation {self.dilation}, groups {self.groups}: each must be at least 1"
            )
        if max(*self.stride, *self.dilation, *self.padding) > MAX_NUMBER:
            raise ValueError(
                f"stride {self.stride}, dilation {self.dilation}, padding {self.padding}: at most {MAX_NUMBER} each"
            )
        if min(self.padding) < 0:
            raise ValueError(f"padding {self.padding} is negative: crop the input instead")
        if self.weight_shape[0] % self.groups:
            raise ValueError(f"{self.weight_shape[0]} output channels cannot be split into {self.groups} groups")

    @classmethod
    def of(
        cls,
        weight_shape: Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Geometry:
        """Reads arguments as torch.nn.functional.conv2d takes them, ``padding="same"`` and ``"valid"`` included.

        Raises:
            ValueError: arguments that describe no convolution; the message says which.
        """
        shape = tuple(int(n) for n in weight_shape)
        stride, dilation = _pair(stride, "stride"), _pair(dilation, "dilation")
        if padding == "valid":
            padding = 0
        if padding == "same":
            if stride != (1, 1):
                raise ValueError(f"padding 'same' needs stride 1, not {stride}: give the padding as numbers")
            # As torch: an odd total puts the extra zero at the bottom and right.
            totals = [d * (n - 1) for d, n in zip(dilation, shape[2:], strict=True)]
            sides = tuple(side for total in totals for side in (total // 2, total - total // 2))
        elif isinstance(padding, str):
            raise ValueError(f"unknown padding {padding!r}: accepted are 'same', 'valid', a number, or two numbers")
        else:
            vertical, horizontal = _pair(padding, "padding")
            sides = (vertical, vertical, horizontal, horizontal)
        return cls(shape, stride, sides, dilation, int(groups))

    @classmethod
    def of_module(cls, conv: nn.Conv2d) -> Geometry:
        """The geometry of a module, less its padding where that is not of zeros (reflect, circular, ...)."""
        padding = conv.padding if conv.padding_mode == "zeros" else 0
        return cls.of(conv.weight.shape, conv.stride, padding, conv.dilation, conv.groups)

    @classmethod
    def of_numbers(cls, numbers: Sequence[int]) -> Geometry:
        """The inverse of ``numbers``."""
        n = tuple(numbers)
        return cls(n[:4], n[4:6], n[6:10], n[10:12], n[12])

    @property
    def in_channels(self) -> int:
        return self.weight_shape[1] * self.groups

    def output_shape(self, input_shape: Sequence[int]) -> tuple[int, int, int, int]:
        """(N, K, P, Q) for an input (N, C, H, W).

        Raises:
            ValueError: the input does not fit this convolution.
        """
        if len(input_shape) != 4:
            raise ValueError(f"input has shape {tuple(input_shape)}: (N, C, H, W) is needed")
        n, c, h, w = input_shape
        if c != self.in_channels:
            raise ValueError(f"input has {c} channels: this convolution takes {self.in_channels}")
        top, bottom, left, right = self.padding
        reach = [d * (size - 1) + 1 for d, size in zip(self.dilation, self.weight_shape[2:], strict=True)]
        if h + top + bottom < reach[0] or w + left + right < reach[1]:
            raise ValueError(
                f"input of {h}x{w} pixels, padded by {self.padding}, is smaller than the kernel's reach of "
                f"{reach[0]}x{reach[1]}"
            )
        p = (h + top + bottom - reach[0]) // self.stride[0] + 1
        q = (w + left + right - reach[1]) // self.stride[1] + 1
        return n, self.weight_shape[0], p, q


def _pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    pair = (value,) if isinstance(value, (int, float)) else tuple(value)
    if len(pair) not in (1, 2) or not all(isinstance(n, (int, Integral)) for n in pair):
        raise ValueError(f"{name} {value!r}: accepted are one integer, or two (height, width)")
    return int(pair[0]), int(pair[-1])
