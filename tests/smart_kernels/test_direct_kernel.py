"""The direct kernel, run on an emulated GPU. Numbers are small integers: results must be equal, not close."""

import pytest
import torch
from direct_cases import CASES, integers, layer, reference
from emulated import needs_compiler
from emulated_direct import run_direct

from smart_kernels.direct_ops import TILES
from smart_kernels.geometry import Geometry
from smart_kernels.packing import UnstructuredWeight

pytestmark = needs_compiler


def run(x, packed, geometry, path, tile, **arguments):
    weight = (packed.path_values(path), packed.codes, packed.segments)
    return run_direct(x, *weight, geometry, packed.slab_channels, packed.segment_range(path), tile, **arguments)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", CASES)
def test_every_tile_computes_the_convolution(case, tile):
    shape, (n, h, w), arguments = CASES[case]
    packed, geometry = layer(shape, **arguments)
    x = integers(n, geometry.in_channels, h, w)
    y = run(x, packed, geometry, "adv", tile)
    assert torch.equal(y.double(), reference(x, packed, geometry, "adv"))


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_any_mask_is_exact(density):
    packed, geometry = layer((18, 20, 3, 3), density, padding=1)
    x = integers(1, 20, 6, 6)
    for path in ("clean", "adv", 0.5):
        assert torch.equal(run(x, packed, geometry, path, "small").double(), reference(x, packed, geometry, path))


@pytest.mark.parametrize("channels", [48, 46, 45])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("tile", TILES)
def test_scale_bias_residual_relu_and_second_result(tile, wide, channels):
    packed, geometry = layer((channels, 16, 3, 3), padding=1)
    x, residual = integers(2, 16, 5, 5), integers(2, channels, 5, 5, largest=9)
    scale, bias, second_scale, second_bias = (integers(channels, largest=4) for _ in range(4))
    y, second = run(
        x, packed, geometry, "clean", tile, scale=scale, bias=bias, residual=residual, relu=True,
        affine=(second_scale, second_bias, True), wide=wide,
    )  # fmt: skip
    expected = reference(x, packed, geometry, "clean", scale, bias, residual, relu=True)
    assert torch.equal(y.double(), expected)
    assert torch.equal(second.double(), (expected * second_scale[:, None, None] + second_bias[:, None, None]).relu())


@pytest.mark.parametrize("tile", TILES)
def test_threads_may_run_in_any_order(tile):
    """With a barrier too few, what a thread reads depends on who ran first."""
    packed, geometry = layer((64, 40, 3, 3), 0.4, padding=1)
    x = integers(1, 40, 5, 5)
    y = [run(x, packed, geometry, "clean", tile, backwards=each) for each in (False, True)]
    assert torch.equal(y[0].double(), reference(x, packed, geometry, "clean"))
    assert torch.equal(y[0], y[1])


def test_infinite_inputs_reach_only_what_reads_them():
    """A dropped weight multiplies nothing, not even by zero; odd numbers of non-zeros are not filled up."""
    masks = {"clean": torch.zeros(8, 4, 1, 1, dtype=torch.bool)}
    masks["clean"][:5, 1:] = True
    packed = UnstructuredWeight(torch.ones(8, 4, 1, 1), masks)
    x = integers(1, 4, 3, 3)
    x[:, 0] = float("inf")
    y = run(x, packed, Geometry.of(packed.shape), "clean", "small")
    assert torch.equal(y[:, 0], x[:, 1:].sum(1)) and not y[:, 5:].any()


def test_results_are_those_of_float32():
    torch.manual_seed(0)
    weight = torch.randn(32, 64, 3, 3)
    packed = UnstructuredWeight(weight, {"clean": torch.rand(weight.shape) < 0.3})
    geometry, x = Geometry.of(weight.shape, padding=1), torch.randn(1, 64, 5, 5)
    expected = reference(x, packed, geometry, "clean")
    error = (run(x, packed, geometry, "clean", "medium").double() - expected).abs().max()
    assert error < 2**-20 * expected.abs().max()  # TF32 would leave 2**-11
