"""The 2:4 kernel, run on an emulated GPU whose instructions are written from the PTX manual.

Numbers are small integers, whose sums 16-bit floats hold: results must be equal, not close.
"""

import pytest
import torch
from emulated import emulated_library, needs_compiler, run
from two_four_cases import CASES, DTYPES, integers, layer, reference, slab_masks

from smart_kernels.geometry import Geometry
from smart_kernels.packing import TwoFourWeight
from smart_kernels.two_four_ops import TILES

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def library():
    return emulated_library()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", CASES)
def test_every_tile_computes_the_convolution(library, case, tile):
    shape, (n, h, w), arguments = CASES[case]
    packed, geometry = layer(shape, **arguments)
    x = integers(n, shape[1], h, w)
    y = run(library, x, packed.operand("adv"), geometry, tile)
    assert torch.equal(y.double(), reference(x, packed, geometry, "adv"))


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_mask_is_exact(library, density, dtype):
    packed, geometry = layer((40, 16, 3, 3), density, dtype, padding=1)
    x = integers(1, 16, 6, 6, dtype=dtype)
    for path in ("clean", "adv"):
        y = run(library, x, packed.operand(path), geometry, "small")
        assert torch.equal(y.double(), reference(x, packed, geometry, path))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", ["large", "narrow"])
def test_scale_bias_residual_relu_and_second_result(library, dtype, tile):
    packed, geometry = layer((48, 16, 3, 3), dtype=dtype, padding=1)
    x, residual = integers(2, 16, 5, 5, dtype=dtype), integers(2, 48, 5, 5, largest=9, dtype=dtype)
    scale, bias, second_scale, second_bias = (integers(48, largest=4, dtype=torch.float32) for _ in range(4))
    y, second = run(
        library, x, packed.operand("clean"), geometry, tile, scale=scale, bias=bias, residual=residual,
        relu=True, affine=(second_scale, second_bias, True),
    )  # fmt: skip
    expected = reference(x, packed, geometry, "clean", scale, bias, residual, relu=True)
    assert torch.equal(y.double(), expected.to(dtype).double())
    after = (expected * second_scale[:, None, None] + second_bias[:, None, None]).relu()
    assert torch.equal(second.double(), after.to(dtype).double())


@pytest.mark.parametrize("tile", TILES)
def test_threads_may_run_in_any_order(library, tile):
    """With a barrier or a wait too few, what a thread reads depends on who ran first."""
    packed, geometry = layer((64, 64, 3, 3), padding=1)
    x = integers(1, 64, 5, 5)
    y = [run(library, x, packed.operand("clean"), geometry, tile, backwards=each) for each in (False, True)]
    assert torch.equal(y[0].double(), reference(x, packed, geometry, "clean"))
    assert torch.equal(y[0], y[1])


def test_a_lambda_runs_on_the_union(library):
    packed, geometry = layer((32, 16, 1, 1))
    x = integers(1, 16, 4, 4)
    y = run(library, x, packed.operand(0.5), geometry, "narrow")
    assert torch.equal(y.double(), reference(x, packed, geometry, 0.5))


@pytest.mark.parametrize("tile", TILES[1:])
@pytest.mark.parametrize("case", [((160, 32, 3, 3), {"padding": 1}), ((32, 80, 1, 2), {"stride": 2})], ids=str)
def test_runs_of_columns_are_left_out(library, case, tile):
    shape, arguments = case
    packed = TwoFourWeight(integers(*shape), slab_masks(shape, 0.4))
    geometry, x = Geometry.of(shape, **arguments), integers(2, shape[1], 6, 5)
    assert packed.column_runs is not None
    for path in ("clean", "adv", 0.5):
        y = run(library, x, packed.operand(path), geometry, tile, column_runs=packed.runs(path))
        assert torch.equal(y.double(), reference(x, packed, geometry, path))


def test_fractions_are_summed_in_float32(library):
    weight = torch.randn(32, 64, 3, 3).half()
    packed = TwoFourWeight(weight, {"clean": torch.rand(weight.shape) < 0.3})
    geometry = Geometry.of(weight.shape, padding=1)
    x = torch.randn(1, 64, 5, 5).half()
    y = run(library, x, packed.operand("clean"), geometry, "small")
    torch.testing.assert_close(y.double(), reference(x, packed, geometry, "clean"), rtol=2**-11, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conversions_are_those_of_torch(library, dtype):
    brain = dtype == torch.bfloat16
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(dtype)
    finite = ~numbers.isnan()
    widened = torch.tensor([library.widen(int(b) & 0xFFFF, brain) for b in bits])
    assert torch.equal(widened[finite], numbers[finite].float()) and widened[~finite].isnan().all()
    # Each number, and halfway to the next, and a little to either side of it.
    middle = torch.cat([numbers[finite].float() * factor for factor in (1, 1 + 2**-12, 1 + 2**-9, 1 - 2**-13)])[::7]
    narrowed = torch.tensor([library.narrow(float(v), brain) for v in middle], dtype=torch.int32).to(torch.int16)
    assert torch.equal(narrowed.view(dtype), middle.to(dtype))
    assert library.narrow(float("nan"), brain) & 0x7FFF > (0x7F80 if brain else 0x7C00)
