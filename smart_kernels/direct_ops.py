"""Fake kernels of the direct operators, which csrc/cuda/direct.cu defines where the library was built with CUDA.

Arguments that both take:

    x: (N, C, H, W), float32; read as channels_last, and copied if it is not.
    values, codes, segments, slab_channels: of a :class:`smart_kernels.packing.UnstructuredWeight`, which has checked
        every index; codes are bytes.
    geometry: ``Geometry.numbers``.
    first_segment, last_segment: those of each row that the path runs over.
    scale, bias: (K,), float32; (2, K) if ``order`` is given.
    order, first: None, or (N,) int32, the samples sorted by path, and (1,) int32, how many run on the first.
    tile: which of ``TILES``; -1 chooses by the size of the layer.

Both give results in channels_last.
"""

from __future__ import annotations

from smart_kernels import fakes, native

TILES = ("large", "medium", "small")
MAX_CODES = 256  # of a slab: codes are bytes


def missing() -> str | None:
    """Why there are no direct operators, in one sentence; None if there are."""
    return native.gpu_operator_missing("sparse_conv2d_direct")


if missing() is None:
    fakes.register("direct")
