"""What is particular to the direct backend; test_emulated_backends.py has the rest."""

import pytest
import torch
from emulated_operators import needs_operators
from exact import integers, layer
from torch._subclasses import FakeTensorMode

from smart_kernels.backends import BACKENDS, Verdict
from smart_kernels.backends.direct import DirectBackend
from smart_kernels.geometry import Geometry
from smart_kernels.ops import backend_for
from smart_kernels.packing import UnstructuredWeight

DIRECT = BACKENDS["direct"]


@needs_operators
def test_groups_of_channels_are_computed_apart(tiles_run):
    packed, geometry = layer(UnstructuredWeight, (20, 12, 3, 3), padding=1, groups=2)
    x = integers(2, 24, 5, 5)
    y, expected = (
        each.bind(packed, geometry, "adv", None, None, True)(x, None) for each in (DIRECT, BACKENDS["dense"])
    )
    assert torch.equal(y, expected) and len(tiles_run) == 1


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((32, 16, 3, 3), torch.float16, "takes float32, not float16"),
        ((4, 2, 17, 16), torch.float32, "at most 256 taps, not 17x16"),
    ],
)
def test_what_it_cannot_compute_it_says(shape, dtype, message):
    verdict = DIRECT.computes(Geometry.of(shape), dtype)
    assert not verdict and message in verdict.why
    assert DIRECT.computes(Geometry.of((4, 2, 16, 16)), torch.float32)


def test_it_is_for_gpus_and_sparse_masks(monkeypatch):
    packed, geometry = layer(UnstructuredWeight, (20, 12, 3, 3), padding=1)
    assert DIRECT.suits({"clean": torch.rand(64, 64) < 0.2})
    assert "masks keep" in DIRECT.suits({"clean": torch.rand(64, 64) < 0.2, "adv": torch.rand(64, 64) < 0.5}).why
    monkeypatch.setattr(DirectBackend, "available", lambda self: Verdict(True))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert backend_for(packed, torch.empty(1, 12, 4, 4, device="cuda"), geometry) is DIRECT
    assert backend_for(packed, torch.empty(1, 12, 4, 4), geometry) is not DIRECT
