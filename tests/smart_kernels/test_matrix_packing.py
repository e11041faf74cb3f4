"""What both formats for tensor cores promise of any weight."""

import mma
import mma_sp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_packing import PROBLEMS, problem

from smart_kernels.packing import BitmapWeight, TwoFourWeight

MODELS = pytest.mark.parametrize(("packing", "model"), [(BitmapWeight, mma), (TwoFourWeight, mma_sp)])


@MODELS
@pytest.mark.parametrize(("shape", "densities"), PROBLEMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_instructions_fed_the_packed_operand_see_the_masked_weight(shape, densities, dtype, packing, model):
    weight, masks = problem(shape, densities, dtype)
    packed = packing(weight, masks)
    for path, mask in masks.items():
        assert torch.equal(model.as_instructions_see_it(packed, path), (weight * mask).double())


@MODELS
def test_instructions_see_the_mix_of_a_lambda(packing, model):
    packed = packing(*problem((20, 24, 3, 3)))
    assert torch.equal(model.as_instructions_see_it(packed, 0.25), packed.dense(0.25).double())


@settings(max_examples=40)
@given(
    st.sampled_from([BitmapWeight, TwoFourWeight]),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from([(1, 1), (3, 3), (2, 5)]),
    st.tuples(*[st.sampled_from([0.0, 0.2, 0.6, 1.0])] * 2),
    st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_any_mask_comes_back_bit_for_bit(packing, k, c, kernel, densities, dtype):
    weight, masks = problem((k, c, *kernel), densities, dtype)
    weight[:: max(1, k // 3)] *= 0  # zeros that masks keep, negative ones too
    if packing is BitmapWeight:
        weight[~(masks["clean"] | masks["adv"])] = float("nan")  # of no concern
    packed = packing(weight, masks)
    packed.validate()
    for path, mask in masks.items():
        assert torch.equal(packed.dense(path), torch.where(mask, weight, 0))
        assert not torch.signbit(packed.dense(path)[~mask | (weight == 0)]).any()
        assert torch.equal(packed.mask(path), mask)
    again = packing(*packed.unpack())
    assert all(torch.equal(a, b) for a, b in zip(packed.buffers(), again.buffers(), strict=True))
