"""The 2:4 format: exactness against a model of the instruction, overflow, sharing, and corrupt or hostile states."""

import pytest
import torch
from corrupt import check_refused
from gpu_cases import checkered_masks, slab_masks
from matrix_packing import problem

from smart_kernels import pack
from smart_kernels.packing import TwoFourWeight
from smart_kernels.packing.fragments import decode, encode
from smart_kernels.packing.overflow import split


def two_four_mask(shape, kept=2):
    """A mask of at most ``kept`` of each four input channels."""
    k, c, r, s = shape
    order = torch.rand(k, c // 4, 4, r, s).argsort(dim=2)
    return (order < kept).reshape(shape)


def test_metadata_lie_as_cutlass_reorders_them():
    """A second source: 16-bit words of four groups, whose rows are interleaved and 2 x 2 blocks turned about."""
    kept = two_four_mask((32, 32, 1, 1)).reshape(1, 32, 32)
    _, metadata = encode(torch.randn(1, 32, 32), kept)
    words = torch.zeros(32, 2, dtype=torch.long)
    for row in range(32):
        for column in range(0, 32, 4):
            first, second = kept[0, row, column : column + 4].nonzero().flatten().tolist()
            words[row, column // 16] |= (first | second << 2) << column % 16
    reordered = torch.zeros_like(words)
    for row in range(32):
        for column in range(2):
            to_row, to_column = row % 8 * 4 + row // 8, column
            if (to_row % 2, to_column) in ((0, 1), (1, 0)):
                to_row, to_column = to_row ^ 1, to_column ^ 1
            reordered[to_row, to_column] = words[row, column]
    assert torch.equal(metadata[0].long() & 0xFFFFFFFF, reordered[:, 0] | reordered[:, 1] << 16)


@pytest.mark.parametrize("kept", [1, 2])
def test_masks_that_obey_have_no_extra_steps(kept):
    shape = (64, 64, 3, 3)
    masks = {name: two_four_mask(shape, kept) for name in ("clean", "adv")}
    packed = TwoFourWeight(torch.randn(shape).half(), masks)
    assert packed.extra_steps("clean") == packed.extra_steps("adv") == packed.overflow("adv") == 0
    # Half the values and two bits for each of them.
    assert packed.nbytes <= 2 * (1 + 1 / 8 + 0.01) * packed.values[0].numel() * packed.slabs * 2
    assert packed.nbytes <= 0.5625 * 1.01 * 2 * 2 * packed.mask("clean").numel()


def test_a_fifth_kept_at_random_overflows_little():
    packed = TwoFourWeight(*problem((128, 128, 3, 3)))
    weights = packed.mask("clean").numel()
    expected = 4 * 0.2**3 * 0.8 + 2 * 0.2**4  # of each group of four, what is more than two
    for path in packed.paths:
        assert packed.overflow(path) / weights == pytest.approx(expected / 4, rel=0.1)
        assert packed.extra_steps(path) <= 0.3 * packed.slabs * packed.steps


def test_every_part_obeys_and_nothing_is_lost():
    kept = torch.rand(7, 32, 128) < torch.linspace(0, 1, 7)[:, None, None]
    regular, extra = split(kept)
    for part in (regular, extra.kept):
        assert int(part.unflatten(2, (-1, 4)).sum(dim=3).max()) <= 2
    whole = regular.int()
    for block, columns, moved in zip(extra.block, extra.columns, extra.kept, strict=True):
        whole[block] += torch.zeros(32, 128, dtype=torch.int32).index_add(1, columns, moved.int())
    assert torch.equal(whole, kept.int())
    assert 0 not in extra.block
    again = split(kept)[1]
    assert torch.equal(extra.columns, again.columns) and torch.equal(extra.block, again.block)


def test_a_full_mask_takes_twice_the_steps():
    _, extra = split(torch.ones(1, 32, 128, dtype=torch.bool))
    assert len(extra.block) == 4


def test_equal_masks_are_held_once():
    weight, masks = problem((64, 64, 3, 3))
    masks["adv"] = masks["clean"].clone()
    packed = TwoFourWeight(weight, masks)
    assert packed.nbytes == TwoFourWeight(weight, {"clean": masks["clean"]}).nbytes
    assert torch.equal(packed.dense("adv"), weight.where(masks["adv"], 0))


def test_auto_takes_it_only_where_kernels_run_it():
    weight, masks = problem((64, 64, 3, 3))
    assert pack(weight, masks).format != "2:4"


def test_mixed_values_are_kept_for_a_few_lambdas_only():
    packed = TwoFourWeight(*problem((8, 8, 3, 3)))
    assert packed.operand(0.5).values is packed.operand(0.5).values
    for i in range(1, 8):
        packed.operand(i / 8)
    assert len(packed._mixes) <= 4
    packed.load_state_dict({name: value.clone() for name, value in packed.state_dict().items()})
    assert not packed._mixes


def test_encoding_needs_no_weights_at_all():
    values, metadata = encode(torch.zeros(0, 32, 32), torch.zeros(0, 32, 32, dtype=torch.bool))
    assert decode(values, metadata)[0].shape == (0, 32, 32)


def at(name, index, value):
    def change(state):
        state[name][index] = value

    return change


def hold_twice(state):
    state["extra_columns"][1] = state["extra_columns"][0]
    state["extra_values"][1] = state["extra_values"][0]
    state["extra_metadata"][1] = state["extra_metadata"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at("metadata", (0, 0, 0), 0), "do not ascend"),
        (at("metadata", (0, 0, 5), -1), "do not ascend"),
        (at("extra_metadata", (0, 31), 0x44441444), "do not ascend"),
        (at("extra_columns", (0, 3), 128), "its block has not"),
        (at("extra_columns", (-1, 0), 255), "its block has not"),
        (at("extra_starts", 0, 1), "must ascend"),
        (at("extra_starts", -1, 2**31 - 1), "must ascend"),
        (at("extra_starts", -2, -(2**31)), "must ascend"),
        (at("values", (0, -1), 1.0), "channels that there are not"),  # columns beyond the last
        (at("values", (1, 0, 1), 1.0), "channels that there are not"),  # rows beyond the last
        (hold_twice, "twice"),
    ],
)
def test_corrupt_states_are_refused_and_never_run(change, message):
    torch.manual_seed(1)
    weight, masks = problem((40, 20, 3, 3), (0.6, 0.6))
    packed = TwoFourWeight(weight, masks)
    assert packed.extra_starts[1] >= 2
    before = check_refused(packed, change, message)
    assert bool((packed.extra_starts == -1).all())
    packed.load_state_dict(before.state_dict())
    assert not packed.disabled
    assert torch.equal(packed.dense("adv"), before.dense("adv"))


