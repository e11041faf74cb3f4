"""Rewiring of every pattern and overlap, and networks trained with it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import assert_same_state, make_data, state_of
from torch import nn

import smart_kernels
from smart import TrainConfig, macs, train
from smart.checkpoint import load_into
from smart.conversion import convert
from smart.layers import smart_convs
from smart.rewire import Rewirer
from smart.rewire.moves import Part, exchange_within
from smart_kernels import patterns

DENSITIES = {"unstructured": 0.3, "2:4": None, "1:4": None, "4:8": None, "block:4x2": 0.3, "channel": 0.3}
OVERLAPS = ["independent", "shared", "nested", "disjoint", 0.5]


def stack(widths=(8, 16, 8)):
    return nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise((8, *widths))))


def small_net():
    """For images of :func:`small.make_data`; every layer but the stem divides by all the patterns."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def make(pattern, overlap="independent", seed=0, **options):
    torch.manual_seed(0)
    return convert(
        small_net(),
        options.pop("density", DENSITIES.get(pattern, 0.3)),
        pattern,
        overlap,
        filter_fn=lambda module, name: name != "0",
        seed=seed,
        **options,
    )


def masks_of(model):
    return {name: {path: mask.clone() for path, mask in c.masks.items()} for name, c in smart_convs(model).items()}


def facts(model):
    """What rewiring must conserve: live weights of each path, and of both."""
    masks = masks_of(model).values()
    both = sum(int((each["clean"] & each["adv"]).sum()) for each in masks)
    return {path: sum(int(each[path].sum()) for each in masks) for path in ("clean", "adv")} | {"both": both}


def rewire(model, **options):
    """One rewiring by random gradients; returns the masks before."""
    before = masks_of(model)
    rewirer = Rewirer(model, **options)
    for layer in smart_convs(model).values():
        for sink in layer.gradient_sinks.values():
            sink.copy_(torch.randn_like(sink))
    rewirer.after_step()
    rewirer.rewire(0.0)
    rewirer.close()
    return before


@settings(max_examples=60)
@given(
    pattern=st.sampled_from(list(DENSITIES)),
    overlap=st.sampled_from(OVERLAPS),
    adv=st.sampled_from([0.3, 0.15]),
    method=st.sampled_from(["sparse_momentum", "rigl"]),
    dedicated=st.sampled_from(["all", ".*1", "none"]),
    rate=st.floats(0.01, 0.99),
    seed=st.integers(0, 1000),
)
def test_rewiring_keeps_pattern_density_and_overlap(pattern, overlap, adv, method, dedicated, rate, seed):
    density = DENSITIES[pattern]
    if density is not None and overlap != "shared" and dedicated == "all":
        density = {"clean": density, "adv": adv}
    if pattern == "channel" and overlap in ("disjoint", 0.5):
        overlap = "nested"
    if overlap == "shared":
        dedicated = "all"
    torch.manual_seed(seed)
    model = convert(stack(), density, pattern, overlap, seed=seed, dedicated_layers=dedicated)
    parsed, before = patterns.parse(pattern), facts(model)
    for _ in range(3):
        rewire(model, prune_rate=rate, method=method)
        after = facts(model)
        assert {path: after[path] for path in ("clean", "adv")} == {path: before[path] for path in ("clean", "adv")}
        assert overlap == "independent" or after["both"] == before["both"]
        for layer in smart_convs(model).values():
            assert all(parsed.holds(mask) and mask.any() for mask in layer.masks.values())
            assert (layer.weight[~layer.union()] == 0).all()
            if layer.shares_mask:
                assert torch.equal(layer.mask_clean, layer.mask_adv)


