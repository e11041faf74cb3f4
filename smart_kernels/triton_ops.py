"""The custom operators over the Triton kernels. Importing this module imports Triton, so backends do it when they bind.

Arguments that both take:

    x: (N, C, H, W); read as channels_last, and copied if it is not.
    values, codes, rows, starts, segments, rows_per_tile: of a :class:`smart_kernels.packing.BlockWeight`, which has
        checked every index.
    geometry: ``Geometry.numbers``.
    first_segment, last_segment: the path; not read if ``order`` is given.
    items: of an average tile.
    schedule: ``Schedule.numbers``; if empty the one kept for such a layer is taken.
    scale, bias: (K,); (2, K) if ``order`` is given.
    order, first: None, or (N,) int32, the samples sorted by path, and (1,) int32, how many run on the first.

float32 is multiplied as torch.backends.cudnn.conv.fp32_precision tells cuDNN to: in TF32, or else as three products of
TF32 numbers, which come within a few roundings of float32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton
from triton.runtime import JITFunction

from smart_kernels import fakes
from smart_kernels.backends import schedules
from smart_kernels.backends.schedules import Schedule
from smart_kernels.backends.triton import covered_by_tma
from smart_kernels.fakes import empty_result
from smart_kernels.geometry import Geometry
from smart_kernels.kernels import block as kernels
from smart_kernels.packing.block import MAX_ROWS

MAX_INDEX = 2**31 - 1
MAX_PIXELS = MAX_INDEX - 2**16  # what tiles reach beyond the last is counted too
REDUCED = (8, 64)  # pixels x channels that one program adds up


@triton_op("smart_kernels::sparse_conv2d_triton", mutates_args=())
def sparse_conv2d_triton(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    rows: Tensor,
    starts: Tensor,
    segments: Tensor,
    rows_per_tile: int,
    geometry: list[int],
    first_segment: int,
    last_segment: int,
    items: int,
    schedule: list[int],
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    order: Tensor | None,
    first: Tensor | None,
) -> Tensor:
    """relu(conv2d(x, W * M_path) * scale + bias + residual), (N, K, P, Q) in channels_last."""
    weight = (values, codes, rows, starts, segments, rows_per_tile)
    how = (geometry, first_segment, last_segment, items, schedule)
    y = empty_result(x, geometry)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _launch(x, weight, how, (scale, bias, residual, relu), (None, None, None, False), (order, first), y)
    return y


@triton_op("smart_kernels::sparse_conv2d_affine_triton", mutates_args=())
def sparse_conv2d_affine_triton(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    rows: Tensor,
    starts: Tensor,
    segments: Tensor,
    rows_per_tile: int,
    geometry: list[int],
    first_segment: int,
    last_segment: int,
    items: int,
    schedule: list[int],
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    order: Tensor | None,
    first: Tensor | None,
    affine_scale: Tensor,
    affine_bias: Tensor,
    affine_relu: bool,
) -> tuple[Tensor, Tensor]:
    """The same, and relu(that * affine_scale + affine_bias) beside it."""
    weight = (values, codes, rows, starts, segments, rows_per_tile)
    how = (geometry, first_segment, last_segment, items, schedule)
    y, second = empty_result(x, geometry), empty_result(x, geometry)
    affine = (affine_scale, affine_bias, second, affine_relu)
    with torch.cuda.device_of(x):
        _launch(x, weight, how, (scale, bias, residual, relu), affine, (order, first), y)
    return y, second


fakes.register("triton")


def _launch(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int],
    how: tuple[list[int], int, int, int, list[int]],
    epilogue: tuple[Tensor | None, Tensor | None, Tensor | None, bool],
    affine: tuple[Tensor | None, Tensor | None, Tensor | None, bool],
    samples: tuple[Tensor | None, Tensor | None],
    y: Tensor,
) -> None:
    values, codes, rows, starts, segments, rows_per_tile = weight
    numbers, first_segment, last_segment, items, schedule_numbers = how
    scale, bias, residual, relu = epilogue
    second_scale, second_bias, second, second_relu = affine
    order, first = samples
    geometry = Geometry.of_numbers(numbers)
    _check(x, values, geometry, rows_per_tile, (scale, bias, second_scale, second_bias), residual, order, first)
    (k, group_in, r, s), (n, _, p, q) = geometry.weight_shape, y.shape
    _, c, h, w = x.shape
    if isinstance(n, int):  # and not a batch that may vary
        _check_sizes(x, n * p * q)
        if n == 0:
            return
    asked_for = Schedule.of_numbers(schedule_numbers) if schedule_numbers else None
    schedule = choose_schedule(x, geometry, values, rows_per_tile, items, n * p * q, order is not None, asked_for)
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    block_out, block_in = values.shape[1:]
    out_tiles = -(-k // (block_out * rows_per_tile))
    # Sorted by path, the last tile of the first path's pixels may be cut short: that can make one tile more.
    tiles = -(-(n * p * q) // schedule.pixels) + (order is not None)
    partial = None
    if schedule.splits > 1:
        partial = torch.empty((schedule.splits, n, p, q, k), dtype=torch.float32, device=x.device)
    results = (scale, bias, residual, y, second_scale, second_bias, second)
    written = results if partial is None else (None,) * len(results)
    several = rows_per_tile > 1
    convolve, reduce = kernels.convolve, kernels.reduce
    if schedule.tma:
        from smart_kernels.tma_ops import convolve_blocks_tma  # Gluon is an experimental part of Triton

        convolve_blocks_tma(
            x, values, codes, segments, numbers, first_segment, last_segment, schedule.numbers,
            *written, partial, relu, second_relu,
        )  # fmt: skip
    else:
        wrap_triton(convolve)[(tiles * out_tiles, schedule.splits)](
            x, values, codes, rows if several else None, starts if several else None, segments, order, first,
            *written, partial,
            h, w, c, group_in, q, k, k // geometry.groups, p * q, n * p * q, out_tiles, first_segment, last_segment,
            *geometry.stride, geometry.padding[0], geometry.padding[2], *geometry.dilation,
            R=r, S=s, BLOCK_OUT=block_out, BLOCK_IN=block_in, ROWS=rows_per_tile, MAX_ROWS=MAX_ROWS,
            CONTIGUOUS=contiguous_channels(c, group_in, block_in), RELU=relu, SECOND_RELU=second_relu,
            PRECISION=float32_precision(), WIDEN=_is_interpreted() and x.dtype == torch.bfloat16,
            CACHE=".ca" if schedule.through_l1 else "",
            BLOCK_N=schedule.pixels, BLOCK_K=schedule.channels,
            num_warps=schedule.warps, num_stages=schedule.stages,
        )  # fmt: skip
    if partial is not None:
        pixels, channels = REDUCED
        tiles = -(-(n * p * q) // pixels) + (order is not None)
        wrap_triton(reduce)[(tiles, -(-k // channels))](
            partial, order, first, *results, k, p * q, n * p * q, schedule.splits,
            RELU=relu, SECOND_RELU=second_relu, BLOCK_M=channels, BLOCK_N=pixels, num_warps=4,
        )  # fmt: skip


def choose_schedule(
    x: Tensor,
    geometry: Geometry,
    values: Tensor,
    rows_per_tile: int,
    items: int,
    pixels: int | torch.SymInt,
    samples: bool,
    schedule: Schedule | None = None,
) -> Schedule:
    """The schedule given, or else the one kept for the layer, settled.

    A number of ``pixels`` that may vary counts as one that fills the GPU. Layers that are alike share a schedule; of
    those that it fits, the kernel with TMA covers some: the others take the default.

    Raises:
        ValueError: a schedule is given that this layer cannot run by.
    """
    block = values.shape[1], values.shape[2]
    tile = block[0] * rows_per_tile
    gpu, processors = _gpu(x.device)
    known = pixels if isinstance(pixels, int) else schedules.MANY_PIXELS
    covered = functools.partial(covered_by_tma, geometry, values, rows_per_tile, x.shape[2:], samples)
    if schedule is None:
        layer = schedules.layer_name(geometry, values.dtype, block, tile, items, known)
        contiguous = contiguous_channels(geometry.in_channels, geometry.weight_shape[1], block[1])
        kind = schedules.kind_of(values.element_size(), contiguous, float32_precision())
        schedule = schedules.find(gpu, layer, kind, tile)
        if schedule.tma and not (schedules.tma_allowed() and covered()):
            schedule = schedules.default(kind, tile)
    elif schedule.tma and not (verdict := covered()):
        raise ValueError(f"{schedule}: {verdict.why}; take a schedule without TMA")
    tiles = -(-known // schedule.pixels) * -(-geometry.weight_shape[0] // tile)
    return schedules.settle(schedule, block[1], tiles, items, processors)


def float32_precision() -> str:
    """What Triton calls the precision that torch allows convolutions of float32."""
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "tf32x3"


def _is_interpreted() -> bool:
    return not isinstance(kernels.convolve, JITFunction)


def _gpu(device: torch.device) -> tuple[str, int]:
    """Name and number of multiprocessors."""
    if device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        return properties.name, properties.multi_processor_count
    return "", schedules.PROCESSORS


def contiguous_channels(channels: int, group_in: int, block_in: int) -> int:
    """Channels of an item that lie together, aligned, and are either all there or all beyond the last: at most 16."""
    return next(size for size in (16, 8, 4, 2, 1) if channels % size == group_in % size == block_in % size == 0)


def _check(
    x: Tensor,
    values: Tensor,
    geometry: Geometry,
    rows_per_tile: int,
    per_channel: tuple[Tensor | None, ...],
    residual: Tensor | None,
    order: Tensor | None,
    first: Tensor | None,
) -> None:
    if x.device.type != "cuda" and type(x) is Tensor and not _is_interpreted():
        raise ValueError(f"input is on {x.device}: the triton kernels run on NVIDIA GPUs, or in Triton's interpreter")
    if x.dtype != values.dtype:
        raise TypeError(f"input has dtype {x.dtype}, the packed weight {values.dtype}: convert one to the other")
    if x.device != values.device:
        raise ValueError(f"input is on {x.device}, the packed weight on {values.device}: move one to the other")
    channels = geometry.weight_shape[0]
    tile = values.shape[1] * rows_per_tile
    if geometry.groups > 1 and channels // geometry.groups % tile:
        raise ValueError(
            f"{geometry.groups} groups of {channels // geometry.groups} output channels: "
            f"a multiple of the tile of {tile} is needed"
        )
    shape = (channels,) if order is None else (2, channels)
    for tensor in per_channel:
        if tensor is not None and (tuple(tensor.shape) != shape or not tensor.is_contiguous()):
            raise ValueError(f"scale or bias has shape {tuple(tensor.shape)}: {shape}, contiguous, is needed")
    if residual is not None and (residual.shape != geometry.output_shape(x.shape) or residual.dtype != x.dtype):
        raise ValueError(
            f"residual is {residual.dtype} {tuple(residual.shape)}: the dtype and shape of the output are needed"
        )
    if order is not None and (
        first is None or {order.dtype, first.dtype} != {torch.int32} or order.shape != x.shape[:1] or first.numel() != 1
    ):
        raise ValueError(f"order and first are to be int32, ({x.shape[0]},) and (1,)")


def _check_sizes(x: Tensor, pixels: int) -> None:
    if pixels > MAX_PIXELS or x[:1].numel() > MAX_INDEX:
        raise ValueError(
            f"an input of shape {tuple(x.shape)} with {pixels} output pixels is too large for 32-bit indices of "
            "pixels and within an image: split the batch"
        )