@pytest.mark.parametrize(
    "name", ["values", "metadata", "extra_values", "extra_metadata", "extra_columns", "extra_starts"]
)
def test_buffers_of_other_shapes_or_dtypes_are_refused(name):
    packed = TwoFourWeight(*problem((40, 20, 3, 3)))
    with pytest.raises(ValueError, match="has shape"):
        packed.check_state({name: packed.state_dict()[name][:-1].clone()})
    with pytest.raises(ValueError, match="are needed"):
        packed.check_state({name: packed.state_dict()[name].to(torch.float64)})


@pytest.mark.parametrize("shape", [(160, 64, 3, 3), (32, 48, 1, 5), (64, 32, 1, 2)], ids=str)
def test_runs_of_columns_that_no_channel_keeps_are_left_out(shape):
    weight, masks = torch.randn(shape).half(), slab_masks(shape, 0.3)
    packed = TwoFourWeight(weight, masks)
    assert packed.column_runs is not None and packed.columns < packed.all_columns
    assert packed.nbytes <= 0.6 * packed.steps * 32 / packed.all_columns * 2 * 2 * weight.numel()
    for path, mask in masks.items():
        assert torch.equal(packed.dense(path), weight.where(mask, 0)) and torch.equal(packed.mask(path), mask)
        assert packed.extra_steps(path) == 0
    assert torch.equal(TwoFourWeight(*packed.unpack()).values, packed.values)


