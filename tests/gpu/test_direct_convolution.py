"""The direct kernel on a real GPU: equal to the reference on integers, as on the emulated one."""

import pytest
import torch
from direct_cases import CASES, integers, layer, reference

from smart_kernels.backends import BACKENDS
from smart_kernels.direct_ops import TILES

DIRECT = BACKENDS["direct"]
pytestmark = pytest.mark.skipif(not DIRECT.available(), reason=DIRECT.available().why)


@pytest.mark.parametrize("tile", range(-1, len(TILES)))
@pytest.mark.parametrize("case", CASES)
def test_every_tile_computes_the_convolution(case, tile):
    """Also replayed from a CUDA graph, on another input."""
    shape, (n, h, w), arguments = CASES[case]
    packed, geometry = layer(shape, **arguments)
    packed, x = packed.cuda(), integers(n, geometry.in_channels, h, w).cuda()
    scale, bias = integers(2, shape[0], largest=4).cuda()
    residual = integers(*geometry.output_shape(x.shape), largest=9).cuda()
    call = DIRECT.bind(packed, geometry, "adv", scale, bias, True, None, tile)

    def expected():
        return reference(x, packed, geometry, "adv", scale, bias, residual, True).float()

    assert torch.equal(call(x, residual), expected())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x, residual)
    x.copy_(integers(n, geometry.in_channels, h, w))
    graph.replay()
    assert torch.equal(y, expected())
