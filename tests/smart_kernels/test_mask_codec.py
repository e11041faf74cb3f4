import zlib

import pytest
import torch

from smart_kernels.packing.mask_codec import as_tensor, decode_masks, deflate, encode_masks, inflate

SHAPE = (32, 16, 3, 3)


def masks_of(kind):
    clean = torch.rand(SHAPE) < 0.2
    adv = {
        "independent": torch.rand(SHAPE) < 0.2,
        "alike": clean ^ (torch.rand(SHAPE) < 0.01),
        "the same": clean.clone(),
        "empty": torch.zeros_like(clean),
        "full": torch.ones_like(clean),
    }[kind]
    return {"clean": clean, "adv": adv}


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("kind", ["independent", "alike", "the same", "empty", "full"])
def test_masks_come_back_as_they_were(kind, compress):
    masks = masks_of(kind)
    stored = encode_masks(masks, compress)
    decoded = decode_masks(stored.get, tuple(masks), SHAPE)
    assert all(torch.equal(decoded[path], mask) for path, mask in masks.items())
    assert ("difference.adv" in stored) == (kind == "alike" and compress)
    assert len(stored) == (1 if kind == "the same" else 2)


def test_random_masks_come_near_their_entropy():
    mask = torch.rand(256, 256, 3, 3) < 0.2
    (data,) = encode_masks({"clean": mask}).values()
    assert 8 * len(data) / mask.numel() < 0.74  # the entropy is 0.722 bits


def test_streams_are_bounded_and_whole():
    data = bytes(range(256)) * 4
    assert inflate(deflate(data), len(data)) == data
    for stream, message in (
        (zlib.compress(bytes(2**26)), "more than the 1000 bytes"),
        (deflate(data[:500])[:-3], "ends early"),
        (deflate(data[:500]) + b"more", "something follows"),
        (b"no stream", "damaged"),
    ):
        with pytest.raises(ValueError, match=message):
            inflate(stream, 1000)


def test_what_are_no_masks_is_refused():
    stored = encode_masks(masks_of("independent"))
    with pytest.raises(ValueError, match="path 'clean' is missing"):
        decode_masks({}.get, ("clean", "adv"), SHAPE)
    with pytest.raises(ValueError, match="stored twice"):
        decode_masks({**stored, "difference.adv": stored["mask.adv"]}.get, ("clean", "adv"), SHAPE)
    with pytest.raises(ValueError, match="uint8 of one dimension"):
        decode_masks({"mask.clean": torch.zeros(3)}.get, ("clean",), SHAPE)
    with pytest.raises(ValueError, match=r"damaged|early"):
        decode_masks({"mask.clean": as_tensor(b"xyz")}.get, ("clean",), SHAPE)
