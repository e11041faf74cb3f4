"""The custom operator over the kernel for Hopper in Gluon, which importing this module imports: so it does Triton's.

It is not traced into as the others are: what compiles graphs knows no Gluon. So it is an operator of its own that
:mod:`smart_kernels.triton_ops` calls where the schedule says so, and that fills tensors it is given.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from smart_kernels.backends.base import Verdict
from smart_kernels.backends.schedules import Schedule
from smart_kernels.geometry import Geometry
from smart_kernels.kernels import block_tma as kernels

CAPABILITY = 9  # the only one with wgmma
DTYPES = (torch.float16, torch.bfloat16)
ITEMSIZE = 2
ALIGNED = 16  # bytes, of all that TMA reads from
WIDEST_SWIZZLE = 128  # bytes
WGMMA_ROWS = 64  # of a warpgroup's product


def covers(
    geometry: Geometry, values: Tensor, rows_per_tile: int, input_size: Sequence[int], samples: bool = False
) -> Verdict:
    """Whether the kernel computes a convolution; the Triton kernels run what it does not.

    Args:
        values: (blocks, BLOCK_OUT, BLOCK_IN) of a packed weight.
        input_size: height and width.
        samples: whether each sample has its own path.
    """
    blocks, block_out, block_in = values.shape
    if values.is_cuda and torch.cuda.get_device_capability(values.device)[0] != CAPABILITY:
        return _not("compute capability 9.0")
    if values.dtype not in DTYPES:
        return _not("float16 or bfloat16")
    if samples:
        return _not("all samples on one path")
    if rows_per_tile > 1 or block_out < WGMMA_ROWS:
        return _not(f"blocks of {WGMMA_ROWS} output channels or more")
    if not blocks:
        return _not("a weight that keeps some block")
    if geometry.in_channels * ITEMSIZE % ALIGNED:
        return _not(f"input channels in multiples of {ALIGNED // ITEMSIZE}")
    # A slab's channels beyond the last would be those of another group or pixel.
    if geometry.weight_shape[1] % block_in and (geometry.groups > 1 or geometry.stride[1] > 1):
        return _not(f"input channels in multiples of the block's {block_in} where there are groups or strides")
    if any(size % stride for size, stride in zip(input_size, geometry.stride, strict=True)):
        return _not("an input whose height and width are multiples of the stride")
    return Verdict(True)


def _not(needed: str) -> Verdict:
    return Verdict(False, f"the kernel with TMA needs {needed}")


def box_of(pixels: int, images: int, height: int, width: int) -> tuple[int, int, int]:
    """Images, rows and columns of the tiles of ``pixels`` that cover all outputs with the fewest; the widest of these.

    Neighbours in a row share the inputs of their taps.
    """
    sizes = [1 << i for i in range(pixels.bit_length())]
    boxes = [box for box in itertools.product(sizes, repeat=3) if box[0] * box[1] * box[2] == pixels]
    return min(boxes, key=lambda box: (_tiles(box, images, height, width), -box[2], -box[1]))


def _tiles(box: tuple[int, int, int], images: int, height: int, width: int) -> int:
    return -(-images // box[0]) * -(-height // box[1]) * -(-width // box[2])


def layout(block_in: int, rank: int) -> NVMMASharedLayout:
    """How boxes lie in shared memory: rows of ``block_in`` numbers, swizzled over as many bytes as they have."""
    return NVMMASharedLayout(min(block_in * ITEMSIZE, WIDEST_SWIZZLE), ITEMSIZE * 8, rank=rank)


def input_descriptor(x: Tensor, stride: tuple[int, int], box: tuple[int, int, int], block_in: int) -> TensorDescriptor:
    """How TMA sees the input, (N, C, H, W) in channels_last: as the kernel says."""
    n, c, h, w = x.shape
    down, across = stride
    shape = [n, h // down, down, w // across, across * c]
    strides = [h * w * c, down * w * c, w * c, across * c, 1]
    return TensorDescriptor(_aligned(x), shape, strides, [box[0], box[1], 1, box[2], block_in], layout(block_in, 5))


def values_descriptor(values: Tensor, step: int) -> TensorDescriptor:
    """How TMA sees the blocks (blocks, BLOCK_OUT, BLOCK_IN): as the rows of all of them, those of a step together."""
    blocks, block_out, block_in = values.shape
    shape, strides = [blocks * block_out, block_in], [block_in, 1]
    return TensorDescriptor(_aligned(values), shape, strides, [step * block_out, block_in], layout(block_in, 2))


def _aligned(tensor: Tensor) -> Tensor:
    """A part of another tensor may begin anywhere."""
    return tensor.clone() if tensor.data_ptr() % ALIGNED else tensor


@torch.library.custom_op("smart_kernels::convolve_blocks_tma", mutates_args=("y", "second", "partial"))
def convolve_blocks_tma(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    segments: Tensor,
    geometry: list[int],
    first_segment: int,
    last_segment: int,
    schedule: list[int],
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    second_scale: Tensor | None,
    second_bias: Tensor | None,
    second: Tensor | None,
    partial: Tensor | None,
    relu: bool,
    second_relu: bool,
) -> None:
    """Fills ``y``, and ``second`` if there is one; or ``partial`` with the sums of each of its programs.

    Args:
        x: (N, C, H, W) in channels_last.
        schedule: of a settled :class:`Schedule`.
        residual, y, second: (N, K, P, Q) in channels_last.
        partial: (splits, N, P, Q, K) float32.
    """
    how, by = Geometry.of_numbers(geometry), Schedule.of_numbers(schedule)
    n, c, _, _ = x.shape
    k, group_in, r, s = how.weight_shape
    _, _, p, q = how.output_shape(x.shape)
    _, block_out, block_in = values.shape
    box = box_of(by.pixels, n, p, q)
    out_tiles = -(-k // block_out)
    grid = (_tiles(box, n, p, q) * out_tiles, by.splits)
    # In strides, rounded up: TMA counts these.
    lift = [-(-padding // stride) for padding, stride in zip(how.padding[::2], how.stride, strict=True)]
    shift = [up * stride - padding for up, stride, padding in zip(lift, how.stride, how.padding[::2], strict=True)]
    with torch.cuda.device_of(x):
        kernels.convolve[grid](
            input_descriptor(x, how.stride, box, block_in), values_descriptor(values, by.channels // block_in),
            codes, segments,
            scale, bias, residual, y, second_scale, second_bias, second, partial,
            c, group_in, n, p, q, k, k // how.groups, -(-p // box[1]), -(-q // box[2]), out_tiles,
            first_segment, last_segment, *lift, *shift, *how.dilation,
            TAPS=r * s, S=s, STRIDE_H=how.stride[0], STRIDE_W=how.stride[1], RELU=relu, SECOND_RELU=second_relu,
            BLOCK_K=by.channels, STAGES=by.stages, WARPS=by.warps, num_warps=by.warps,
        )  # fmt: skip


@convolve_blocks_tma.register_fake
def _(*arguments: object) -> None:
    return None
