"""CUDA kernels compiled for GPUs that are not here: no spills, sparse tensor cores, copies that run beside them."""

import pytest

from benchmarks import sass

pytestmark = pytest.mark.skipif(sass.missing() is not None, reason=str(sass.missing()))


@pytest.fixture(scope="module")
def kernels():
    return sass.read_kernels()


def test_every_tile_is_there_for_both_types(kernels):
    for architecture in {kernel.architecture for kernel in kernels}:
        names = sorted(kernel.name for kernel in kernels if kernel.architecture == architecture)
        of_direct = [f"direct, {tile}" for tile in sass.DIRECT_TILES.values()]
        assert names == sorted(
            [f"{t}, {tile}" for t in ("float16", "bfloat16") for tile in sass.TILES.values()] + of_direct
        )


def test_nothing_spills_and_all_fits_the_smallest_gpu(kernels):
    for kernel in kernels:
        assert kernel.stack_bytes == 0, kernel
        assert 0 < kernel.registers <= 255
        assert kernel.registers * kernel.threads <= 65536
        assert kernel.shared_bytes <= 99 * 1024  # what the smallest GPUs since 8.0 have


def test_sparse_tensor_cores_multiply(kernels):
    for kernel in kernels:
        if kernel.name.startswith("direct"):
            continue
        assert kernel.instructions["HMMA.SP"] > 0, kernel
        assert kernel.instructions["HMMA"] == 0, kernel
        assert kernel.instructions["LDGSTS"] > 0 and kernel.instructions["LDSM"] > 0, kernel


def test_the_direct_kernel_multiplies_in_float32(kernels):
    """On plain cores: tensor cores would round."""
    for kernel in kernels:
        if kernel.name.startswith("direct"):
            assert kernel.instructions["FFMA"] > 0, kernel
            assert kernel.instructions["HMMA"] == kernel.instructions["HMMA.SP"] == 0, kernel
            assert 2 * kernel.registers * kernel.threads <= 65536  # two thread blocks share a multiprocessor


def test_the_table_has_a_line_a_kernel(kernels):
    assert len(list(sass.table(kernels))) == len(kernels) + 2
