"""The 2:4 kernels on real instructions: equal to the reference on integers, as on the emulated GPUs."""

import pytest
import torch
from emulated_kernels import HALVES
from exact import integers, layer, reference
from gpu_cases import GROUPED_CASES, HOPPER_CASES, TWO_FOUR_CASES, checkered_masks, slab_masks
from replayed import check, check_samples

from smart_kernels.backends import BACKENDS
from smart_kernels.backends.tensor_cores import Schedule
from smart_kernels.geometry import Geometry
from smart_kernels.packing import TwoFourWeight
from smart_kernels.two_four_ops import TILES, WGMMA_TILES

CUDA, WGMMA = BACKENDS["cuda"], BACKENDS["wgmma"]
pytestmark = pytest.mark.skipif(not CUDA.available(), reason=CUDA.available().why)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tile", range(-1, len(TILES)))
@pytest.mark.parametrize("case", TWO_FOUR_CASES)
def test_every_tile_computes_the_convolution(case, tile, dtype):
    check(CUDA, TWO_FOUR_CASES[case], Schedule(tile), dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", GROUPED_CASES)
def test_groups_leave_out_the_columns_of_others(case, dtype):
    check(CUDA, GROUPED_CASES[case][1:], None, dtype)


@pytest.mark.skipif(not WGMMA.available(), reason=WGMMA.available().why)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tile", range(len(TILES), len(TILES + WGMMA_TILES)), ids=WGMMA_TILES)
@pytest.mark.parametrize("case", HOPPER_CASES)
def test_the_kernel_for_hopper_computes_the_convolution(case, tile, dtype):
    check(WGMMA, HOPPER_CASES[case], Schedule(tile), dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tile", range(-1, len(TILES)))
@pytest.mark.parametrize("splits", [0, 2, 5, 12, 32])
def test_thread_blocks_share_the_columns_of_a_tile(splits, tile, dtype):
    """36 blocks of columns; 0 splits leave the number to the operator, which splits where the GPU is not full."""
    check(CUDA, ((512, 512, 3, 3), (1, 4, 4), {"padding": 1}), Schedule(tile, splits), dtype)


@pytest.mark.parametrize("choice", [[0, 1, 1, 0, 1], [0] * 5, [1] * 5], ids=str)
def test_splits_of_samples_on_their_own_paths(choice):
    check_samples(CUDA, choice, Schedule(-1, 6))


def test_numbers_of_splits_that_there_cannot_be_are_refused():
    packed, geometry = layer(TwoFourWeight, (32, 64, 3, 3), dtype=torch.float16, padding=1)
    call = CUDA.bind(packed.cuda(), geometry, "clean", None, None, False, None, Schedule(-1, 6))
    with pytest.raises(RuntimeError, match="splits is 6: accepted are 1 to 5"):
        call(integers(1, 64, 4, 4, dtype=torch.float16).cuda(), None)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("tall", "tile"), [(64, tile) for tile in (-1, 1, 2, 3)] + [(32, -1), (32, 3)])
def test_runs_of_columns_are_left_out(tall, tile, dtype):
    shape = (160, 32, 3, 3)
    masks = slab_masks(shape, 0.4) if tall == 64 else checkered_masks(shape)
    packed = CUDA.pack(integers(*shape, dtype=dtype), masks).cuda()
    geometry, x = Geometry.of(shape, padding=1), integers(3, 32, 9, 7, dtype=dtype).cuda()
    assert packed.column_runs.shape[1] == -(-160 // tall)
    for path in ("clean", "adv", 0.5):
        y = CUDA.bind(packed, geometry, path, None, None, False, None, Schedule(tile))(x, None)
        assert torch.equal(y, reference(x, packed, geometry, path).to(dtype))
