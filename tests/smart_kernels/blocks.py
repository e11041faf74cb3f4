"""Masks of blocks for the tests, and what the kernels over them give is checked by."""

import torch

from smart_kernels.backends import Affine

# Of the largest output: sums in float32, each result rounded once.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def block_mask(shape, block, density):
    """A bool mask of a weight (K, C, R, S) that keeps blocks of one tap at random."""
    k, c, r, s = shape
    kept = torch.rand(-(-k // block[0]), -(-c // block[1]), r, s) < density
    return kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:k, :c].contiguous()


def block_problem(shape, block, densities=(0.4, 0.4), dtype=torch.float32):
    """A weight and the masks of two paths over it."""
    masks = {name: block_mask(shape, block, d) for name, d in zip(("clean", "adv"), densities, strict=True)}
    return torch.randn(shape).to(dtype), masks


def relative_error(actual, expected):
    """Of what the reference finds finite: where it does not, an exact zero weight may have met infinity."""
    finite = expected.isfinite()
    if not finite.any():
        return 0.0
    assert actual[finite].isfinite().all()
    return float((actual.double() - expected)[finite].abs().max() / expected[finite].abs().max().clamp_min(1e-30))


def epilogue(bits, geometry, shape, dtype, paths=()):
    """Scale, bias, residual, ReLU and a second result, as bits say."""
    channels = geometry.weight_shape[0]

    def numbers():
        return torch.randn(*paths, channels).to(dtype)

    scale, bias = numbers() if bits & 1 else None, numbers() if bits & 2 else None
    residual = torch.randn(geometry.output_shape(shape)).to(dtype) if bits & 4 else None
    affine = Affine(numbers(), numbers(), bool(bits & 32)) if bits & 16 else None
    return scale, bias, residual, bool(bits & 8), affine


def check(results, expected, affine, dtype):
    """Compares one or two results with the reference's one."""
    y, *seconds = results if isinstance(results, tuple) else (results,)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, expected) < TOLERANCE[dtype]
    assert len(seconds) == (affine is not None)
    for second in seconds:
        expected = expected * affine.scale.double()[:, None, None] + affine.bias.double()[:, None, None]
        assert relative_error(second, expected.relu() if affine.relu else expected) < TOLERANCE[dtype]
