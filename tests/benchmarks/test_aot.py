"""Kernels compiled for GPUs that are not here: no spills, tensor cores, copies that run beside the products."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import aot
from benchmarks.aot import Body

BLOCKS = Body(samples=True, second=True)
FINE = Body("bfloat16", block=(16, 16), rows=4, split=True)
REDUCE = Body(reduces=True, samples=True, second=True)


@pytest.mark.parametrize(
    ("body", "capability", "instruction"),
    [
        (BLOCKS, 80, "mma"),
        (BLOCKS, 90, "wgmma"),
        (BLOCKS, 100, "tcgen05.mma"),
        (FINE, 90, "wgmma"),
        (Body("float32", precision="tf32x3"), 80, "mma"),
        (Body("float32", block=(128, 64)), 90, "wgmma"),
        (Body(block=(16, 16)), 90, "mma"),
        (REDUCE, 90, "none"),
    ],
    ids=str,
)
def test_bodies_compile_without_spills_and_use_tensor_cores(body, capability, instruction):
    made = aot.compile_body(body, capability)
    assert made.instruction == instruction
    assert made.stack_bytes == 0
    assert 0 < made.registers <= 255
    assert made.shared_bytes <= 99 * 1024  # what the smallest GPUs since 8.0 have
    if not body.reduces:
        assert made.copies > 0


def test_copies_of_several_steps_are_under_way_while_one_is_multiplied():
    """Loads that depend on loads of the same step would halve the pipeline, and wait for all of it at each step."""
    made = aot.compile_body(BLOCKS, 90)
    loop = made.ptx[made.ptx.index("wgmma.mma_async") :]
    before = made.ptx[: made.ptx.index("wgmma.mma_async")]
    waits = [int(line.split()[-1].rstrip(";")) for line in before.splitlines() if "cp.async.wait_group" in line]
    assert waits[-1] == 2 * (BLOCKS.schedule.stages - 2)  # two copies a step
    assert "cp.async.cg.shared.global" in loop


def test_the_table_names_each_body():
    lines = list(aot.table("split"))
    assert lines[2].startswith("| float16, 3x3, blocks 64x16, split | 8.0 | mma |")
