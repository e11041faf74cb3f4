"""Fake kernels of the 2:4 operators, which csrc/cuda/two_four.cu defines where the library was built with CUDA.

Arguments that both take:

    x: (N, C, H, W), float16 or bfloat16; read as channels_last, and copied if it is not.
    values, metadata, extra_values, extra_metadata, extra_columns, extra_starts, first_slab: a
        :class:`smart_kernels.packing.two_four.Operand`, of a weight that has checked every index.
    geometry: ``Geometry.numbers``.
    scale, bias: (K,), float32; (2, K) if ``order`` is given.
    order, first: None, or (N,) int32, the samples sorted by path, and (1,) int32, how many run on the first, whose
        slabs begin at 0; ``first_slab`` is the second's then.
    tile: which of ``TILES``, -1 chooses one by the size of the layer; from ``len(TILES)`` on, which of ``WGMMA_TILES``.
    column_runs: ``TwoFourWeight.runs`` of the path; with it tiles are at most 64 channels tall, or 32 where
        each slab has its own.
    splits: thread blocks that share the columns of a tile, whose sums a second kernel adds; 0 for as many as pay.

Both give results in channels_last.
"""

from __future__ import annotations

import torch

from smart_kernels import fakes, native

TILES = ("large", "flat", "small", "narrow")
TILE_SLABS = (4, 2, 2, 1)  # slabs of 32 output channels that each has
WGMMA_TILES = ("wgmma tall", "wgmma twin")  # of the kernel for Hopper, csrc/cuda/wgmma_body.h


def missing() -> str | None:
    """Why there are no 2:4 operators, in one sentence; None if there are."""
    return native.gpu_operator_missing("sparse_conv2d_two_four")


def wgmma_missing(device: int) -> str | None:
    """Why ``WGMMA_TILES`` do not run on a CUDA device, in one sentence; None if they do."""
    if (why := missing()) is not None:
        return why
    return torch.ops.smart_kernels.wgmma_missing(device) or None


if missing() is None:
    fakes.register("two_four")
