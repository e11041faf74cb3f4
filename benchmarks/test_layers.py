"""Micro-benchmarks of single layers: ``pytest benchmarks --benchmark-only`` (pytest-benchmark)."""

import pytest
import torch

from benchmarks.cases import LAYERS
from smart_kernels import native, reference
from smart_kernels.backends import BACKENDS
from smart_kernels.geometry import Geometry
from smart_kernels.verify import TOLERANCE, relative_error


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["dense", "cpu"])
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layer(benchmark, case, backend):
    if backend == "cpu" and (why := native.missing()):
        pytest.skip(why)
    torch.manual_seed(0)
    weight = torch.randn(case.outputs, case.inputs, case.taps, case.taps)
    geometry = Geometry.of(weight.shape, case.stride, padding=case.taps // 2)
    packed = BACKENDS[backend].pack(weight, {"clean": torch.rand_like(weight) < case.density})
    x = torch.randn(case.batch, case.inputs, case.size, case.size)
    with torch.inference_mode():
        run = BACKENDS[backend].bind(packed, geometry, "clean", None, None, False)
        truth = reference.sparse_conv2d(x, packed.dense("clean"), geometry)
        assert relative_error(run(x, None), truth) < TOLERANCE[torch.float32]
        benchmark.group = str(case)
        benchmark(run, x, None)
    nonzeros = packed.nonzeros("clean")
    benchmark.extra_info["nonzeros"] = nonzeros
    if benchmark.stats:  # not with --benchmark-disable
        # Of the weights that are not zero, also where a backend multiplies by the zeros: comparable, not its own rate.
        operations = 2 * nonzeros * case.multiplications_per_weight
        benchmark.extra_info["gflops_on_nonzeros"] = operations / benchmark.stats.stats.median / 1e9