@pytest.mark.parametrize("pattern", DENSITIES)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_masks_of_every_pattern_and_overlap_move(pattern, overlap):
    if pattern == "channel" and overlap in ("disjoint", 0.5):
        pytest.skip("channel masks are independent, shared or nested")
    density = DENSITIES[pattern]
    if overlap == "nested" and density:
        density = {"clean": 0.4, "adv": 0.2}
    model = convert(stack(), density, pattern, overlap)
    before = rewire(model)
    for name, layer in smart_convs(model).items():
        for path, mask in layer.masks.items():
            # Disjoint masks that fill the layer have nowhere to go.
            fills = overlap == "disjoint" and pattern in ("2:4", "4:8")
            assert torch.equal(mask, before[name][path]) == fills, (name, path)


@pytest.mark.parametrize("overlap", ["independent", "shared"])
def test_slabs_move_and_weights_within_those_that_stay(overlap):
    model = convert(nn.Conv2d(64, 16, 3), None, "8:2:8", overlap)
    layer, parsed = smart_convs(model)["net"], patterns.parse("8:2:8")

    def slabs(mask):
        return mask.reshape(2, 8, 2, 2, 16, 3, 3).any(4).any(1)

    old = {path: mask.clone() for path, mask in layer.masks.items()}
    rewirer = Rewirer(model)
    for sink in layer.gradient_sinks.values():
        sink.normal_()
    gradient = layer.gradient_sinks["clean"].clone()
    if overlap == "shared":
        gradient += layer.gradient_sinks["adv"]
    rewirer.after_step()
    rewirer.rewire(0.0)
    for path, mask in layer.masks.items():
        assert parsed.holds(mask) and int(mask.sum()) == int(old[path].sum()) == mask.numel() // 4
        before, after = slabs(old[path]), slabs(mask)
        assert int((before & ~after).sum()) == math.ceil(0.5 * int(before.sum()))
        stayed = (before & after).flatten(1, 2).repeat_interleave(8, 0).repeat_interleave(16, 1)
        assert (mask != old[path])[stayed].any()
    assert torch.equal(layer.mask_clean, layer.mask_adv) == (overlap == "shared")
    # In a new slab the two of four with the largest gradients live.
    new = (
        (slabs(layer.mask_clean) & ~slabs(old["clean"])).flatten(1, 2).repeat_interleave(8, 0).repeat_interleave(16, 1)
    )
    size = gradient.abs().unflatten(1, (-1, 4))
    largest = (size >= size.sort(dim=2).values[:, :, 2:3]).flatten(1, 2)
    assert torch.equal(layer.mask_clean & new, largest & new)


def test_trained_slabs_are_left_out_by_the_packed_weight():
    model = convert(nn.Conv2d(64, 128, 3), None, "64:2:8")
    layer = smart_convs(model)["net"]
    packed = smart_kernels.pack(layer.weight.detach().half(), layer.masks, format="2:4")
    assert 2 * packed.columns == packed.all_columns
    assert packed.extra_steps("clean") == packed.extra_steps("adv") == 0
    # Half of the columns, and of these 0.5625 in values and metadata.
    assert packed.nbytes / (2 * 2 * layer.weight.numel()) == pytest.approx(0.5 * 0.5625, rel=0.02)


def test_blocks_are_pruned_and_regrown_by_their_norms():
    model = convert(nn.Conv2d(16, 16, 3), {"clean": 0.3, "adv": 1.0}, "block:4x4")
    layer = smart_convs(model)["net"]

    def norms(tensor):
        return tensor.detach().reshape(4, 4, 4, 4, 3, 3).norm(dim=(1, 3))

    rewirer = Rewirer(model)
    layer.gradient_sinks["clean"].normal_()
    momentum, weight, old = (
        norms(layer.gradient_sinks["clean"]),
        norms(layer.weight),
        norms(layer.mask_clean.float()) > 0,
    )
    rewirer.after_step()
    moved = rewirer.rewire(0.0)["clean"]
    new = norms(layer.mask_clean.float()) > 0
    removed, kept, grown, passed = old & ~new, old & new, new & ~old, ~old & ~new
    assert int(removed.sum()) == math.ceil(0.5 * int(old.sum())) == moved // 16
    assert weight[removed].max() <= weight[kept].min() and momentum[grown].min() >= momentum[passed].max()
    # By the norm, which is not the order of the largest or the summed weights.
    assert not torch.equal(
        weight.argsort(dim=0), layer.weight.detach().reshape(4, 4, 4, 4, 3, 3).sum((1, 3)).argsort(dim=0)
    )


