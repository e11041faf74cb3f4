"""What is particular to the 2:4 kernel, on an emulated GPU; test_emulated_kernels.py has the rest."""

import pytest
import torch
from emulated import emulated_library, needs_compiler
from emulated_kernels import HALVES, two_four
from exact import integers, layer, reference
from gpu_cases import GROUPED_CASES, checkered_masks, slab_masks

from smart_kernels.geometry import Geometry
from smart_kernels.packing import TwoFourWeight
from smart_kernels.two_four_ops import TILES

pytestmark = needs_compiler


@pytest.mark.parametrize("tile", TILES[1:])
@pytest.mark.parametrize("case", [((160, 32, 3, 3), {"padding": 1}), ((32, 80, 1, 2), {"stride": 2})], ids=str)
def test_runs_of_columns_are_left_out(case, tile):
    shape, arguments = case
    packed = TwoFourWeight(integers(*shape, dtype=torch.float16), slab_masks(shape, 0.4))
    geometry, x = Geometry.of(shape, **arguments), integers(2, shape[1], 6, 5, dtype=torch.float16)
    assert packed.column_runs is not None
    for path in ("clean", "adv", 0.5):
        y = two_four(x, packed, geometry, path, tile)
        assert torch.equal(y.double(), reference(x, packed, geometry, path))


@pytest.mark.parametrize("channels", [72, 24])
def test_runs_of_columns_are_left_out_by_slabs_of_their_own(channels):
    shape = (channels, 64, 3, 3)
    packed = TwoFourWeight(integers(*shape, dtype=torch.float16), checkered_masks(shape))
    geometry, x = Geometry.of(shape, padding=1), integers(2, shape[1], 6, 5, dtype=torch.float16)
    assert packed.column_runs.shape == (2, packed.slabs, 18)
    for path in ("clean", "adv", 0.5):
        y = two_four(x, packed, geometry, path, "narrow")
        assert torch.equal(y.double(), reference(x, packed, geometry, path))


@pytest.mark.parametrize("case", GROUPED_CASES)
def test_groups_leave_out_the_columns_of_others(case):
    tall, shape, (n, h, w), arguments = GROUPED_CASES[case]
    packed, geometry = layer(TwoFourWeight, shape, 0.4, torch.float16, **arguments)
    x = integers(n, geometry.in_channels, h, w, dtype=torch.float16)
    assert packed.column_runs.shape[1] == -(-shape[0] // tall)
    for path, tile in (("adv", "narrow"), (0.5, "narrow"), ("clean", "small" if tall == 64 else "narrow")):
        y = two_four(x, packed, geometry, path, tile)
        assert torch.equal(y.double(), reference(x, packed, geometry, path))


@pytest.mark.parametrize("path", ["clean", "adv"])
def test_thread_blocks_share_the_columns_that_are_left(path):
    shape = (160, 64, 3, 3)
    packed = TwoFourWeight(integers(*shape, dtype=torch.float16), slab_masks(shape, 0.5))
    geometry, x = Geometry.of(shape, padding=1), integers(1, 64, 4, 4, dtype=torch.float16)
    assert packed.runs(path).shape[2] * 16 > 128  # so that there are several blocks to share
    y = two_four(x, packed, geometry, path, "small", splits=2)
    assert torch.equal(y.double(), reference(x, packed, geometry, path))


def test_small_maps_are_split_and_others_are_not():
    """(tiles, blocks of columns) of the small tile, 64 channels x 64 pixels, on 132 multiprocessors."""
    choose = emulated_library().choose_splits
    for tiles, blocks, splits in (
        (8, 36, 12),  # 512 to 512 channels, 3x3, one map of 4x4: three blocks each
        (4, 18, 9),  # 256 to 256, 8x8: two blocks each
        (8, 9, 1),  # 128 to 128, 16x16: too little is saved
        (16, 5, 1),  # 64 to 64, 32x32
        (32, 36, 4),  # 512 to 512, 16 maps of 4x4
        (66, 36, 2),
        (67, 36, 1),  # two splits would not fit
        (1, 4, 1),
        (1, 36, 12),  # no more than 16, and 12 take as long
        (1, 4096, 16),
    ):
        assert choose(tiles, blocks, 132) == splits, (tiles, blocks)
    for tiles in range(1, 200):
        for blocks in range(1, 80):
            splits = choose(tiles, blocks, 132)
            assert 1 <= splits <= blocks and (splits == 1 or tiles * splits <= 132)


def test_fractions_are_summed_in_float32():
    weight = torch.randn(32, 64, 3, 3).half()
    packed = TwoFourWeight(weight, {"clean": torch.rand(weight.shape) < 0.3})
    geometry = Geometry.of(weight.shape, padding=1)
    x = torch.randn(1, 64, 5, 5).half()
    y = two_four(x, packed, geometry, "clean", "small")
    torch.testing.assert_close(y.double(), reference(x, packed, geometry, "clean"), rtol=2**-11, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_conversions_are_those_of_torch(dtype):
    library = emulated_library()
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
