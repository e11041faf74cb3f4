"""The same convolution written for Hopper (compute capability 9.0) in Gluon: TMA copies, ``wgmma`` multiplies.

What :mod:`smart_kernels.kernels.block` says of tiles, items, steps and names holds here too. What differs is how a step
reaches the tensor cores. There each thread computes the addresses of the pixels it copies; here one thread asks the TMA
unit for a *box* of IMAGES x ROWS x COLUMNS pixels and BLOCK_IN channels an item, and once for the step's weights.
What a box reaches beyond the tensor is read as zero, so padding needs no predicates.

An output pixel's inputs at one tap are ``stride`` pixels apart, and boxes have no gaps. So the input is seen as
(images, in_height / stride_h, stride_h, in_width / stride_w, stride_w * in_channels), where they are neighbours.

STAGES steps have buffers in shared memory. A step's barrier completes when all bytes of its boxes have arrived, once
each time that its buffers are filled: waits alternate between the two phases. The products of a step run while those of
the step before it are waited for, whose buffers are then filled anew. Programs of four warps leave registers and shared
memory for two or three on a multiprocessor, which hide one another's beginnings and ends: lists are short. A warp that
only copies would cost those registers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from smart_kernels.kernels import block

finish = gluon.jit(block.finish.fn)
# Triton 3.9 calls it by the first name, 3.6 by the second.
load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.constexpr_function
def layout_of_sums(block_m, block_n, warps):
    """How ``wgmma`` spreads the sums [M, N] over warps: 16 rows each, and columns where there are more warps."""
    down = min(warps, block_m // 16)
    across = warps // down
    return gl.NVMMADistributedLayout([3, 0], [down, across], [16, block_n // across, 16])


@gluon.constexpr_function
def layout_of_outputs(block_m, warps):
    """[N, M] with 8 neighbouring channels a thread, which it writes as 16 bytes."""
    return gl.BlockedLayout([1, 8], [256 // block_m, block_m // 8], [warps, 1], [1, 0])


@gluon.jit
def fetch(
    step,
    run,
    codes_ptr,
    x_desc,
    values_desc,
    buffers,
    corner,
    moves,
    TAPS: gl.constexpr,
    S: gl.constexpr,
    STRIDE_H: gl.constexpr,
    STRIDE_W: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Starts the copies of a step into the buffers of its stage; of none if the list is over by then.

    An item beyond the end of the list is a box before the first image: zeros. What they are multiplied by are the next
    tile's weights, which packing has checked to be finite.

    Args:
        run: the first item and the one after the last.
        buffers: of pixels, of weights, and the barriers.
        corner: image, row, column and channel of the tile's first pixel, its row and column so much before it that no
            tap's is earlier.
        moves: rows and columns from there to the first tap's, dilation of both, and input channels.
    """
    BLOCK_N: gl.constexpr = x_desc.block_shape[0] * x_desc.block_shape[1] * x_desc.block_shape[3]
    BLOCK_M: gl.constexpr = values_desc.block_shape[0] // STEP
    BLOCK_IN: gl.constexpr = values_desc.block_shape[1]
    BYTES: gl.constexpr = STEP * (BLOCK_M + BLOCK_N) * BLOCK_IN * 2
    begin, end = run
    inputs, weights, barriers = buffers
    first_image, top, left, first_channel = corner
    shift_h, shift_w, dilation_h, dilation_w, in_channels = moves
    stage = step % STAGES
    first = begin + step * STEP
    there = first < end
    mbarrier.expect(barriers.index(stage), BYTES, pred=there)
    load_box(values_desc, [first * BLOCK_M, 0], barriers.index(stage), weights.index(stage), pred=there)
    for j in gl.static_range(STEP):
        item = first + j
        listed = item < end
        code = gl.load(codes_ptr + item, mask=listed, other=0)
        tap = code % TAPS
        h = tap // S * dilation_h + shift_h
        w = tap % S * dilation_w + shift_w
        image = gl.where(listed, first_image, -x_desc.block_shape[0])
        channel = w % STRIDE_W * in_channels + first_channel + code // TAPS * BLOCK_IN
        pixels = [image, top + h // STRIDE_H, h % STRIDE_H, left + w // STRIDE_W, channel]
        load_box(x_desc, pixels, barriers.index(stage), inputs.index(stage * STEP + j), pred=there)


@gluon.jit
def convolve(
    x_desc,  # (images, in_height / stride_h, stride_h, in_width / stride_w, stride_w * in_channels)
    values_desc,  # (blocks * BLOCK_M, BLOCK_IN)
    codes_ptr,  # (blocks,)
    segments_ptr,  # (out_tiles * 3 + 1,)
    scale_ptr,  # (out_channels,) or None, as all that follow up to the numbers
    bias_ptr,
    residual_ptr,  # (images, out_height, out_width, out_channels)
    y_ptr,  # as residual
    second_scale_ptr,
    second_bias_ptr,
    second_ptr,  # as residual
    partial_ptr,  # (splits, images, out_height, out_width, out_channels), float32
    in_channels,
    group_in,
    images,
    out_height,
    out_width,
    out_channels,
    group_out,
    tiles_h,
    tiles_w,
    out_tiles,
    first_segment,
    last_segment,
    lift_h,  # padding in strides, rounded up: so far before a tile's first row does its box of the first tap begin
    lift_w,
    shift_h,  # what was rounded up, in pixels
    shift_w,
    dilation_h,
    dilation_w,
    TAPS: gl.constexpr,
    S: gl.constexpr,
    STRIDE_H: gl.constexpr,
    STRIDE_W: gl.constexpr,
    RELU: gl.constexpr,
    SECOND_RELU: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):
    """One tile of outputs, or with ``partial_ptr`` the part of its sums that one of several programs finds."""
    IMAGES: gl.constexpr = x_desc.block_shape[0]
    ROWS: gl.constexpr = x_desc.block_shape[1]
    COLUMNS: gl.constexpr = x_desc.block_shape[3]
    BLOCK_N: gl.constexpr = IMAGES * ROWS * COLUMNS
    BLOCK_IN: gl.constexpr = values_desc.block_shape[1]
    STEP: gl.constexpr = BLOCK_K // BLOCK_IN  # items
    BLOCK_M: gl.constexpr = values_desc.block_shape[0] // STEP
    # Neighbours run at about the same time: let them read the same pixels.
    out_tile = gl.program_id(0) % out_tiles
    tile = gl.program_id(0) // out_tiles
    first_image = tile // tiles_w // tiles_h * IMAGES
    first_p = tile // tiles_w % tiles_h * ROWS
    first_q = tile % tiles_w * COLUMNS
    begin = gl.load(segments_ptr + out_tile * 3 + first_segment)
    end = gl.load(segments_ptr + out_tile * 3 + last_segment)
    if partial_ptr is not None:
        share = gl.cdiv(gl.cdiv(end - begin, STEP), gl.num_programs(1)) * STEP
        begin += gl.program_id(1) * share
        end = min(end, begin + share)

    inputs_shape: gl.constexpr = [STAGES * STEP] + x_desc.block_shape  # noqa: RUF005 (Triton unpacks no lists)
    weights_shape: gl.constexpr = [STAGES] + values_desc.block_shape  # noqa: RUF005
    inputs = gl.allocate_shared_memory(x_desc.dtype, inputs_shape, x_desc.layout)
    weights = gl.allocate_shared_memory(values_desc.dtype, weights_shape, values_desc.layout)
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(barriers.index(i), count=1)
    run = (begin, end)
    buffers = (inputs, weights, barriers)
    corner = (first_image, first_p - lift_h, first_q - lift_w, out_tile * BLOCK_M // group_out * group_in)
    moves = (shift_h, shift_w, dilation_h, dilation_w, in_channels)
    for early in gl.static_range(STAGES - 1):
        fetch(
            early, run, codes_ptr, x_desc, values_desc, buffers, corner, moves,
            TAPS, S, STRIDE_H, STRIDE_W, STEP, STAGES,
        )  # fmt: skip
    sums = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout_of_sums(BLOCK_M, BLOCK_N, WARPS))
    for step in range(gl.cdiv(end - begin, STEP)):
        stage = step % STAGES
        mbarrier.wait(barriers.index(stage), step // STAGES & 1)
        for j in gl.static_range(STEP):
            weight = weights.index(stage).slice(j * BLOCK_M, BLOCK_M)  # [M, K]
            x = inputs.index(stage * STEP + j).reshape([BLOCK_N, BLOCK_IN])
            sums = warpgroup_mma(weight, x.permute((1, 0)), sums, is_async=True)
        # All but this step's: the buffers of the one before it are free.
        sums = warpgroup_mma_wait(num_outstanding=STEP, deps=[sums])
        fetch(
            step + STAGES - 1, run, codes_ptr, x_desc, values_desc, buffers, corner, moves,
            TAPS, S, STRIDE_H, STRIDE_W, STEP, STAGES,
        )  # fmt: skip
    sums = warpgroup_mma_wait(num_outstanding=0, deps=[sums])
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(barriers.index(i))

    STORED: gl.constexpr = layout_of_outputs(BLOCK_M, WARPS)
    sums = gl.convert_layout(gl.permute(sums, (1, 0)), STORED)  # [N, M]: channels are what lies together
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, STORED))
    image = first_image + n // (ROWS * COLUMNS)
    p = first_p + n // COLUMNS % ROWS
    q = first_q + n % COLUMNS
    pixel = (image.to(gl.int64) * out_height + p) * out_width + q
    channel = out_tile * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, STORED))
    output = pixel[:, None] * out_channels + channel[None, :]
    inside = (image < images) & (p < out_height) & (q < out_width)
    inside = inside[:, None] & (channel < out_channels)[None, :]
    if partial_ptr is not None:
        total = gl.cast(images, gl.int64) * out_height * out_width * out_channels
        gl.store(partial_ptr + gl.program_id(1) * total + output, sums, mask=inside)
    else:
        numbers = gl.where(channel < out_channels, channel, 0)
        finish(
            sums, output, inside, numbers, scale_ptr, bias_ptr, residual_ptr, y_ptr,
            second_scale_ptr, second_bias_ptr, second_ptr, RELU, SECOND_RELU,
        )  # fmt: skip
