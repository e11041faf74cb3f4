"""A layer of small integers on a real GPU: equal to the truth, also when replayed from a CUDA graph on other input."""

import torch
from exact import integers, layer, reference

from smart_kernels.packing import FORMATS


def check(backend, case, schedule, dtype):
    """One of gpu_cases.py, cut up as the backend is told."""
    shape, (n, h, w), arguments = case
    packed, geometry = layer(FORMATS[backend.format], shape, dtype=dtype, **arguments)
    packed, x = packed.cuda(), integers(n, geometry.in_channels, h, w, dtype=dtype).cuda()
    scale, bias = integers(2, shape[0], largest=4).cuda()
    residual = integers(*geometry.output_shape(x.shape), largest=9, dtype=dtype).cuda()
    call = backend.bind(packed, geometry, "adv", scale, bias, True, None, schedule)

    def expected():
        return reference(x, packed, geometry, "adv", scale, bias, residual, True).to(dtype)

    assert torch.equal(call(x, residual), expected())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x, residual)
    x.copy_(integers(*x.shape, dtype=dtype))
    graph.replay()
    assert torch.equal(y, expected())
