"""The bitmap kernel on real instructions: equal to the reference on integers, as on the emulated GPU."""

import pytest
import torch
from emulated_kernels import BITMAP_CASES, HALVES
from exact import integers, layer, reference
from replayed import check, check_samples

from smart_kernels.backends import BACKENDS
from smart_kernels.backends.tensor_cores import Schedule
from smart_kernels.bitmap_ops import TILES
from smart_kernels.packing import BitmapWeight

BITMAP = BACKENDS["bitmap"]
pytestmark = pytest.mark.skipif(not BITMAP.available(), reason=BITMAP.available().why)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tile", range(-1, len(TILES)))
@pytest.mark.parametrize("case", BITMAP_CASES)
def test_every_tile_computes_the_convolution(case, tile, dtype):
    check(BITMAP, BITMAP_CASES[case], Schedule(tile), dtype)


@pytest.mark.parametrize("tile", range(-1, len(TILES)))
@pytest.mark.parametrize("splits", [0, 2, 5, 12, 32])
def test_thread_blocks_share_the_columns_of_a_tile(splits, tile):
    check(BITMAP, ((512, 512, 3, 3), (1, 4, 4), {"padding": 1}), Schedule(tile, splits), torch.float16)


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_any_mask_is_exact(density):
    """A full one takes 64 KB of shared memory for its values, or another tile."""
    packed, geometry = layer(BitmapWeight, (128, 128, 3, 3), density, torch.float16, padding=1)
    x = integers(8, 128, 9, 9, dtype=torch.float16).cuda()
    y = BITMAP.bind(packed.cuda(), geometry, "adv", None, None, False)(x, None)
    assert torch.equal(y, reference(x, packed, geometry, "adv").half())


@pytest.mark.parametrize("choice", [[0, 1, 1, 0, 1], [0] * 5, [1] * 5], ids=str)
def test_samples_run_on_their_own_paths(choice):
    check_samples(BITMAP, choice)
