"""Fake kernels of the bitmap operators, which csrc/cuda/bitmap.cu defines where the library was built with CUDA.

Arguments that both take:

    x: (N, C, H, W), float16 or bfloat16; read as channels_last, and copied if it is not.
    values, bits, starts, first_slab, largest: a :class:`smart_kernels.packing.bitmap.Operand`, of a weight that has
        checked its bits and starts.
    geometry: ``Geometry.numbers``.
    scale, bias: (K,), float32; (2, K) if ``order`` is given.
    order, first: None, or (N,) int32, the samples sorted by path, and (1,) int32, how many run on the first, whose
        slabs begin at 0; ``first_slab`` is the second's then.
    tile: which of ``TILES``, -1 chooses one by the size of the layer.
    splits: thread blocks that share the columns of a tile, whose sums a second kernel adds; 0 for as many as pay.

Both give results in channels_last.
"""

from __future__ import annotations

from smart_kernels import fakes, native

TILES = ("large", "tall", "flat", "small", "narrow")


def missing() -> str | None:
    """Why there are no bitmap operators, in one sentence; None if there are."""
    return native.gpu_operator_missing("sparse_conv2d_bitmap")


if missing() is None:
    fakes.register("bitmap")
