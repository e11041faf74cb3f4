"""Layers for the tests of the direct kernel, and what they compute."""

import torch
import torch.nn.functional as F

from smart_kernels.geometry import Geometry
from smart_kernels.packing import UnstructuredWeight

CASES = {
    "3x3": ((20, 24, 3, 3), (2, 9, 7), {"padding": 1}),
    "3x3, stride 2": ((72, 16, 3, 3), (2, 11, 8), {"padding": 1, "stride": 2}),
    "1x1": ((16, 130, 1, 1), (1, 12, 11), {}),
    "1x1, stride 2": ((5, 7, 1, 1), (3, 7, 7), {"stride": 2}),
    "one pixel": ((66, 8, 3, 3), (5, 1, 1), {"padding": 1}),
    "5x2, dilated, uneven": ((3, 20, 5, 2), (1, 12, 9), {"padding": (3, 1), "stride": (1, 2), "dilation": (2, 3)}),
    "padding of same": ((6, 3, 2, 4), (1, 6, 6), {"padding": "same"}),
    "more padding than input": ((8, 8, 3, 3), (1, 2, 2), {"padding": 4}),
    "two groups": ((40, 8, 3, 3), (2, 6, 5), {"padding": 1, "groups": 2}),
    "as many groups as channels": ((6, 1, 3, 3), (1, 7, 9), {"padding": 1, "groups": 6}),
    "large kernel": ((2, 2, 16, 16), (1, 20, 18), {"padding": 3}),
}


def integers(*shape, largest=2):
    return torch.randint(-largest, largest + 1, shape).float()


def layer(shape, density=0.2, **geometry):
    """A packed weight of two paths, and its geometry."""
    masks = {name: torch.rand(shape) < density for name in ("clean", "adv")}
    return UnstructuredWeight(integers(*shape), masks), Geometry.of(shape, **geometry)


def reference(x, packed, geometry, path, scale=None, bias=None, residual=None, relu=False):
    top, bottom, left, right = geometry.padding
    y = F.conv2d(
        F.pad(x.double(), (left, right, top, bottom)),
        packed.dense(path).double(),
        stride=geometry.stride,
        dilation=geometry.dilation,
        groups=geometry.groups,
    )
    for value, apply in ((scale, torch.mul), (bias, torch.add)):
        y = y if value is None else apply(y, value.double()[:, None, None])
    y = y if residual is None else y + residual.double()
    return y.relu() if relu else y
