import pytest
import torch

import smart
from benchmarks import overflow


def test_a_channel_order_is_a_permutation_that_overflows_no_more():
    # Channels of which every second is full: neighbours of one kind overflow, mixed ones do not.
    mask = torch.zeros(16, 32, 3, 3, dtype=torch.bool)
    mask[:, :16] = True
    order = overflow.channel_order({"clean": mask})
    assert sorted(order.tolist()) == list(range(32))
    assert overflow.overflow_of({"clean": mask}) == 4 * 2 * 16 * 9
    assert overflow.overflow_of({"clean": mask[:, order]}) == 0
    assert torch.equal(order, overflow.channel_order({"clean": mask}))


def test_random_masks_overflow_as_computed():
    sums = overflow.measure([overflow.random_masks(0.2)])
    assert sums["overflow"] / sums["weights"] == pytest.approx((4 * 0.2**3 * 0.8 + 2 * 0.2**4) / 4, rel=0.05)
    assert sums["overflow"] == overflow.overflow_of(overflow.random_masks(0.2))
    assert sums["regular"] < sums["steps"] < 2 * sums["regular"]


def test_a_networks_masks_are_those_of_its_convolutions():
    model = smart.create_model("tiny", num_classes=10, in_channels=1, density=0.2, seed=0)
    layers = overflow.masks_of(model)
    assert layers and all(set(masks) == {"clean", "adv"} for masks in layers)
    assert "| tiny |" in overflow.line("tiny", overflow.measure(layers[:1]))
