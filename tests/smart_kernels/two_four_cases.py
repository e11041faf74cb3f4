"""Layers for the tests of the 2:4 kernel, and what they compute."""

import torch
import torch.nn.functional as F

from smart_kernels.geometry import Geometry
from smart_kernels.packing import TwoFourWeight

DTYPES = [torch.float16, torch.bfloat16]


def integers(*shape, largest=1, dtype=torch.float16):
    return torch.randint(-largest, largest + 1, shape).to(dtype)


def layer(shape, density=0.2, dtype=torch.float16, **geometry):
    """A packed weight of two paths, and its geometry."""
    weight = integers(*shape, dtype=dtype)
    packed = TwoFourWeight(weight, {name: torch.rand(shape) < density for name in ("clean", "adv")})
    return packed, Geometry.of(shape, **geometry)


def reference(x, packed, geometry, path, scale=None, bias=None, residual=None, relu=False):
    top, bottom, left, right = geometry.padding
    y = F.conv2d(
        F.pad(x.double(), (left, right, top, bottom)),
        packed.dense(path).double(),
        stride=geometry.stride,
        dilation=geometry.dilation,
    )
    for value, apply in ((scale, torch.mul), (bias, torch.add)):
        y = y if value is None else apply(y, value.double()[:, None, None])
    y = y if residual is None else y + residual.double()
    return y.relu() if relu else y


CASES = {
    "3x3": ((64, 32, 3, 3), (2, 9, 7), {"padding": 1}),
    "3x3, stride 2": ((40, 16, 3, 3), (2, 11, 8), {"padding": 1, "stride": 2}),
    "1x1": ((72, 136, 1, 1), (1, 6, 5), {}),
    "1x1, stride 2": ((24, 40, 1, 1), (3, 7, 7), {"stride": 2}),
    "one pixel": ((136, 8, 3, 3), (5, 1, 1), {"padding": 1}),
    "5x2, dilated, uneven": ((8, 24, 5, 2), (1, 12, 9), {"padding": (3, 1), "stride": (1, 2), "dilation": (2, 3)}),
    "padding of same": ((16, 8, 2, 4), (1, 6, 6), {"padding": "same"}),
    "more padding than input": ((8, 8, 3, 3), (1, 2, 2), {"padding": 4}),
}

# Of the kernel for Hopper, whose copies have 32 or 64 channels.
HOPPER_CASES = {
    "rows of 128 bytes": ((64, 64, 3, 3), (2, 9, 7), {"padding": 1}),
    "rows of 64 bytes": ((40, 32, 3, 3), (2, 11, 8), {"padding": 1, "stride": 2}),
    "last block cut short": ((136, 192, 1, 1), (1, 6, 5), {}),
    "1x1, stride 2": ((24, 96, 1, 1), (3, 15, 7), {"stride": 2}),
    "one pixel": ((136, 32, 3, 3), (5, 1, 1), {"padding": 1}),
    "5x2, dilated, uneven": ((8, 32, 5, 2), (1, 12, 9), {"padding": (3, 1), "stride": (1, 2), "dilation": (2, 3)}),
    "padding of same": ((16, 64, 2, 4), (1, 6, 6), {"padding": "same"}),
    "more padding than input": ((8, 32, 3, 3), (1, 2, 2), {"padding": 4}),
    "several tiles of pixels": ((72, 32, 1, 1), (3, 10, 13), {}),
    "several tiles of pixels, stride 2": ((40, 64, 3, 3), (2, 23, 21), {"padding": 1, "stride": 2}),
}


def slab_masks(shape, keep, tall=64):
    """Masks of two paths, 2:4 inside of those runs of 16 input channels that ``tall`` output channels keep at a tap."""
    k, c, r, s = shape
    masks = {}
    for name in ("clean", "adv"):
        runs = torch.rand(-(-k // tall), c // 16, r, s) < keep
        inside = torch.rand(k, c // 4, 4, r, s).argsort(dim=2).argsort(dim=2) < 2
        masks[name] = runs.repeat_interleave(tall, 0)[:k].repeat_interleave(16, 1) & inside.flatten(1, 2)
    return masks