@pytest.mark.parametrize("channels", [160, 40])
def test_slabs_leave_out_runs_of_their_own_where_that_is_more(channels):
    shape = (channels, 64, 3, 3)
    weight, masks = torch.randn(shape).half(), checkered_masks(shape)
    packed = TwoFourWeight(weight, masks)
    assert packed.column_runs.shape[1] == packed.slabs and packed.columns == packed.all_columns // 2
    for path, mask in masks.items():
        assert torch.equal(packed.dense(path), weight.where(mask, 0)) and torch.equal(packed.mask(path), mask)
    packed.validate()


@pytest.mark.parametrize(("shape", "groups"), [((128, 4, 3, 3), 32), ((128, 64, 1, 1), 2), ((30, 5, 3, 2), 3)], ids=str)
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_groups_come_back_and_cost_what_their_slabs_read(shape, groups, density):
    weight = torch.randn(shape).half()
    masks = {name: torch.rand(shape) < density for name in ("clean", "adv")}
    packed = TwoFourWeight(weight, masks, groups)
    packed.validate()
    for path, mask in masks.items():
        assert torch.equal(packed.dense(path), weight.where(mask, 0)) and torch.equal(packed.mask(path), mask)
    mix = torch.where(masks["clean"] & masks["adv"], weight, weight / 2).where(masks["clean"] | masks["adv"], 0)
    assert torch.equal(packed.dense(0.5), mix)
    again = TwoFourWeight(*packed.unpack(), groups)
    assert torch.equal(again.values, packed.values) and torch.equal(again.extra_columns, packed.extra_columns)
    if shape[0] > 32:
        assert packed.columns == max(32, shape[1]) * shape[2] * shape[3]


def test_a_weight_between_groups_is_refused():
    whole = torch.ones(8, 8, 1, 1).half()
    packed = TwoFourWeight(whole[:, :4], {"clean": two_four_mask((8, 4, 1, 1))}, groups=2)
    assert packed.dense("clean").shape == (8, 4, 1, 1)
    with pytest.raises(ValueError, match="channels that there are not"):
        packed.check_state(TwoFourWeight(whole, {"clean": two_four_mask(whole.shape)}).state_dict())
    with pytest.raises(ValueError, match="cannot be split into 3 groups"):
        TwoFourWeight(whole, {"clean": whole > 0}, groups=3)


def test_all_runs_stay_where_few_can_go_or_they_do_not_divide():
    for shape, keep in (((64, 64, 3, 3), 0.95), ((64, 48, 1, 1), 0.0), ((64, 24, 3, 3), 0.3)):
        mask = torch.rand(shape) < keep if shape[1] % 16 else slab_masks(shape, keep)["clean"]
        assert TwoFourWeight(torch.ones(shape).half(), {"clean": mask}).column_runs is None


@pytest.mark.parametrize(
    ("index", "value"), [((0, 0, 0), 36), ((0, 0, 0), -2), ((0, 0, 1), 0), ((1, 0, 0), -1), ((0, 0, 0), 2**31 - 1)]
)
def test_corrupt_runs_are_refused(index, value):
    shape = (64, 64, 3, 3)
    packed = TwoFourWeight(torch.randn(shape).half(), slab_masks(shape, 0.3))
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    state["column_runs"][index] = value
    with pytest.raises(ValueError, match="corrupt"):
        packed.check_state(state)
    with pytest.raises(ValueError, match="int32 for each path"):
        packed.check_state({"column_runs": packed.column_runs.long()})
