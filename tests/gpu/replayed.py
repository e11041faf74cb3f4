"""A layer of small integers on a real GPU: equal to the truth, also when replayed from a CUDA graph on other input."""

import torch
from exact import integers, layer, reference

from smart_kernels.packing import FORMATS
from smart_kernels.paths import Samples


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


def check_samples(backend, choice, schedule=None):
    """256 channels on 4x4 pixels, the path of each sample as chosen."""
    packed, geometry = layer(FORMATS[backend.format], (256, 256, 3, 3), dtype=torch.float16, padding=1)
    packed, x = packed.cuda(), integers(len(choice), 256, 4, 4, dtype=torch.float16).cuda()
    scale, bias = integers(2, 2, 256, largest=4).cuda()
    samples = Samples.of(torch.tensor(choice), x)
    y = backend.bind_samples(packed, geometry, scale, bias, True, None, schedule)(x, None, samples)
    for i, path in enumerate(choice):
        expected = reference(x[i : i + 1], packed, geometry, packed.paths[path], scale[path], bias[path], None, True)
        assert torch.equal(y[i : i + 1], expected.half())
