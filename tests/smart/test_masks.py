from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from small import make_net
from torch import nn

from smart.conversion import convert
from smart.costs import macs, nonzeros
from smart.layers import smart_convs
from smart.masks import check_density, check_overlap, random_masks
from smart.models import create_model

densities = st.floats(0.01, 1.0)
overlaps = st.one_of(st.sampled_from(["independent", "disjoint", "nested"]), st.floats(0, 1))
shapes = st.tuples(*[st.integers(1, 6)] * 2, *[st.integers(1, 3)] * 2)


@given(shapes, densities, densities, overlaps, st.integers(0, 100))
def test_masks_have_exact_counts_and_overlap(shape, clean, adv, overlap, seed):
    density = {"clean": clean, "adv": adv}
    try:
        check_overlap(overlap, density)
    except ValueError:
        assume(False)
    masks = random_masks(shape, density, overlap, torch.Generator().manual_seed(seed))
    numel = torch.Size(shape).numel()
    counts = {path: max(1, round(density[path] * numel)) for path in density}
    assert {path: int(mask.sum()) for path, mask in masks.items()} == counts
    assert all(mask.shape == shape for mask in masks.values())
    common, least = int((masks["clean"] & masks["adv"]).sum()), max(0, sum(counts.values()) - numel)
    wanted = {"disjoint": 0, "nested": min(counts.values())}
    if overlap != "independent":
        target = wanted[overlap] if isinstance(overlap, str) else round(overlap * min(counts.values()))
        assert common == max(target, least)


def test_shared_masks_are_equal_and_independent_ones_are_not():
    density = {"clean": 0.3, "adv": 0.3}
    masks = random_masks((8, 8, 3, 3), density, "shared", torch.Generator().manual_seed(0))
    assert torch.equal(masks["clean"], masks["adv"])
    masks = random_masks((32, 32, 3, 3), density, "independent", torch.Generator().manual_seed(0))
    common = (masks["clean"] & masks["adv"]).float().mean()
    assert abs(float(common) - 0.09) < 0.01


def test_density_per_path():
    model = convert(make_net(), {"clean": 0.5, "adv": 0.25}, overlap="nested")
    for layer in smart_convs(model).values():
        assert int(layer.mask_clean.sum()) == round(0.5 * layer.weight.numel())
        assert int(layer.mask_adv.sum()) == round(0.25 * layer.weight.numel())
        assert torch.equal(layer.union(), layer.mask_clean)


@pytest.mark.parametrize(
    ("overlap", "density", "words"),
    [
        ("disjoint", 0.6, "at most 1"),
        ("shared", {"clean": 0.2, "adv": 0.3}, "nested"),
        (0.1, 0.9, "at least"),
        (1.5, 0.2, "fraction"),
        (True, 0.2, "fraction"),
        ("half", 0.2, "independent"),
    ],
)
def test_impossible_overlaps_are_refused(overlap, density, words):
    with pytest.raises(ValueError, match=words):
        convert(make_net(), density, overlap=overlap)


@pytest.mark.parametrize("density", [0, -0.1, 1.01, "0.2", True, float("nan"), {"clean": 0.2, "robust": 0.2}])
def test_bad_densities_are_refused(density):
    with pytest.raises(ValueError, match="density"):
        check_density(density)


def test_nonzeros_count_every_convolution():
    model = create_model("resnet18", density=0.2)
    counts = nonzeros(model)
    assert counts["dense"] == sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    assert counts["clean"] == counts["adv"] == pytest.approx(0.2 * counts["dense"], rel=1e-3)
    assert counts["union"] == pytest.approx(0.36 * counts["dense"], rel=1e-2)


def test_macs_of_the_published_networks():
    counts = macs(create_model("wrn_16_8", density=0.2), (3, 32, 32))
    assert counts["dense"] == pytest.approx(1.548e9, rel=1e-3)
    assert counts["clean"] == pytest.approx(0.2 * counts["dense"], rel=5e-3)


def test_macs_by_hand_and_buffers_stay():
    model = convert(make_net(), density=1.0, filter_fn=lambda module, name: name == "4")
    layer = smart_convs(model)["net.4"]
    layer.set_mask("adv", torch.zeros_like(layer.mask_adv))
    model.train()
    before = model.net[1].norms["clean"].running_mean.clone()
    first, last, linear = 8 * 1 * 9 * 8 * 8, 6 * 8 * 9 * 3 * 3, 6 * 3
    dense = first + last + linear
    assert macs(model, (1, 8, 8)) == {"dense": dense, "union": dense, "clean": dense, "adv": first + linear}
    assert model.training and torch.equal(before, model.net[1].norms["clean"].running_mean)
    with pytest.raises(ValueError, match="C, H, W"):
        macs(model, (1, 1, 8, 8))
