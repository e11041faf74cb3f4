"""Micro-benchmarks of single layers: ``pytest benchmarks --benchmark-only`` (pytest-benchmark)."""

import pytest
import torch

from benchmarks.cases import LAYERS
from smart_kernels import native, reference
from smart_kernels.backends import BACKENDS
from smart_kernels.geometry import Geometry


@pytest.mark.parametrize("backend", ["dense", "cpu"])
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layer(benchmark, case, backend):
    if backend == "cpu" and (why := native.missing()):
        pytest.skip(why)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.randn(case.channels, case.channels, 3, 3)
    geometry = Geometry.of(weight.shape, padding=1)
    packed = BACKENDS[backend].pack(weight, {"clean": torch.rand_like(weight) < case.density})
    x = torch.randn(case.batch, case.channels, case.size, case.size)
    with torch.inference_mode():
        run = BACKENDS[backend].bind(packed, geometry, "clean", None, None, False)
        truth = reference.sparse_conv2d(x, packed.dense("clean"), geometry)
        torch.testing.assert_close(run(x, None), truth, rtol=1e-3, atol=1e-3)
        benchmark.group = str(case)
        benchmark.extra_info["nonzeros"] = packed.nonzeros("clean")
        benchmark(run, x, None)
