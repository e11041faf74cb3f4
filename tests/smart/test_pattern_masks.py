"""Random masks of every pattern, and networks that have them."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import smart_kernels
from smart.checkpoint import load_checkpoint, save_checkpoint
from smart.conversion import PatternWarning, convert
from smart.costs import nonzeros
from smart.layers import smart_convs
from smart.masks import check_overlap, random_masks
from smart.models import create_model
from smart_kernels import patterns

PATTERNS = {"unstructured": 0.2, "2:4": 0.5, "1:4": 0.25, "4:8": 0.5, "3:5": 0.6, "block:4x2": 0.2, "channel": 0.2}
SHAPES = [(16, 40, 3, 3), (8, 80, 1, 1), (12, 40, 5, 2)]


def draw(shape, density, pattern, overlap="independent", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return random_masks(shape, {"clean": density, "adv": density}, overlap, generator, patterns.parse(pattern))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks_obey_their_pattern(shape, pattern):
    masks = draw(shape, PATTERNS[pattern], pattern)
    for mask in masks.values():
        assert mask.shape == shape
        assert mask.dtype == torch.bool
        assert mask.any()
        assert patterns.parse(pattern).holds(mask)
    again = draw(shape, PATTERNS[pattern], pattern)
    assert all(torch.equal(masks[path], again[path]) for path in masks)
    other = draw(shape, PATTERNS[pattern], pattern, seed=1)
    assert not torch.equal(masks["clean"], other["clean"])
    assert not torch.equal(masks["clean"], masks["adv"])


@given(
    st.tuples(*[st.integers(1, 6)] * 2, *[st.integers(1, 3)] * 2),
    st.integers(1, 7),
    st.integers(2, 8),
    st.one_of(st.sampled_from(["independent", "disjoint", "shared", "nested"]), st.floats(0, 1)),
)
def test_every_group_of_m_keeps_exactly_n_and_overlaps_are_exact(shape, n, m, overlap):
    assume(n < m)
    shape = (shape[0], m * shape[1], *shape[2:])
    density = dict.fromkeys(("clean", "adv"), n / m)
    try:
        check_overlap(overlap, density)
    except ValueError:
        assume(False)
    masks = draw(shape, n / m, f"{n}:{m}", overlap)
    groups = {path: mask.unflatten(1, (-1, m)).sum(2) for path, mask in masks.items()}
    assert all((count == n).all() for count in groups.values())
    common = (masks["clean"] & masks["adv"]).unflatten(1, (-1, m)).sum(2)
    wanted = {"disjoint": 0.0, "shared": 1.0, "nested": 1.0}.get(overlap, overlap)
    if overlap != "independent":
        assert int(common.sum()) == round(wanted * n * common.numel())
        assert int(common.max()) - int(common.min()) <= 1


@pytest.mark.parametrize("pattern", ["4:2:8", "8:1:16", "1:3:12"])
def test_one_slab_of_several_keeps_n_of_every_four(pattern):
    v, n, m = map(int, pattern.split(":"))
    shape = (16, 8 * m, 3, 2)
    for overlap, same in (("independent", False), ("shared", True), ("nested", True)):
        masks = draw(shape, n / m, pattern, overlap)
        assert torch.equal(masks["clean"], masks["adv"]) == same
        for mask in masks.values():
            assert patterns.parse(pattern).holds(mask) and int(mask.sum()) * m == n * mask.numel()
            kept = mask.unflatten(1, (-1, m // 4, 16)).any(3).unflatten(0, (-1, v))
            assert bool((kept.sum(3) == 1).all())
    with pytest.raises(ValueError, match="independent, shared or nested"):
        draw(shape, n / m, pattern, "disjoint")
    with pytest.raises(ValueError, match="keeps"):
        draw(shape, 0.9, pattern)


@pytest.mark.parametrize("density", [0.2, 0.6, {"clean": 0.5, "adv": 0.25}])
def test_nm_takes_no_other_density(density):
    with pytest.raises(ValueError, match=r"pattern 2:4 keeps 2 of every 4 weights, which is 0\.5"):
        convert(nn.Conv2d(4, 4, 3), density, "2:4")
    assert nonzeros(convert(nn.Conv2d(4, 4, 3), pattern="2:4"))["adv"] == 72


def test_nm_masks_reach_every_place():
    seen = torch.zeros(4, 8, 2, 2, dtype=torch.bool)
    for seed in range(60):
        seen |= draw((4, 8, 2, 2), 0.25, "1:4", seed=seed)["clean"]
    assert seen.all()


@pytest.mark.parametrize("sides", [(4, 2), (2, 5), (16, 20)])
def test_block_masks_keep_whole_blocks(sides):
    shape, (height, width) = (16, 20, 3, 3), sides
    mask = draw(shape, 0.3, f"block:{height}x{width}")["clean"]
    blocks = mask[::height, ::width]  # the first weight of each
    assert int(blocks.sum()) == max(1, round(0.3 * blocks.numel()))


@pytest.mark.parametrize("density", [0.05, 0.2, 0.45, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (128, 64, 1, 1), (32, 1, 3, 3), (16, 3, 3, 3)], ids=str)
def test_channel_masks_come_near_their_density(shape, density):
    mask = draw(shape, density, "channel")["clean"]
    assert abs(float(mask.float().mean()) - density) <= 0.06
    kept_in, kept_out = int(mask.any(0).any(1).any(1).sum()), int(mask.flatten(1).any(1).sum())
    if shape[1] >= 64:
        assert abs(kept_out / shape[0] - math.sqrt(density)) < 0.02
        assert abs(kept_in / shape[1] - math.sqrt(density)) < 0.05


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x2", "channel"])
def test_overlaps_of_groups(pattern):
    def both(clean, adv, overlap):
        generator = torch.Generator().manual_seed(0)
        return random_masks(
            (16, 16, 3, 3), {"clean": clean, "adv": adv}, overlap, generator, patterns.parse(pattern)
        ).values()

    clean, adv = both(0.2, 0.1, "nested")
    assert torch.equal(clean & adv, adv)
    clean, adv = both(0.2, 0.2, "shared")
    assert torch.equal(clean, adv)
    if pattern == "channel":
        with pytest.raises(ValueError, match="independent, shared or nested"):
            both(0.2, 0.1, "disjoint")
        return
    clean, adv = both(0.2, 0.1, "disjoint")
    assert not (clean & adv).any()
    clean, adv = both(0.2, 0.1, 0.5)
    assert int((clean & adv).sum()) == pytest.approx(0.5 * int(adv.sum()), abs=4)


def test_an_overlap_that_nm_cannot_have_is_refused():
    with pytest.raises(ValueError, match=r"'disjoint' at densities 0\.75 and 0\.75: their sum must be at most 1"):
        convert(nn.Conv2d(8, 8, 3), None, "3:4", "disjoint")


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("block:16x16", "10 output channels are no multiple of 16"),
        ("block:2x8", "12 input channels are no multiple of 8"),
        ("3:8", "12 input channels are no multiple of 8"),
    ],
)
def test_layers_that_do_not_divide_are_named_and_stay_dense(pattern, why):
    net = nn.Sequential(nn.Conv2d(16, 80, 3), nn.BatchNorm2d(80), nn.Conv2d(80, 12, 1), nn.Conv2d(12, 10, 1))
    net[2] = nn.Conv2d(80, 16, 1) if pattern == "block:16x16" else net[2]
    net[3] = nn.Conv2d(16, 10, 1) if pattern == "block:16x16" else net[3]
    with pytest.warns(PatternWarning, match=f"1 of 3 layers cannot have pattern {pattern}: 3: its {why}.*stay dense"):
        model = convert(net, pattern=pattern)
    assert list(smart_convs(model)) == ["net.0", "net.2"]
    with pytest.raises(ValueError, match=f"3: its {why}"):
        convert(net, pattern=pattern, strict=True)
    with pytest.raises(ValueError, match="1 of 1 layers cannot"):
        convert(net, pattern=pattern, filter_fn=lambda module, name: name == "3")
    with pytest.raises(ValueError, match=f"cannot have pattern {pattern}: its {why}"):
        draw(net[3].weight.shape, None, pattern)


@pytest.mark.parametrize("pattern", ["2:4", "block:16x16", "channel"])
def test_networks_of_every_pattern_swap_and_save(pattern, tmp_path):
    model = create_model("tiny", in_channels=1, pattern=pattern).eval()
    assert model.pattern == pattern
    parsed = patterns.parse(pattern)
    assert all(parsed.holds(mask) for conv in smart_convs(model).values() for mask in conv.masks.values())
    counts = nonzeros(model)
    assert counts["clean"] / counts["dense"] == pytest.approx(0.5 if pattern == "2:4" else 0.2, abs=0.01)
    x = torch.rand(3, 1, 8, 8)
    sparse = smart_kernels.swap(model, x)
    assert max(smart_kernels.verify(model, sparse, x).values()) < 1e-5
    assert pattern in {row["pattern"] for row in sparse.report()}
    save_checkpoint(tmp_path / "m.safetensors", model)
    loaded, _ = load_checkpoint(tmp_path / "m.safetensors")
    assert loaded.pattern == pattern
    assert torch.equal(loaded(x, path="adv"), model(x, path="adv"))


def test_a_checkpoint_of_a_network_with_dense_layers_loads_without_repeating_the_warning(tmp_path, recwarn):
    with pytest.warns(PatternWarning):
        model = create_model("tiny", in_channels=1, pattern="block:64x16")
    save_checkpoint(tmp_path / "m.safetensors", model)
    recwarn.clear()
    loaded, _ = load_checkpoint(tmp_path / "m.safetensors")
    assert smart_convs(loaded).keys() == smart_convs(model).keys() and not recwarn.list
