"""Kernels compiled for GPUs that are not here: no spills, tensor cores, copies that run beside the products."""

import re

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import aot
from benchmarks.aot import Body

BLOCKS = Body(samples=True, second=True)
FINE = Body("bfloat16", block=(16, 16), rows=4, split=True)
REDUCE = Body(reduces=True, samples=True, second=True)
TMA = Body(second=True, tma=True)


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
        (TMA, 90, "wgmma"),
        (Body("bfloat16", tma=True, taps=(1, 1), stride=2, split=True), 90, "wgmma"),
        (Body(tma=True, block=(128, 64)), 90, "wgmma"),
    ],
    ids=str,
)
def test_bodies_compile_without_spills_and_use_tensor_cores(body, capability, instruction):
    made = aot.compile_body(body, capability)
    assert made.instruction == instruction
    assert made.stack_bytes == 0
    assert 0 < made.registers <= 255
    assert made.shared_bytes <= (227 if body.tma else 99) * 1024  # what Hopper, or the smallest GPUs since 8.0 have
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


def test_with_tma_a_buffer_is_filled_anew_when_all_warps_have_left_it_and_products_wait_for_nothing_else():
    made = aot.compile_body(TMA, 90)
    pattern = r"mbarrier\.try_wait|wgmma\.mma_async|wgmma\.wait_group\S* \d+|bar\.sync|cp\.async\.bulk\.tensor"
    lines = re.findall(pattern, made.ptx)
    loop = lines[lines.index("mbarrier.try_wait") :]
    step = TMA.schedule.channels // TMA.block[1]
    waits = [line for line in loop if "wait_group" in line]
    assert [line.split()[-1] for line in waits] == [str(step), "0"]
    first = loop[: loop.index(waits[0])]
    assert first.count("wgmma.mma_async") == step
    filled = loop[loop.index(waits[0]) : loop.index(waits[1])]
    assert filled.index("bar.sync") < filled.index("cp.async.bulk.tensor")
    assert filled.count("cp.async.bulk.tensor") == step + 1
    assert "wgmma.mma_async" not in filled


def test_the_table_names_each_body():
    lines = list(aot.table("split"))
    assert lines[2].startswith("| float16, 3x3, blocks 64x16, split | 8.0 | mma |")
