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

from collections.abc import Sequence

import torch
from torch import Tensor

from smart_kernels import native
from smart_kernels.geometry import Geometry

TILES = ("large", "medium", "small")
MAX_CODES = 256  # of a slab: codes are bytes


def missing() -> str | None:
    """Why there are no direct operators, in one sentence; None if there are."""
    return native.gpu_operator_missing("sparse_conv2d_direct")


if missing() is None:

    @torch.library.register_fake("smart_kernels::sparse_conv2d_direct")
    def _(
        x,
        values,
        codes,
        segments,
        geometry,
        slab_channels,
        first_segment,
        last_segment,
        scale,
        bias,
        residual,
        relu,
        order,
        first,
        tile=-1,
    ):
        return _result(x, geometry)

    @torch.library.register_fake("smart_kernels::sparse_conv2d_affine_direct")
    def _(
        x,
        values,
        codes,
        segments,
        geometry,
        slab_channels,
        first_segment,
        last_segment,
        scale,
        bias,
        residual,
        relu,
        order,
        first,
        affine_scale,
        affine_bias,
        affine_relu,
        tile=-1,
    ):
        return _result(x, geometry), _result(x, geometry)


def _result(x: Tensor, geometry: Sequence[int]) -> Tensor:
    shape = Geometry.of_numbers(geometry).output_shape(x.shape)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
