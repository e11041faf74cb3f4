"""Masks as files hold them: bits, deflated where that is smaller, the second path's perhaps as what differs.

A mask that keeps 20 % of the weights at random holds 0.72 bits a weight; deflated bits come within 2 % of that.
Structured masks, and two that mostly agree, come to much less.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from smart_kernels.packing.bits import pack_bits, unpack_bits

# Random bits only get larger by searching them for repetitions, structured ones need it.
_STRATEGIES = (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY)


def encode_masks(masks: Mapping[str, Tensor], compress: bool = True) -> dict[str, Tensor]:
    """The fewest bytes from which :func:`decode_masks` gives the masks of one or two paths back.

    Args:
        masks: path -> bool tensor; all of one shape.
        compress: whether masks may be deflated; if not each takes one bit a weight.

    Returns:
        uint8 tensors: ``mask.<path>`` of the first path, and for another path that differs from it either
        ``mask.<path>`` or ``difference.<path>``, the exclusive or of both.
    """
    (first, mask), *others = masks.items()
    stored = {f"mask.{first}": _shortest(mask, compress)}
    for path, other in others:
        difference = mask ^ other
        if bool(difference.any()):
            forms = {
                f"mask.{path}": _shortest(other, compress),
                f"difference.{path}": _shortest(difference, compress),
            }
            key = min(forms, key=lambda form: len(forms[form]))
            stored[key] = forms[key]
    return stored


def decode_masks(
    stored: Callable[[str], Tensor | None], paths: Sequence[str], shape: tuple[int, ...]
) -> dict[str, Tensor]:
    """The inverse of :func:`encode_masks`.

    Args:
        stored: gives what was stored under a key, or None.

    Raises:
        ValueError: the data is missing, there twice, or not that of masks of this shape.
    """
    first, *others = paths
    whole = stored(f"mask.{first}")
    if whole is None:
        raise ValueError(f"the mask of path {first!r} is missing")
    masks = {first: _decode(whole, shape)}
    for path in others:
        whole, difference = stored(f"mask.{path}"), stored(f"difference.{path}")
        if whole is not None and difference is not None:
            raise ValueError(f"the mask of path {path!r} is stored twice: once is needed")
        if whole is not None:
            masks[path] = _decode(whole, shape)
        else:
            masks[path] = masks[first] if difference is None else masks[first] ^ _decode(difference, shape)
    return masks


def deflate(data: bytes) -> bytes:
    """The shortest zlib stream of the data."""
    streams = []
    for strategy in _STRATEGIES:
        compressor = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, strategy)
        streams.append(compressor.compress(data) + compressor.flush())
    return min(streams, key=len)


def inflate(stream: bytes, limit: int) -> bytes:
    """The data of one zlib stream; no more memory than ``limit`` bytes is ever asked for.

    Raises:
        ValueError: it is not one whole stream, something follows it, or it holds more than ``limit`` bytes.
    """
    decompressor = zlib.decompressobj()
    try:
        # One byte more tells a stream that is too long; zero would mean no limit.
        data = decompressor.decompress(stream, limit + 1)
    except zlib.error as error:
        raise ValueError(f"compressed data is damaged: {error}") from error
    if len(data) > limit:
        raise ValueError(f"compressed data holds more than the {limit} bytes that are possible here")
    if not decompressor.eof or decompressor.unused_data:
        raise ValueError("compressed data ends early, or something follows it")
    return data


def _shortest(mask: Tensor, compress: bool) -> Tensor:
    bits = pack_bits(mask)
    stream = deflate(bits.numpy().tobytes()) if compress else b""
    # A reader tells the two forms apart by their length.
    return as_tensor(stream) if 0 < len(stream) < len(bits) else bits


def _decode(data: Tensor, shape: tuple[int, ...]) -> Tensor:
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise ValueError(f"a mask is stored as {data.dtype} {tuple(data.shape)}: uint8 of one dimension is needed")
    size = (math.prod(shape) + 7) // 8
    if len(data) < size:
        data = as_tensor(inflate(data.numpy().tobytes(), size))
    return unpack_bits(data, shape)


def as_tensor(data: bytes) -> Tensor:
    """Bytes as a uint8 tensor of their own memory."""
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())
