"""The block format: which blocks it finds, exactness, sharing, and states that are corrupt or hostile."""

from itertools import pairwise

import pytest
import torch
from blocks import block_mask, block_problem
from corrupt import check_refused
from hypothesis import given, settings
from hypothesis import strategies as st

from smart_kernels import pack
from smart_kernels.packing import BlockWeight
from smart_kernels.packing.block import MAX_ROWS, block_of

SHAPE = (100, 40, 3, 3)


@settings(max_examples=60)
@given(
    st.integers(1, 150),
    st.integers(1, 70),
    st.sampled_from([(1, 1), (3, 3), (2, 5), (7, 7)]),
    st.sampled_from([(64, 16), (64, 32), (32, 16), (16, 16), (128, 64), (8, 16), (3, 5)]),
    st.tuples(*[st.sampled_from([0.0, 0.2, 0.6, 1.0])] * 2),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_any_blocks_come_back_bit_for_bit(k, c, kernel, block, densities, dtype):
    weight, masks = block_problem((k, c, *kernel), block, densities, dtype)
    weight[:: max(1, k // 3)] *= 0  # zeros that masks keep
    packed = BlockWeight(weight, masks)
    packed.validate()
    for path, mask in masks.items():
        assert torch.equal(packed.dense(path), torch.where(mask, weight, 0))
        assert torch.equal(packed.mask(path), mask)
    again, masks_again = packed.unpack()
    assert torch.equal(BlockWeight(again, masks_again).values, packed.values)


@pytest.mark.parametrize(
    ("shape", "block", "expected", "rows"),
    [
        ((128, 64, 3, 3), (64, 16), (64, 16), 1),
        ((128, 64, 3, 3), (64, 32), (64, 32), 1),
        ((256, 64, 3, 3), (128, 16), (128, 16), 1),
        ((128, 64, 1, 1), (32, 16), (32, 16), 2),
        ((128, 64, 3, 3), (16, 16), (16, 16), 4),
        ((96, 24, 3, 3), (64, 16), (32, 16), 2),  # 64 would pad more than 16 does
        ((32, 64, 3, 3), (32, 16), (32, 16), 1),  # no taller tile than there are channels
        ((128, 64, 3, 3), (8, 16), (8, 16), 1),
        ((128, 64, 3, 3), (1, 1), (1, 1), 1),
    ],
    ids=str,
)
def test_blocks_are_the_largest_that_hold(shape, block, expected, rows):
    packed = BlockWeight(*block_problem(shape, block))
    assert (packed.block, packed.rows_per_tile) == (expected, rows)


def test_blocks_hold_for_both_masks():
    coarse, fine = block_mask((128, 64, 3, 3), (64, 32), 0.5), block_mask((128, 64, 3, 3), (16, 16), 0.5)
    assert block_of([coarse]) == (64, 32)
    assert block_of([coarse, fine]) == block_of([fine, coarse]) == (16, 16)


@pytest.mark.parametrize("block", [(64, 16), (16, 16)], ids=str)
def test_two_paths_share_every_value(block):
    weight, masks = block_problem((128, 128, 3, 3), block, (0.2, 0.2), torch.float16)
    packed = BlockWeight(weight, masks)
    union = int((masks["clean"] | masks["adv"]).sum())
    assert packed.values.numel() == union
    # Two bytes a weight of the union; indices take little beside them.
    assert packed.nbytes <= 2 * union * 1.05
    assert packed.path_values("clean").data_ptr() == packed.path_values("adv").data_ptr()


def test_a_path_is_a_run_of_items_in_the_order_of_their_codes():
    packed = BlockWeight(*block_problem((128, 64, 3, 3), (64, 16)))
    segments = packed.segments.tolist()
    for begin, end in pairwise(segments):
        codes = packed.codes[begin:end]
        assert bool((codes.diff() > 0).all())
    items = [packed.items_per_tile(path) for path in ("clean", "adv", 0.5)]
    assert max(items[:2]) <= items[2] <= sum(items[:2])


def test_auto_takes_blocks_only_where_kernels_run_them():
    weight, masks = block_problem((128, 64, 3, 3), (64, 16))
    assert pack(weight, masks).format != "block"
    fewest = pack(weight, masks, "block").nbytes
    assert fewest < pack(weight, masks).nbytes


def test_mixed_values_are_kept_for_a_few_lambdas_only():
    packed = BlockWeight(*block_problem(SHAPE, (16, 16)))
    assert packed.path_values(0.5) is packed.path_values(0.5)
    for i in range(1, 20):
        packed.path_values(i / 20)
    assert len(packed._mixes) <= 4
    packed.load_state_dict({name: value.clone() for name, value in packed.state_dict().items()})
    assert not packed._mixes


def at(name, index, value):
    def change(state):
        state[name][index] = value

    return change


def swapped(name, i, j):
    def change(state):
        state[name][[i, j]] = state[name][[j, i]]

    return change


COMMON = [
    (at("codes", 3, -1), "names no slab and tap"),
    (at("codes", 3, 3 * 9), "names no slab and tap"),
    (at("codes", 3, 2**31 - 1), "names no slab and tap"),
    (lambda state: state["codes"].copy_(state["codes"][0].expand_as(state["codes"])), "twice"),
    (at("segments", 0, 1), "must ascend"),
    (at("segments", -1, 2**31 - 1), "must ascend"),
    (at("segments", -2, -(2**31)), "must ascend"),
    (at("values", (slice(None), -1, -1), 1.0), "channels that there are not"),
    (at("values", (slice(None), -1, -1), float("nan")), "channels that there are not"),
]
ROWS = [
    (at("rows", 0, 0), "keeps no row"),
    (at("rows", 0, 1 << 4), "one the tile has not"),
    (at("rows", 0, -1), "one the tile has not"),
    (lambda state: state["rows"].copy_(state["rows"] >> MAX_ROWS | state["rows"] << MAX_ROWS & 0xF00), "another path"),
    (at("starts", 0, 1), "does not begin"),
    (at("starts", -1, 2**31 - 1), "does not begin"),
    (lambda state: state["rows"].copy_(state["rows"] | state["rows"] << 1 & 0xE0E), "does not begin|blocks for"),
]


@pytest.mark.parametrize(
    ("block", "change", "message"),
    [*(((64, 16), *case) for case in COMMON), *(((16, 16), *case) for case in COMMON + ROWS)],
)
def test_corrupt_states_are_refused_and_never_run(block, change, message):
    # Channels are such that the last blocks are padded on both sides.
    weight, masks = block_problem((120, 40, 3, 3), block, (0.5, 0.5))
    masks["clean"][:64, :, 0, 0] = masks["adv"][64:, :, 0, 0] = True
    masks["clean"][64:, :, 0, 0] = masks["adv"][:64, :, 0, 0] = False
    packed = BlockWeight(weight, masks)
    before = check_refused(packed, change, message)
    assert bool((packed.segments == -1).all())  # kernels find nothing to walk
    packed.load_state_dict(before.state_dict())
    assert not packed.disabled
    assert torch.equal(packed.dense("adv"), before.dense("adv"))


@pytest.mark.parametrize("name", ["values", "codes", "segments", "rows", "starts"])
def test_buffers_of_other_shapes_or_dtypes_are_refused(name):
    packed = BlockWeight(*block_problem(SHAPE, (16, 16)))
    with pytest.raises(ValueError, match="has shape"):
        packed.check_state({name: packed.state_dict()[name][:-1].clone()})
    if name != "values":
        with pytest.raises(ValueError, match="int32 is needed"):
            packed.check_state({name: packed.state_dict()[name].to(torch.int64)})


def test_more_codes_than_an_index_can_name_are_refused(monkeypatch):
    monkeypatch.setattr("smart_kernels.packing.block.MAX_CODES", 8)
    with pytest.raises(ValueError, match="more taps and input channels"):
        BlockWeight(*block_problem((16, 16, 3, 3), (16, 16)))
