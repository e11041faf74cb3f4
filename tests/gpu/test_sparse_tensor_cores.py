"""The 2:4 kernel on real instructions: equal to the reference on integers, as on the emulated GPU."""

import pytest
import torch
from two_four_cases import CASES, DTYPES, integers, layer, reference

from smart_kernels.backends import BACKENDS
from smart_kernels.two_four_ops import TILES

CUDA = BACKENDS["cuda"]
pytestmark = pytest.mark.skipif(not CUDA.available(), reason=CUDA.available().why)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", range(-1, len(TILES)))
@pytest.mark.parametrize("case", CASES)
def test_every_tile_computes_the_convolution(case, tile, dtype):
    """Also replayed from a CUDA graph, on another input."""
    shape, (n, h, w), arguments = CASES[case]
    packed, geometry = layer(shape, dtype=dtype, **arguments)
    packed, x = packed.cuda(), integers(n, shape[1], h, w, dtype=dtype).cuda()
    scale, bias = integers(2, shape[0], largest=4).cuda()
    residual = integers(*geometry.output_shape(x.shape), largest=9, dtype=dtype).cuda()
    call = CUDA.bind(packed, geometry, "adv", scale, bias, True, None, tile)

    def expected():
        return reference(x, packed, geometry, "adv", scale, bias, residual, True).to(dtype)

    assert torch.equal(call(x, residual), expected())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x, residual)
    x.copy_(integers(n, shape[1], h, w, dtype=dtype))
    graph.replay()
    assert torch.equal(y, expected())
