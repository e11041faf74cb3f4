"""Fake kernels of the convolution operators, by which torch traces them: what results look like, and no numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smart_kernels.geometry import Geometry


def empty_result(x: Tensor, geometry: Sequence[int], layout: torch.memory_format = torch.channels_last) -> Tensor:
    """(N, K, P, Q) of x's dtype on its device, unfilled, for x (N, C, H, W) and ``Geometry.numbers``."""
    shape = Geometry.of_numbers(geometry).output_shape(x.shape)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def register(kernel: str, layout: torch.memory_format = torch.channels_last) -> None:
    """Gives ``sparse_conv2d_<kernel>`` and ``sparse_conv2d_affine_<kernel>`` their fake kernels.

    Both take x first, and ``Geometry.numbers`` as the argument called ``geometry``; the latter has a second result.
    """
    name = f"sparse_conv2d_{kernel}"
    schema = getattr(torch.ops.smart_kernels, name).default._schema
    place = [argument.name for argument in schema.arguments].index("geometry")

    @torch.library.register_fake(f"smart_kernels::{name}")
    def _(*arguments: object) -> Tensor:
        return empty_result(arguments[0], arguments[place], layout)

    @torch.library.register_fake(f"smart_kernels::sparse_conv2d_affine_{kernel}")
    def _(*arguments: object) -> tuple[Tensor, Tensor]:
        x, geometry = arguments[0], arguments[place]
        return empty_result(x, geometry, layout), empty_result(x, geometry, layout)
