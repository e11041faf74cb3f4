"""What is particular to the bitmap backend; test_emulated_backends.py has the rest."""

import pytest
import torch
from emulated_operators import needs_operators
from networks import TwoPaths

from smart_kernels import load, save, swap
from smart_kernels.backends import BACKENDS
from smart_kernels.geometry import Geometry

BITMAP = BACKENDS["bitmap"]


@pytest.mark.parametrize(
    ("arguments", "dtype", "message"),
    [({}, torch.float32, "float16 and bfloat16, not float32"), ({"groups": 2}, torch.float16, "one group, not 2")],
)
def test_what_it_cannot_compute_it_says(arguments, dtype, message):
    verdict = BITMAP.computes(Geometry.of((32, 16, 3, 3), **arguments), dtype)
    assert not verdict and message in verdict.why


def test_masks_that_keep_much_are_left_to_others():
    assert BITMAP.suits({"clean": torch.rand(64, 64) < 0.4})
    verdict = BITMAP.suits({"clean": torch.rand(64, 64) < 0.1, "adv": torch.rand(64, 64) < 0.5})
    assert not verdict and "bitmaps save less than half" in verdict.why


def test_by_estimate_it_is_for_small_batches():
    """Of many weights; with many pixels it multiplies twice as much as 2:4."""
    geometry = Geometry.of((512, 512, 3, 3), padding=1)
    arguments = {"density": 0.2, "device": torch.device("cuda"), "dtype": torch.float16}
    us = {
        batch: [BACKENDS[name].estimate_us(geometry, (batch, 512, 4, 4), **arguments) for name in ("bitmap", "cuda")]
        for batch in (1, 256)
    }
    assert us[1][0] < us[1][1] and us[256][0] > us[256][1]


@needs_operators
def test_a_network_comes_back_from_a_file(tiles_run, on_any_device, tmp_path):
    images = torch.rand(2, 1, 9, 9).half()
    sparse = swap(TwoPaths().eval().half(), images, backend="bitmap")
    with torch.inference_mode():
        save(sparse, tmp_path / "net.safetensors")
        again = load(tmp_path / "net.safetensors")
        assert "bitmap" in {row["backend"] for row in again.report()}
        for path in ("clean", "adv"):
            assert torch.equal(again(images, path=path), sparse(images, path=path))
