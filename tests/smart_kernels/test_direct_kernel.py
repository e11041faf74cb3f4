"""What is particular to the direct kernel, on an emulated GPU; test_emulated_kernels.py has the rest."""

import pytest
import torch
from emulated import needs_compiler
from emulated_kernels import KERNELS, check_epilogue, direct
from exact import integers, reference

from smart_kernels.direct_ops import TILES
from smart_kernels.geometry import Geometry
from smart_kernels.packing import UnstructuredWeight

pytestmark = needs_compiler


@pytest.mark.parametrize("channels", [48, 46, 45])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("tile", TILES)
def test_channels_are_written_alone_or_in_twos_and_fours(tile, wide, channels):
    check_epilogue(KERNELS["direct"], tile, torch.float32, channels, wide=wide)


def test_infinite_inputs_reach_only_what_reads_them():
    """A dropped weight multiplies nothing, not even by zero; odd numbers of non-zeros are not filled up."""
    masks = {"clean": torch.zeros(8, 4, 1, 1, dtype=torch.bool)}
    masks["clean"][:5, 1:] = True
    packed = UnstructuredWeight(torch.ones(8, 4, 1, 1), masks)
    x = integers(1, 4, 3, 3)
    x[:, 0] = float("inf")
    y = direct(x, packed, Geometry.of(packed.shape), "clean", "small")
    assert torch.equal(y[:, 0], x[:, 1:].sum(1)) and not y[:, 5:].any()


def test_results_are_those_of_float32():
    torch.manual_seed(0)
    weight = torch.randn(32, 64, 3, 3)
    packed = UnstructuredWeight(weight, {"clean": torch.rand(weight.shape) < 0.3})
    geometry, x = Geometry.of(weight.shape, padding=1), torch.randn(1, 64, 5, 5)
    expected = reference(x, packed, geometry, "clean")
    error = (direct(x, packed, geometry, "clean", "medium").double() - expected).abs().max()
    assert error < 2**-20 * expected.abs().max()  # TF32 would leave 2**-11
