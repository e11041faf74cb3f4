"""The 2:4 kernels on real instructions: equal to the reference on integers, as on the emulated GPUs."""

import pytest
import torch
from two_four_cases import CASES, DTYPES, HOPPER_CASES, integers, layer, reference, slab_masks

from smart_kernels.backends import BACKENDS
from smart_kernels.geometry import Geometry
from smart_kernels.two_four_ops import TILES, WGMMA_TILES

CUDA, WGMMA = BACKENDS["cuda"], BACKENDS["wgmma"]
pytestmark = pytest.mark.skipif(not CUDA.available(), reason=CUDA.available().why)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", range(-1, len(TILES)))
@pytest.mark.parametrize("case", CASES)
def test_every_tile_computes_the_convolution(case, tile, dtype):
    check(CUDA, CASES[case], tile, dtype)


@pytest.mark.skipif(not WGMMA.available(), reason=WGMMA.available().why)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", range(len(TILES), len(TILES + WGMMA_TILES)), ids=WGMMA_TILES)
@pytest.mark.parametrize("case", HOPPER_CASES)
def test_the_kernel_for_hopper_computes_the_convolution(case, tile, dtype):
    check(WGMMA, HOPPER_CASES[case], tile, dtype)


def check(backend, case, tile, dtype):
    """Also replayed from a CUDA graph, on another input."""
    shape, (n, h, w), arguments = case
    packed, geometry = layer(shape, dtype=dtype, **arguments)
    packed, x = packed.cuda(), integers(n, shape[1], h, w, dtype=dtype).cuda()
    scale, bias = integers(2, shape[0], largest=4).cuda()
    residual = integers(*geometry.output_shape(x.shape), largest=9, dtype=dtype).cuda()
    call = backend.bind(packed, geometry, "adv", scale, bias, True, None, tile)

    def expected():
        return reference(x, packed, geometry, "adv", scale, bias, residual, True).to(dtype)

    assert torch.equal(call(x, residual), expected())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x, residual)
    x.copy_(integers(n, shape[1], h, w, dtype=dtype))
    graph.replay()
    assert torch.equal(y, expected())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [-1, *range(1, len(TILES))])
def test_runs_of_columns_are_left_out(tile, dtype):
    shape = (160, 32, 3, 3)
    packed = CUDA.pack(integers(*shape, dtype=dtype), slab_masks(shape, 0.4)).cuda()
    geometry, x = Geometry.of(shape, padding=1), integers(3, 32, 9, 7, dtype=dtype).cuda()
    assert packed.column_runs is not None
    for path in ("clean", "adv", 0.5):
        y = CUDA.bind(packed, geometry, path, None, None, False, None, tile)(x, None)
        assert torch.equal(y, reference(x, packed, geometry, path).to(dtype))