def test_groups_of_m_trade_their_smallest_weight_for_the_largest_momentum():
    alive = torch.tensor([[True, True, False, False], [True, False, True, False]])
    magnitude = torch.tensor([[5.0, 4.0, 0.0, 0.0], [1.0, 0.0, 2.0, 0.0]])
    momentum = torch.tensor([[9.0, 9.0, 1.0, 2.0], [9.0, 4.0, 9.0, 3.0]])
    everywhere = torch.ones_like(alive)
    half = exchange_within(Part(magnitude, momentum, alive, everywhere), 0.5)
    assert half.int().tolist() == [[1, 1, 0, 0], [0, 1, 0, 1]]
    some = exchange_within(Part(magnitude, momentum, alive, everywhere), 0.7)
    assert some.int().tolist() == [[1, 0, 0, 1], [0, 1, 0, 1]]
    # Three of four live: a group has one place to regrow, so it can lose one weight only.
    alive = torch.tensor([[True, True, True, False]])
    full = exchange_within(Part(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), torch.ones(1, 4), alive, alive | ~alive), 0.9)
    assert full.int().tolist() == [[1, 0, 1, 1]]


def test_channels_are_traded_within_each_side():
    model = convert(nn.Conv2d(16, 24, 3), 0.3, "channel")
    layer = smart_convs(model)["net"]
    before = rewire(model)["net"]["clean"]
    for side in (0, 1):
        old, new = (mask.transpose(0, side).flatten(1).any(1) for mask in (before, layer.mask_clean))
        assert int(old.sum()) == int(new.sum()) and not torch.equal(old, new)
    weight, old, new = layer.weight.detach(), before.flatten(1).any(1), layer.mask_clean.flatten(1).any(1)
    assert int((old & ~new).sum()) == math.ceil(0.5 * int(old.sum()))
    assert (weight[old & ~new][:, :] * layer.mask_clean[old & ~new]).abs().sum() == 0


@pytest.mark.parametrize(("method", "redistribute"), [("sparse_momentum", "none"), ("rigl", "auto")])
def test_layers_that_do_not_trade_keep_the_multiplications(method, redistribute):
    model = make("unstructured")
    before, counts = macs(model, (1, 8, 8)), {n: int(c.mask_clean.sum()) for n, c in smart_convs(model).items()}
    for _ in range(3):
        rewire(model, method=method, redistribute=redistribute)
    after = macs(model, (1, 8, 8))
    assert {path: after[path] for path in ("clean", "adv")} == {path: before[path] for path in ("clean", "adv")}
    assert {n: int(c.mask_clean.sum()) for n, c in smart_convs(model).items()} == counts
    rewire(model)
    assert macs(model, (1, 8, 8))["clean"] != before["clean"]


def test_rigl_goes_by_the_last_gradient_alone():
    ranks = {}
    for method in ("sparse_momentum", "rigl"):
        model = convert(stack((8,)), 0.3)
        rewirer = Rewirer(model, method=method)
        sinks = smart_convs(model)["net.0"].gradient_sinks
        for scale in (100.0, 1.0):
            torch.manual_seed(int(scale))
            sinks["clean"].copy_(scale * torch.randn_like(sinks["clean"]))
            gradient = sinks["clean"].clone()
            rewirer.after_step()
        ranks[method] = torch.equal(rewirer.state_dict()["net.0.clean"], gradient)
    assert ranks == {"sparse_momentum": False, "rigl": True}


