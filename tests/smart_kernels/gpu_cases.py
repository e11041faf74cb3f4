"""Layers for the tests of the GPU kernels: shape of the weight, of the input, and the geometry."""

import torch

DIRECT_CASES = {
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

TWO_FOUR_CASES = {
    "3x3": ((64, 32, 3, 3), (2, 9, 7), {"padding": 1}),
    "3x3, stride 2": ((40, 16, 3, 3), (2, 11, 8), {"padding": 1, "stride": 2}),
    "1x1": ((72, 136, 1, 1), (1, 6, 5), {}),
    "1x1, stride 2": ((24, 40, 1, 1), (3, 7, 7), {"stride": 2}),
    "one pixel": ((136, 8, 3, 3), (5, 1, 1), {"padding": 1}),
    "5x2, dilated, uneven": ((8, 24, 5, 2), (1, 12, 9), {"padding": (3, 1), "stride": (1, 2), "dilation": (2, 3)}),
    "padding of same": ((16, 8, 2, 4), (1, 6, 6), {"padding": "same"}),
    "more padding than input": ((8, 8, 3, 3), (1, 2, 2), {"padding": 4}),
    "odd output channels": ((43, 16, 3, 3), (2, 7, 5), {"padding": 1}),
    "one output channel": ((1, 8, 1, 1), (2, 5, 3), {}),
    "an image": ((16, 3, 7, 7), (2, 9, 11), {"padding": 3, "stride": 2}),
    "one channel": ((10, 1, 3, 3), (3, 6, 5), {"padding": 1}),
    "two small groups": ((18, 12, 3, 3), (2, 7, 5), {"padding": 1, "groups": 2}),
    "20 input channels": ((40, 20, 1, 1), (2, 5, 5), {}),
}

# Whose slabs leave out the columns of other groups: tiles are as tall as slabs that do so together, 64 or 32 channels.
GROUPED_CASES = {
    "two groups of 64": (64, (128, 32, 3, 3), (2, 5, 4), {"padding": 1, "groups": 2}),
    "groups of 32": (32, (96, 32, 3, 3), (2, 9, 8), {"padding": 1, "groups": 3, "stride": 2}),
    "groups of 4, as ResNeXt's": (32, (128, 4, 3, 3), (1, 5, 5), {"padding": 1, "groups": 32}),
    "groups across slabs": (64, (144, 16, 3, 3), (1, 5, 5), {"padding": 1, "groups": 3}),
    "more outputs than inputs": (64, (128, 16, 1, 1), (2, 5, 4), {"groups": 2}),
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
    "odd output channels": ((75, 32, 3, 3), (2, 7, 5), {"padding": 1}),
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


def checkered_masks(shape):
    """Masks of two paths of which each 32 output channels keep half of the runs of 16 input channels, 64 all."""
    k, c, *_ = shape
    place = torch.arange(-(-k // 32))[:, None, None, None] + torch.arange(c // 16)[:, None, None]
    runs = [((place + path) % 2 == 0).repeat_interleave(32, 0)[:k].repeat_interleave(16, 1) for path in range(2)]
    return {name: runs[path] & (torch.rand(shape) < 0.4) for path, name in enumerate(("clean", "adv"))}
