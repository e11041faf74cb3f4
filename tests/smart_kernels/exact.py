"""Layers of small integers, whose sums any dtype holds: kernels' results must be equal to the truth, not close."""

import torch

from smart_kernels import reference as truth
from smart_kernels.geometry import Geometry


def integers(*shape, largest=1, dtype=torch.float32):
    return torch.randint(-largest, largest + 1, shape).to(dtype)


def two_masks(shape, density=0.2):
    return {name: torch.rand(shape) < density for name in ("clean", "adv")}


def layer(packing, shape, density=0.2, dtype=torch.float32, **geometry):
    """A packed weight of two paths, and its geometry."""
    geometry = Geometry.of(shape, **geometry)
    return packing.of(integers(*shape, dtype=dtype), two_masks(shape, density), geometry.groups), geometry


def reference(x, packed, geometry, path, scale=None, bias=None, residual=None, relu=False):
    """The convolution in float64."""
    return truth.sparse_conv2d(x.double(), packed.dense(path), geometry, scale, bias, residual, relu)
