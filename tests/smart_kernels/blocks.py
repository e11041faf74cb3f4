"""Masks of blocks, for the tests."""

import torch


def block_mask(shape, block, density):
    """A bool mask of a weight (K, C, R, S) that keeps blocks of one tap at random."""
    k, c, r, s = shape
    kept = torch.rand(-(-k // block[0]), -(-c // block[1]), r, s) < density
    return kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:k, :c].contiguous()


def block_problem(shape, block, densities=(0.4, 0.4), dtype=torch.float32):
    """A weight and the masks of two paths over it."""
    masks = {name: block_mask(shape, block, d) for name, d in zip(("clean", "adv"), densities, strict=True)}
    return torch.randn(shape).to(dtype), masks
