"""What the tests of both formats for tensor cores share: layers, and matrices as kernels walk them."""

import torch

PROBLEMS = [
    ((32, 16, 3, 3), (0.2, 0.2)),
    ((40, 20, 1, 3), (0.2, 0.5)),
    ((33, 136, 1, 1), (0.3, 0.2)),
    ((3, 5, 2, 3), (0.9, 0.1)),
    ((20, 48, 1, 1), (1.0, 0.0)),
]


def problem(shape, densities=(0.2, 0.2), dtype=torch.float16):
    """A weight and the masks of two paths."""
    weight = torch.randn(shape).to(dtype)
    return weight, {name: torch.rand(shape) < d for name, d in zip(("clean", "adv"), densities, strict=True)}


def empty_matrix(packed):
    """Rows of output channels in slabs of 32, columns of taps and channels in blocks of 128; float64."""
    return torch.zeros(packed.slabs * 32, packed.blocks * 128, dtype=torch.float64)


def weight_of(matrix, shape):
    """The (K, C, R, S) that a matrix holds, and nothing beside it."""
    k, c, r, s = shape
    channels = -(-c // 8) * 8
    assert not matrix[k:].any() and not matrix[:, r * s * channels :].any()
    return matrix[:k, : r * s * channels].reshape(k, r, s, channels)[..., :c].permute(0, 3, 1, 2)
