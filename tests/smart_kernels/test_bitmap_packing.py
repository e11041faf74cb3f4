"""The bitmap format: exactness against a model of the instruction, bytes, and corrupt or hostile states."""

import pytest
import torch
from corrupt import check_refused
from matrix_packing import problem

from smart_kernels import pack
from smart_kernels.packing import BitmapWeight, TwoFourWeight


def test_a_fifth_takes_a_quarter_of_dense_copies():
    """The values kept and a bit a weight, beside where chunks begin and what fills them up to multiples of eight."""
    weight, masks = problem((128, 128, 3, 3))
    packed = BitmapWeight(weight, masks)
    kept = sum(int(mask.sum()) for mask in masks.values()) / (2 * weight.numel())
    share = packed.nbytes / (2 * 2 * weight.numel())
    assert kept + 1 / 16 < share < (kept + 1 / 16) * 1.02 < 0.28
    assert packed.nbytes < 0.4 * TwoFourWeight(weight, masks).nbytes


def test_equal_masks_are_held_once():
    weight, masks = problem((64, 64, 3, 3))
    masks["adv"] = masks["clean"].clone()
    packed = BitmapWeight(weight, masks)
    assert packed.nbytes == BitmapWeight(weight, {"clean": masks["clean"]}).nbytes
    assert torch.equal(packed.dense("adv"), weight.where(masks["adv"], 0))


def test_the_largest_chunk_is_that_of_both_paths():
    weight, masks = problem((64, 128, 1, 1), (0.1, 0.9))
    largest = max(int(part.sum()) for part in masks["adv"].split(32))
    assert BitmapWeight(weight, masks).largest == -(-largest // 8) * 8
    assert BitmapWeight(weight, dict.fromkeys(masks, torch.zeros_like(masks["adv"]))).largest == 0


def test_auto_takes_it_only_where_kernels_run_it():
    weight, masks = problem((64, 64, 3, 3))
    assert pack(weight, masks).format != "bitmap"
    cuda = torch.device("cuda")
    assert BitmapWeight.has_kernels(cuda, torch.float16) and BitmapWeight.has_kernels(cuda, torch.bfloat16)
    assert not BitmapWeight.has_kernels(cuda, torch.float32)


def test_mixed_weights_are_kept_for_a_few_lambdas_only():
    packed = BitmapWeight(*problem((8, 8, 3, 3)))
    assert packed.operand(0.5).values is packed.operand(0.5).values
    for i in range(1, 8):
        packed.operand(i / 8)
    assert len(packed._mixes) <= 4
    packed.load_state_dict({name: value.clone() for name, value in packed.state_dict().items()})
    assert not packed._mixes


def at(name, index, change):
    def corrupt(state):
        state[name][index] = change(state[name][index])

    return corrupt


def move_bits(state):
    """All of the first chunk's last step, which its columns do not reach, and as many out of another."""
    state["bits"][0, 0, 3], state["bits"][0, 0, 0] = state["bits"][0, 0, 0].clone(), 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at("bits", (0, 0, 0), lambda word: word ^ -1), "do not begin where"),
        (at("starts", 0, lambda _: 8), "do not begin where"),
        (at("starts", 1, lambda start: start + 8), "do not begin where"),
        (at("starts", -1, lambda _: 2**31 - 1), "do not begin where"),
        (at("starts", -2, lambda _: -(2**31)), "do not begin where"),
        (move_bits, "channels that there are not"),
    ],
)
def test_corrupt_states_are_refused_and_never_run(change, message):
    packed = BitmapWeight(*problem((40, 72, 1, 1), (0.6, 0.6)))
    before = check_refused(packed, change, message)
    assert not packed.bits.any() and not packed.starts.any()
    packed.load_state_dict(before.state_dict())
    assert not packed.disabled
    assert torch.equal(packed.dense("adv"), before.dense("adv"))


def test_chunks_that_exceed_what_a_kernel_has_room_for_are_refused():
    """They may come in a valid state of as many values in all."""
    masks = [torch.zeros(64, 128, 1, 1, dtype=torch.bool) for _ in range(2)]
    masks[0][:, :64] = True
    masks[1][:32] = True
    even, uneven = (BitmapWeight(torch.ones(64, 128, 1, 1).half(), {"clean": mask}) for mask in masks)
    with pytest.raises(ValueError, match="a chunk of 4096 values exceeds the 2048"):
        even.check_state(uneven.state_dict())
    uneven.load_state_dict(even.state_dict())
    assert torch.equal(uneven.mask("clean"), masks[0])


@pytest.mark.parametrize("name", ["values", "bits", "starts"])
def test_buffers_of_other_shapes_or_dtypes_are_refused(name):
    packed = BitmapWeight(*problem((40, 20, 3, 3)))
    with pytest.raises(ValueError, match="has shape"):
        packed.check_state({name: packed.state_dict()[name][:-1].clone()})
    if name != "values":
        with pytest.raises(ValueError, match="int32 is needed"):
            packed.check_state({name: packed.state_dict()[name].to(torch.int64)})