@pytest.mark.parametrize("pattern", ["2:4", "channel"])
def test_patterns_under_which_layers_cannot_trade_say_so(pattern):
    with pytest.raises(ValueError, match=f"redistribute is 'momentum' and the pattern {pattern}"):
        Rewirer(make(pattern), redistribute="momentum")
    with pytest.raises(ValueError, match="every layer keeps its density"):
        train(make(pattern), make_data(), TrainConfig(epochs=1, redistribute="momentum"))


CONFIG = TrainConfig(
    epochs=3,
    batch_size=16,
    lr=0.05,
    eps=0.1,
    attack_step=0.05,
    attack_steps=1,
    val_attack_steps=1,
    crop_padding=0,
    rewire_every=2,
    rewire_unit="steps",
)


@pytest.mark.parametrize("pattern", DENSITIES)
def test_trained_networks_of_every_pattern_swap(pattern):
    model = make(pattern)
    before = masks_of(model)
    train(model, make_data(), TrainConfig.from_dict(CONFIG.to_dict() | {"epochs": 1}), progress=False)
    assert any(not torch.equal(c.mask_adv, before[name]["adv"]) for name, c in smart_convs(model).items())
    x = make_data().test[0]
    sparse = smart_kernels.swap(model, x, measure=False)
    assert max(smart_kernels.verify(model, sparse, x).values()) < 1e-5


def test_channels_left_by_training_are_cut_off_by_the_channels_backend():
    model = make("channel")
    train(model, make_data(), TrainConfig.from_dict(CONFIG.to_dict() | {"epochs": 1}), progress=False)
    x = make_data().test[0]
    sparse = smart_kernels.swap(model, x, backend="channels", strict=True)
    for row in sparse.report():
        # Layers between compact activations have no channels left to cut off: what they run on is free.
        assert min(row["density"].values()) == 1 or row["backend"] == "channels" or "compact" in row["why"]
    assert max(smart_kernels.verify(model, sparse, x).values()) < 1e-5


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("2:4", {"overlap": 0.5}),
        ("block:4x2", {"allocation": "erk"}),
        ("channel", {"overlap": "nested", "density": {"clean": 0.5, "adv": 0.3}}),
        ("unstructured", {"overlap": "disjoint", "dedicated_layers": ["3"]}),
    ],
    ids=str,
)
def test_a_killed_run_of_every_pattern_resumes_to_the_same_numbers(pattern, options, tmp_path):
    whole = make(pattern, **options)
    train(whole, make_data(), CONFIG, tmp_path / "whole", progress=False)
    killed = make(pattern, **options)
    left = [21]  # forward passes, into the second epoch

    def kill(module, args):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    hook = killed.register_forward_pre_hook(kill)
    with pytest.raises(KeyboardInterrupt):
        train(killed, make_data(), CONFIG, tmp_path / "killed", progress=False)
    hook.remove()
    resumed = make(pattern, **options)
    result = train(resumed, make_data(), CONFIG, tmp_path / "killed", resume=True, progress=False)
    assert len(result.history) == 3
    assert_same_state(state_of(whole), state_of(resumed))
    again = make(pattern, **options)
    load_into(again, result.last_path)
    assert_same_state(state_of(whole), state_of(again))


@pytest.mark.parametrize("method", ["sparse_momentum", "rigl"])
@pytest.mark.parametrize("overlap", ["independent", "shared"])
@pytest.mark.parametrize("pattern", ["unstructured", "block:2x2", "channel"])
def test_at_density_1_nothing_moves_and_no_weight_is_lost(pattern, overlap, method):
    model = convert(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3)), 1.0, pattern, overlap)
    before = {name: layer.weight.detach().clone() for name, layer in smart_convs(model).items()}
    rewirer = Rewirer(model, method=method)
    rewirer.after_step()
    for momentum in rewirer.state_dict().values():
        momentum.normal_()
    rewirer.rewire(0.0)
    for name, layer in smart_convs(model).items():
        assert torch.equal(layer.weight, before[name]) and layer.mask_clean.all() and layer.mask_adv.all()
