"""The 2:4 kernel for Hopper: its operand against a model of the instruction, and what is particular to the kernel.

test_emulated_kernels.py has the rest.
"""

import ctypes

import pytest
import torch
from emulated import emulated_hopper, needs_compiler, problem_of
from emulated_kernels import hopper
from exact import integers, layer, reference
from gpu_cases import slab_masks
from wgmma_sp import operand as as_instruction_sees_it

from smart_kernels.geometry import Geometry
from smart_kernels.packing import TwoFourWeight
from smart_kernels.two_four_ops import WGMMA_TILES


@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (40, 32, 1, 1)], ids=str)
def test_warpgroups_fed_the_packed_operand_see_the_masked_weight(shape):
    """Without extra steps; two slabs make the 64 rows, warps 0 and 1 hold the first, 2 and 3 the second."""
    k, c, r, s = shape
    packed, _ = layer(TwoFourWeight, shape, 0.4, torch.float16)
    weight = packed.operand("adv")
    matrix = torch.zeros(-(-k // 64) * 64, packed.steps * 32, dtype=torch.float64)
    for row in range(0, k, 64):
        for step in range(packed.steps):
            values, metadata = [], []
            for warp in range(4):
                slab = min(row // 32 + warp // 2, packed.slabs - 1)
                at = weight.first_slab + slab, step
                values.append(weight.values[(*at, warp % 2)])
                metadata += [weight.metadata[at][(lane & ~2) | warp % 2 * 2] for lane in range(32)]
            found = as_instruction_sees_it(torch.cat(values), torch.stack(metadata))
            matrix[row : row + 64, 32 * step : 32 * step + 32] = found
    matrix = matrix[:k].reshape(k, r, s, c).permute(0, 3, 1, 2)
    expected = packed.dense("adv").double()
    # What is in extra steps is missing, and nothing else.
    missing = (matrix != expected).sum()
    assert bool(((matrix == expected) | (matrix == 0)).all())
    assert 0 < missing <= packed.overflow("adv")


def test_the_instructions_selector_names_the_lanes_that_hold_metadata():
    values, metadata = torch.ones(128, 8), torch.full((128,), 0x44444444)
    metadata[2::4] = metadata[3::4] = -0x11111112  # 0xEEEEEEEE: positions 2 and 3
    first, second = (as_instruction_sees_it(values, metadata, selector) for selector in (0, 1))
    assert torch.equal(first, torch.tensor([1.0, 1, 0, 0]).double().repeat(64, 8))
    assert torch.equal(second, torch.tensor([0.0, 0, 1, 1]).double().repeat(64, 8))


@needs_compiler
@pytest.mark.parametrize("overflow", [True, False], ids=["overflow", "2:4"])
@pytest.mark.parametrize("tile", WGMMA_TILES)
def test_threads_and_copies_may_come_in_any_order(tile, overflow):
    """With a barrier, a fence or a wait too few, results depend on who ran first, and on when a copy arrived.

    Extra steps wait for all products before them, so masks without any show other mistakes.
    """
    shape = (64, 64, 3, 3)
    masks = {"clean": torch.rand(shape) < 0.5} if overflow else slab_masks(shape, 1.0)
    packed, geometry = TwoFourWeight(integers(*shape, dtype=torch.float16), masks), Geometry.of(shape, padding=1)
    assert bool(packed.extra_steps("clean")) == overflow and packed.column_runs is None
    x = integers(1, 64, 5, 5, dtype=torch.float16)
    expected = reference(x, packed, geometry, "clean")
    for backwards in (False, True):
        for eager in (False, True):
            y = hopper(x, packed, geometry, "clean", tile, backwards=backwards, eager=eager)
            assert torch.equal(y.double(), expected), (backwards, eager)


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "arguments", "size", "ok"),
    [
        ((8, 32, 3, 3), {"padding": 1}, 8, True),
        ((8, 16, 3, 3), {"padding": 1}, 8, False),
        ((8, 32, 1, 1), {"stride": 9}, 20, False),
        ((8, 32, 3, 3), {"padding": 128}, 8, True),
        ((8, 32, 3, 3), {"padding": 129}, 8, False),
        ((8, 32, 3, 3), {"dilation": 64}, 140, True),
        ((8, 32, 3, 3), {"dilation": 65}, 140, False),
        ((8, 32, 3, 3), {"dilation": 128, "padding": 128}, 8, False),
    ],
)
def test_what_copies_cannot_do_is_refused(shape, arguments, size, ok):
    packed, geometry = layer(TwoFourWeight, shape, dtype=torch.float16, **arguments)
    problem, *_ = problem_of(integers(1, shape[1], size, size, dtype=torch.float16), packed.operand("clean"), geometry)
    assert emulated_hopper().takes(ctypes.byref(problem)) == ok
