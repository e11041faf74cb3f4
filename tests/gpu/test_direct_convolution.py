"""The direct kernel on a real GPU: equal to the reference on integers, as on the emulated one."""

import pytest
import torch
from gpu_cases import DIRECT_CASES
from replayed import check

from smart_kernels.backends import BACKENDS
from smart_kernels.direct_ops import TILES

DIRECT = BACKENDS["direct"]
pytestmark = pytest.mark.skipif(not DIRECT.available(), reason=DIRECT.available().why)


@pytest.mark.parametrize("tile", range(-1, len(TILES)))
@pytest.mark.parametrize("case", DIRECT_CASES)
def test_every_tile_computes_the_convolution(case, tile):
    check(DIRECT, DIRECT_CASES[case], tile, torch.float32)
