"""Convolution over the kept blocks of a weight, as an implicit matrix product on tensor cores.

A program computes a tile of BLOCK_M output channels x BLOCK_N pixels. It walks the tile's items (see
:mod:`smart_kernels.packing.block`), BLOCK_K input channels at a time: where items are shorter, several that follow one
another in the list make one step of the product, each with its own tap and slab. Longer steps mean fewer, larger
instructions and fewer rounds of the pipeline; and the weights of neighbours in the list are neighbours in memory.

What a step reads of the input is gathered by pointers, 16 bytes at a time, straight into shared memory: taps are
offsets, padding is a predicate that is off. Activations lie as NHWC, so that the channels of an item are contiguous.

Outputs are the rows of the product and pixels its columns, since blocks are 64 outputs tall and the widest tensor core
instructions take 64 rows and 256 columns: so each input value fetched from shared memory serves as often as it can.

Names: [M] output channels of a tile, [N] its pixels, [K] the input channels of a step.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(tile, order_ptr, first_ptr, plane, pixels, first_segment, last_segment, BLOCK_N: tl.constexpr):
    """Which pixels a tile has: where the outputs of each begin [N], its image, its place in the image, and its path.

    A call runs all images on one path, or each on its own: then ``order_ptr`` lists the images sorted by path, those of
    the first path first, ``first_ptr`` tells how many these are, and no tile holds images of both.
    """
    first, end = tile * BLOCK_N, pixels
    path = 0
    if order_ptr is not None:
        of_first = tl.load(first_ptr).to(tl.int32) * plane
        tiles_of_first = tl.cdiv(of_first, BLOCK_N)
        if tile < tiles_of_first:
            end = of_first
        else:
            first = of_first + (tile - tiles_of_first) * BLOCK_N
            path = 1
        first_segment = path
        last_segment = path + 2
    pixel = first + tl.arange(0, BLOCK_N)
    inside = pixel < end
    image = pixel // plane
    place = pixel - image * plane
    if order_ptr is not None:
        image = tl.load(order_ptr + image, mask=inside, other=0).to(tl.int32)
    return image, place, inside, path, first_segment, last_segment


@triton.jit
def finish(
    sums,
    output,
    inside,
    channel,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    second_scale_ptr,
    second_bias_ptr,
    second_ptr,
    RELU: tl.constexpr,
    SECOND_RELU: tl.constexpr,
):
    """Writes relu(sums * scale + bias + residual), and perhaps relu(that * second scale + second bias) beside it.

    Args:
        sums: [N, M] in float32.
        output: where each lies in the outputs, [N, M].
        inside: which are outputs, [N, M].
        channel: where the numbers of each channel lie, [M]; a tail reads those of channel 0.
    """
    y = sums
    if scale_ptr is not None:
        y = y * tl.load(scale_ptr + channel).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + channel).to(tl.float32)[None, :]
    if residual_ptr is not None:
        y = y + tl.load(residual_ptr + output, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0, 0.0, y)  # and not a maximum: NaN passes
    tl.store(y_ptr + output, y.to(y_ptr.dtype.element_ty), mask=inside)
    if second_ptr is not None:
        second = y * tl.load(second_scale_ptr + channel).to(tl.float32)[None, :]
        second = second + tl.load(second_bias_ptr + channel).to(tl.float32)[None, :]
        if SECOND_RELU:
            second = tl.where(second < 0, 0.0, second)
        tl.store(second_ptr + output, second.to(second_ptr.dtype.element_ty), mask=inside)


@triton.jit
def spread(ptr, begin, end, place, STEP: tl.constexpr):
    """The numbers of STEP items from ``begin`` on, each at every k whose ``place`` is its own; zeros from ``end`` on.

    As scalars: all threads of a warp share each load, which as a vector would be one for every k.
    """
    number = tl.load(ptr + begin, mask=begin < end, other=0)
    spread = tl.zeros_like(place) + number
    for j in tl.static_range(1, STEP):
        number = tl.load(ptr + begin + j, mask=begin + j < end, other=0)
        spread = tl.where(place == j, number, spread)
    return spread


@triton.jit
def find_blocks(rows, start, row, first_segment, last_segment, ROWS: tl.constexpr, MAX_ROWS: tl.constexpr):
    """Which block each weight of a step lies in, and whether the path keeps it: two of [M, K].

    Args:
        rows: [K], the bits that say which rows of blocks each item keeps on either path.
        start: [K], the first block of each item.
        row: [M], the row of blocks in the tile.
    """
    of_first, of_second = rows, rows >> MAX_ROWS
    stored = of_first | of_second
    kept = tl.where(first_segment == 0, of_first, 0) | tl.where(last_segment == 3, of_second, 0)
    blocks = start[None, :] + tl.zeros_like(row)[:, None]
    is_kept = blocks < 0
    for j in tl.static_range(ROWS):
        is_row = (row == j)[:, None]
        blocks = tl.where(is_row, start[None, :], blocks)
        is_kept = tl.where(is_row, (kept >> j & 1 != 0)[None, :], is_kept)
        start += stored >> j & 1
    return blocks, is_kept


@triton.jit
def convolve(
    x_ptr,  # (images, in_height, in_width, in_channels)
    values_ptr,  # (blocks, BLOCK_OUT, BLOCK_IN)
    codes_ptr,  # (items,)
    rows_ptr,  # (items,), None where tiles have one row of blocks
    starts_ptr,  # (items,), None likewise
    segments_ptr,  # (out_tiles * 3 + 1,)
    order_ptr,  # (images,) or None
    first_ptr,  # (1,) or None
    scale_ptr,  # (paths, out_channels) or None, as all that follow up to the numbers
    bias_ptr,
    residual_ptr,  # (images, out_height, out_width, out_channels)
    y_ptr,  # as residual
    second_scale_ptr,
    second_bias_ptr,
    second_ptr,  # as residual
    partial_ptr,  # (splits, images, out_height, out_width, out_channels), float32
    in_height,
    in_width,
    in_channels,
    group_in,
    out_width,
    out_channels,
    group_out,
    plane,  # out_height * out_width
    pixels,  # images * plane
    out_tiles,
    first_segment,
    last_segment,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    R: tl.constexpr,
    S: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    ROWS: tl.constexpr,  # of blocks in a tile
    MAX_ROWS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,  # input channels of an item that lie together and are there or not together
    RELU: tl.constexpr,
    SECOND_RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # to float32 first: Triton's interpreter would multiply bfloat16 as integers
    CACHE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of outputs, or with ``partial_ptr`` the part of its sums that one of several programs finds."""
    TAPS: tl.constexpr = R * S
    BLOCK_M: tl.constexpr = BLOCK_OUT * ROWS
    STEP: tl.constexpr = BLOCK_K // BLOCK_IN  # items
    # Neighbours run at about the same time: let them read the same pixels.
    out_tile = tl.program_id(0) % out_tiles
    tile = tl.program_id(0) // out_tiles
    image, place, inside, path, first_segment, last_segment = locate(
        tile, order_ptr, first_ptr, plane, pixels, first_segment, last_segment, BLOCK_N
    )
    p = place // out_width
    q = place - p * out_width
    # Where the window of each pixel begins; before the first input where there is padding.
    top = p * stride_h - pad_h
    left = q * stride_w - pad_w
    group_channel = out_tile * BLOCK_M // group_out * group_in
    window = ((image.to(tl.int64) * in_height + top) * in_width + left) * in_channels + group_channel
    # Bit t: tap t of the pixel's window is a pixel of the image. Found once, so that a step needs one shift.
    taps_inside = tl.zeros([BLOCK_N], tl.int32 if TAPS <= 32 else tl.int64)
    for t in tl.static_range(TAPS):
        h = top + t // S * dilation_h
        w = left + t % S * dilation_w
        is_pixel = inside & (h >= 0) & (h < in_height) & (w >= 0) & (w < in_width)
        taps_inside |= is_pixel.to(taps_inside.dtype) << t

    begin = tl.load(segments_ptr + out_tile * 3 + first_segment)
    end = tl.load(segments_ptr + out_tile * 3 + last_segment)
    if partial_ptr is not None:
        steps = tl.cdiv(tl.cdiv(end - begin, STEP), tl.num_programs(1))
        begin += tl.program_id(1) * steps * STEP
        end = min(end, begin + steps * STEP)

    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    window_ptrs = x_ptr + window
    place_in_block = (m % BLOCK_OUT * BLOCK_IN)[:, None] + (k % BLOCK_IN)[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # Codes are read one step ahead of what they point to. The compiler starts copies of a step several steps early;
    # were their codes loaded in the step itself, it would share that lead out between codes and copies.
    next_code = spread(codes_ptr, begin, end, k // BLOCK_IN, STEP)
    if ROWS > 1:
        next_rows = spread(rows_ptr, begin, end, k // BLOCK_IN, STEP)
        next_start = spread(starts_ptr, begin, end, k // BLOCK_IN, STEP)
    for step in range(begin, end, STEP):
        code = next_code
        next_code = spread(codes_ptr, step + STEP, end, k // BLOCK_IN, STEP)
        item = step + k // BLOCK_IN
        listed = item < end
        tap = code % TAPS
        channel = code // TAPS * BLOCK_IN + k % BLOCK_IN
        offset = (tap // S * dilation_h * in_width + tap % S * dilation_w) * in_channels + channel
        there = listed & (channel < group_in)
        # The compiler cannot know that an item's channels go together: these make it copy 16 bytes at a time.
        offset = tl.max_contiguous(tl.multiple_of(offset, CONTIGUOUS), CONTIGUOUS)
        tap = tl.max_constancy(tap, CONTIGUOUS)
        there = tl.max_constancy(there, CONTIGUOUS)
        mask = ((taps_inside[:, None] >> tap[None, :]) & 1) != 0  # [N, K]
        x = tl.load(window_ptrs[:, None] + offset[None, :], mask=mask & there[None, :], other=0.0, cache_modifier=CACHE)
        if ROWS == 1:
            value = (item.to(tl.int64) * BLOCK_OUT * BLOCK_IN)[None, :] + place_in_block  # [M, K]
            kept = listed[None, :]
        else:
            rows = next_rows
            start = next_start
            next_rows = spread(rows_ptr, step + STEP, end, k // BLOCK_IN, STEP)
            next_start = spread(starts_ptr, step + STEP, end, k // BLOCK_IN, STEP)
            block, kept = find_blocks(rows, start, m // BLOCK_OUT, first_segment, last_segment, ROWS, MAX_ROWS)
            value = block.to(tl.int64) * BLOCK_OUT * BLOCK_IN + place_in_block
            value = tl.max_contiguous(tl.multiple_of(value, [1, BLOCK_IN]), [1, BLOCK_IN])
            kept = tl.max_constancy(kept, [1, BLOCK_IN])
        weight = tl.load(values_ptr + value, mask=kept, other=0.0)  # [M, K]
        if WIDEN:
            weight = weight.to(tl.float32)
            x = x.to(tl.float32)
        sums = tl.dot(weight, tl.trans(x), sums, input_precision=PRECISION)

    channel = out_tile * BLOCK_M + m
    output = (image.to(tl.int64) * plane + place)[:, None] * out_channels + channel[None, :]
    inside = inside[:, None] & (channel < out_channels)[None, :]
    sums = tl.trans(sums)  # [N, M]: channels are what lies together
    if partial_ptr is not None:
        total = tl.cast(pixels, tl.int64) * out_channels
        tl.store(partial_ptr + tl.program_id(1) * total + output, sums, mask=inside)
    else:
        numbers = path * out_channels + tl.where(channel < out_channels, channel, 0)
        finish(
            sums, output, inside, numbers, scale_ptr, bias_ptr, residual_ptr, y_ptr,
            second_scale_ptr, second_bias_ptr, second_ptr, RELU, SECOND_RELU,
        )  # fmt: skip


@triton.jit
def reduce(
    partial_ptr,  # (splits, images, out_height, out_width, out_channels), float32
    order_ptr,
    first_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    second_scale_ptr,
    second_bias_ptr,
    second_ptr,
    out_channels,
    plane,
    pixels,
    splits,
    RELU: tl.constexpr,
    SECOND_RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the parts of the sums, always in the same order, and finishes them. The rest is as for ``convolve``."""
    image, place, inside, path, _, _ = locate(tl.program_id(0), order_ptr, first_ptr, plane, pixels, 0, 0, BLOCK_N)
    channel = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = (image.to(tl.int64) * plane + place)[:, None] * out_channels + channel[None, :]
    inside = inside[:, None] & (channel < out_channels)[None, :]
    total = tl.cast(pixels, tl.int64) * out_channels
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for split in range(splits):
        sums += tl.load(partial_ptr + split * total + output, mask=inside, other=0.0)
    numbers = path * out_channels + tl.where(channel < out_channels, channel, 0)
    finish(
        sums, output, inside, numbers, scale_ptr, bias_ptr, residual_ptr, y_ptr,
        second_scale_ptr, second_bias_ptr, second_ptr, RELU, SECOND_RELU,
    )  # fmt: skip
