"""How density is divided among layers, and which layers are masked or have masks of their own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import make_net
from torch import nn

from smart.allocation import allocate, apportion
from smart.conversion import convert
from smart.costs import nonzeros
from smart.layer_policy import select_layers
from smart.layers import smart_convs
from smart.models import create_model
from smart.stages import find_stages, stage_of_each
from smart_kernels import patterns


def weights(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) / (i + 1) for i, shape in enumerate(shapes)]


def counts(allocation, layers, pattern="unstructured", density=0.2):
    given = allocate(allocation, layers, {"clean": density, "adv": 0.1}, patterns.parse(pattern))
    return [each["clean"] * layer.numel() for each, layer in zip(given, layers, strict=True)]


@pytest.mark.parametrize("allocation", ["erk", "global"])
@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4"])
def test_the_whole_network_has_exactly_the_density(allocation, pattern):
    layers = weights((16, 4, 3, 3), (32, 16, 3, 3), (64, 32, 1, 1), (64, 64, 3, 3))
    unit = 16 if pattern == "block:4x4" else 1
    total = sum(counts(allocation, layers, pattern))
    assert total == pytest.approx(unit * round(0.2 * sum(layer.numel() for layer in layers) / unit))


def test_erk_is_that_of_the_paper():
    layers = weights((16, 4, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3))
    kept = counts("erk", layers, density=0.05)
    sides = [sum(layer.shape) for layer in layers]
    # No layer is full here, so the counts are in proportion to the sums of the sides.
    assert [k / kept[2] for k in kept] == pytest.approx([side / sides[2] for side in sides], rel=0.01)
    kept = counts("erk", layers, density=0.9)
    assert kept[0] == layers[0].numel() and sum(kept) == round(0.9 * sum(layer.numel() for layer in layers))


def test_global_keeps_the_largest_weights_of_the_network():
    layers = weights((8, 8, 3, 3), (8, 8, 3, 3), (8, 8, 3, 3))
    threshold = torch.cat([layer.abs().flatten() for layer in layers]).sort(descending=True).values[346]
    assert counts("global", layers) == pytest.approx([int((layer.abs() > threshold).sum()) for layer in layers])


def test_no_layer_is_left_empty():
    layers = [torch.full((4, 4, 3, 3), 1e-9), torch.ones(64, 64, 3, 3)]
    assert counts("global", layers, density=0.01)[0] == 1


def test_allocations_reach_the_masks():
    shares = {}
    for allocation in ("uniform", "erk", "global"):
        model = create_model("tiny", allocation=allocation, density={"clean": 0.2, "adv": 0.1})
        kept = nonzeros(model)
        masked = sum(layer.weight.numel() for layer in smart_convs(model).values())
        stem = kept["dense"] - masked
        assert kept["clean"] - stem == pytest.approx(0.2 * masked, abs=len(smart_convs(model)))
        assert kept["adv"] - stem == pytest.approx(0.1 * masked, abs=len(smart_convs(model)))
        first = next(iter(smart_convs(model).values()))
        shares[allocation] = float(first.mask_clean.float().mean())
    assert shares["uniform"] == pytest.approx(0.2, abs=1e-3) and min(shares["erk"], shares["global"]) > 0.25


def test_an_overlap_that_one_layer_cannot_have_names_it():
    with pytest.raises(ValueError, match=r"layer stages\.0\.0\.conv1: overlap 'disjoint' at densities"):
        create_model("tiny", allocation="erk", density=0.45, overlap="disjoint")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"allocation": "even"}, "unknown allocation 'even': accepted are uniform, erk, global"),
        ({"allocation": "erk", "pattern": "2:4"}, "allocation is 'erk': with pattern 2:4 every layer keeps 2 of 4"),
        ({"masked_layers": "none"}, "nothing to learn"),
        ({"masked_layers": "last_stages"}, "this network has 0 stages"),
        ({"masked_layers": "conv9"}, "matches no layer"),
        ({"masked_layers": "("}, "no regular expression"),
        ({"masked_layers": []}, "masked_layers is"),
        ({"dedicated_layers": "0", "overlap": "shared"}, "no layer has a mask for each path"),
        ({"dedicated_layers": "0", "density": {"clean": 0.2, "adv": 0.1}}, "so give one density"),
        ({"stages": ["7x"]}, "no module '7x'"),
    ],
)
def test_contradictions_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        convert(make_net(), **options)


def test_layer_policies():
    stages = {"conv": 0, "a.conv": 0, "b.conv": 1, "c.conv": 2}
    for policy, chosen in {
        "all": set(stages),
        "none": set(),
        "last_stages": {"b.conv", "c.conv"},
        "[ab].conv": {"a.conv", "b.conv"},
        "conv": {"conv"},
    }.items():
        assert select_layers(policy, stages, 3) == chosen
    assert select_layers(["conv", "c.*"], stages, 3) == {"conv", "c.conv"}
    with pytest.raises(TypeError, match="policy"):
        select_layers(3, stages, 3, "policy")


def test_stages_of_networks():
    class Torchvision(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.layer1, self.layer2 = nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3)), nn.ReLU()
            self.fc = nn.Linear(4, 2)

    net = Torchvision()
    assert find_stages(net) == ["layer1", "layer2"] and find_stages(make_net()) == []
    assert stage_of_each(net, find_stages(net)) == {"": 0, "conv1": 0, "layer1": 0, "layer1.0": 0, "layer2": 1, "fc": 1}


def test_masked_and_dedicated_layers():
    model = create_model("tiny", masked_layers="last_stages", dedicated_layers=r"stages\.2\..*")
    layers = smart_convs(model)
    assert {name.split(".")[2] for name in layers} == {"1", "2"}
    for name, layer in layers.items():
        dedicated = name.startswith("net.stages.2.")
        assert layer.shares_mask != dedicated
        assert torch.equal(layer.mask_clean, layer.mask_adv) != dedicated
    again = create_model(**model.spec)
    assert smart_convs(again).keys() == layers.keys()


def test_masks_that_are_one_by_their_overlap_are_marked():
    for overlap, density, one in (
        ("nested", 0.3, True),
        (1.0, 0.3, True),
        ("nested", {"clean": 0.3, "adv": 0.2}, False),
    ):
        model = convert(make_net(), density, overlap=overlap)
        assert all(layer.shares_mask == one for layer in smart_convs(model).values())


@given(
    st.integers(0, 200),
    st.lists(st.tuples(st.one_of(st.just(0.0), st.floats(1e-9, 1e6)), st.integers(0, 50)), min_size=1, max_size=6),
)
def test_apportion_is_exact_within_capacity(total, parts):
    shares, capacity = zip(*parts, strict=True)
    given_out = apportion(total, shares, capacity)
    assert sum(given_out) == min(total, sum(capacity))
    assert all(0 <= part <= most for part, most in zip(given_out, capacity, strict=True))


def test_apportion_is_proportional_and_spreads_overflow():
    assert apportion(10, [1, 4], [100, 100]) == [2, 8]
    assert apportion(10, [1, 1, 8], [100, 100, 2]) == [4, 4, 2]
