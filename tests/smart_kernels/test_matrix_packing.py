"""What both formats for tensor cores promise of any weight."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_packing import problem

from smart_kernels.packing import BitmapWeight, TwoFourWeight


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
