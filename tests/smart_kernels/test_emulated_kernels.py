"""What every GPU kernel must compute, on emulated GPUs whose instructions are written from the PTX manual."""

import pytest
import torch
from emulated import needs_compiler
from emulated_kernels import KERNELS, check_epilogue
from exact import integers, layer, reference

pytestmark = needs_compiler


def by_name(kernel, *others):
    """A test's parameters, by names that pytest's -k finds."""
    return pytest.param(KERNELS[kernel], *others, id="-".join(map(str, (kernel, *others))))


TILES = [by_name(name, tile) for name, kernel in KERNELS.items() for tile in kernel.tiles]
SPLIT = [by_name(name, tile) for name in ("2:4", "2:4 on Hopper") for tile in KERNELS[name].tiles]
SPLIT += [by_name("bitmap", tile) for tile in ("tall", "small")]
DTYPES = [by_name(name, dtype) for name, kernel in KERNELS.items() for dtype in kernel.dtypes]


@pytest.mark.parametrize(
    ("kernel", "tile", "case"),
    [by_name(name, tile, case) for name, kernel in KERNELS.items() for tile in kernel.tiles for case in kernel.cases],
)
def test_every_tile_computes_the_convolution(kernel, tile, case):
    shape, (n, h, w), arguments = kernel.cases[case]
    dtype = kernel.dtypes[0]
    packed, geometry = layer(kernel.packing, shape, dtype=dtype, **arguments)
    x = integers(n, geometry.in_channels, h, w, dtype=dtype)
    y = kernel.run(x, packed, geometry, "adv", tile)
    assert torch.equal(y.double(), reference(x, packed, geometry, "adv"))


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("kernel", "dtype"), DTYPES)
def test_any_mask_is_exact_on_any_path(kernel, dtype, density):
    packed, geometry = layer(kernel.packing, (72, 32, 3, 3), density, dtype, padding=1)
    x = integers(1, 32, 6, 6, dtype=dtype)
    for path in ("clean", "adv", 0.5):
        y = kernel.run(x, packed, geometry, path, kernel.tiles[0])
        assert torch.equal(y.double(), reference(x, packed, geometry, path))


@pytest.mark.parametrize(
    ("kernel", "tile", "dtype"),
    [by_name(name, tile, dtype) for name, each in KERNELS.items() for tile in each.tiles for dtype in each.dtypes],
)
@pytest.mark.parametrize("channels", [48, 45])
def test_scale_bias_residual_relu_and_second_result(kernel, tile, dtype, channels):
    check_epilogue(kernel, tile, dtype, channels)


@pytest.mark.parametrize(("kernel", "tile"), TILES)
def test_threads_may_run_in_any_order(kernel, tile):
    """With a barrier or a wait too few, what a thread reads depends on who ran first."""
    dtype = kernel.dtypes[0]
    packed, geometry = layer(kernel.packing, (64, 64, 3, 3), 0.4, dtype, padding=1)
    x = integers(1, 64, 5, 5, dtype=dtype)
    for backwards in (False, True):
        y = kernel.run(x, packed, geometry, "clean", tile, backwards=backwards)
        assert torch.equal(y.double(), reference(x, packed, geometry, "clean"))


@pytest.mark.parametrize("splits", [3, 5])
@pytest.mark.parametrize(("kernel", "tile"), SPLIT)
def test_thread_blocks_share_the_columns_of_a_tile(kernel, tile, splits):
    """Five blocks of columns, the last cut short: splits of one, or of different lengths."""
    dtype = kernel.dtypes[0]
    packed, geometry = layer(kernel.packing, (40, 64, 3, 3), 0.4, dtype, padding=1)
    x = integers(2, 64, 5, 5, dtype=dtype)
    for backwards in (False, True):
        y = kernel.run(x, packed, geometry, "adv", tile, splits=splits, backwards=backwards)
        assert torch.equal(y.double(), reference(x, packed, geometry, "adv"))


@pytest.mark.parametrize(("kernel", "tile"), SPLIT)
def test_more_splits_than_warps_that_add_them(kernel, tile):
    dtype = kernel.dtypes[0]
    packed, geometry = layer(kernel.packing, (40, 1568, 1, 1), dtype=dtype)
    x = integers(1, 1568, 3, 3, dtype=dtype)
    y = kernel.run(x, packed, geometry, "clean", tile, splits=12)
    assert torch.equal(y.double(), reference(x, packed, geometry, "clean"))


@pytest.mark.parametrize("channels", [48, 43])
@pytest.mark.parametrize("dtype", KERNELS["2:4"].dtypes, ids=str)
def test_the_sum_of_splits_has_the_whole_epilogue(dtype, channels):
    check_epilogue(KERNELS["2:4"], "small", dtype, channels, splits=3)
