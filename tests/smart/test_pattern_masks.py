"""Random masks of every pattern, and networks that have them."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from small import make_data, make_net
from torch import nn

import smart_kernels
from smart import TrainConfig, train
from smart.checkpoint import load_checkpoint, save_checkpoint
from smart.layers import smart_convs
from smart.masks import nonzeros, random_masks
from smart.models import convert, create_model
from smart.rewire import Rewirer
from smart_kernels import patterns

PATTERNS = ["unstructured", "2:4", "1:4", "4:8", "3:5", "block:4x2", "block:64x16", "channel"]
SHAPES = [(16, 12, 3, 3), (8, 70, 1, 1), (9, 10, 5, 2), (6, 1, 3, 3), (1, 3, 1, 1)]


def draw(shape, density, pattern, overlap="independent", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return random_masks(shape, density, overlap, generator, patterns.parse(pattern))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [(0.2, 0.2), (0.05, 0.25)], ids=str)
def test_masks_obey_their_pattern(shape, density, pattern):
    density = dict(zip(("clean", "adv"), density, strict=True))
    masks = draw(shape, density, pattern)
    for mask in masks.values():
        assert mask.shape == shape
        assert mask.dtype == torch.bool
        assert mask.any()
        assert patterns.parse(pattern).holds(mask)
    again = draw(shape, density, pattern)
    assert all(torch.equal(masks[path], again[path]) for path in masks)
    if torch.Size(shape).numel() > 100 and not pattern.startswith("block:64"):
        other = draw(shape, density, pattern, seed=1)
        assert not torch.equal(masks["clean"], other["clean"])
        assert not torch.equal(masks["clean"], masks["adv"])


@given(
    st.tuples(*[st.integers(1, 20)] * 2, *[st.integers(1, 3)] * 2),
    st.floats(0.01, 1),
    st.integers(1, 7),
    st.integers(2, 8),
)
def test_nm_masks_have_exact_counts_up_to_what_the_pattern_holds(shape, density, n, m):
    assume(n < m)
    c = shape[1]
    capacity = shape[0] * shape[2] * shape[3] * sum(min(n, m, c - at) for at in range(0, c, m))
    numel = math.prod(shape)
    wanted = max(1, round(density * numel))
    if wanted > capacity:
        with pytest.raises(ValueError, match=f"pattern {n}:{m} can keep at most"):
            draw(shape, {"clean": density, "adv": density}, f"{n}:{m}")
        return
    for mask in draw(shape, {"clean": density, "adv": density}, f"{n}:{m}").values():
        assert int(mask.sum()) == wanted
        assert patterns.NM(n, m).holds(mask)


def test_nm_masks_reach_every_place():
    seen = torch.zeros(4, 8, 2, 2, dtype=torch.bool)
    for seed in range(60):
        seen |= draw((4, 8, 2, 2), {"clean": 0.25, "adv": 0.25}, "1:4", seed=seed)["clean"]
    assert seen.all()


@pytest.mark.parametrize("sides", [(4, 2), (3, 5), (64, 16)])
def test_block_masks_keep_whole_blocks(sides):
    shape, (height, width) = (16, 20, 3, 3), sides
    mask = draw(shape, {"clean": 0.3, "adv": 0.3}, f"block:{height}x{width}")["clean"]
    blocks = mask[::height, ::width]  # the first weight of each
    assert int(blocks.sum()) == max(1, round(0.3 * blocks.numel()))


@pytest.mark.parametrize("density", [0.05, 0.2, 0.45, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (128, 64, 1, 1), (32, 1, 3, 3), (16, 3, 3, 3)], ids=str)
def test_channel_masks_come_near_their_density(shape, density):
    mask = draw(shape, {"clean": density, "adv": density}, "channel")["clean"]
    assert abs(float(mask.float().mean()) - density) <= 0.06
    kept_in, kept_out = int(mask.any(0).any(1).any(1).sum()), int(mask.flatten(1).any(1).sum())
    if shape[1] >= 64:
        assert abs(kept_out / shape[0] - math.sqrt(density)) < 0.02
        assert abs(kept_in / shape[1] - math.sqrt(density)) < 0.05


@pytest.mark.parametrize("pattern", ["2:4", "block:4x2", "channel"])
def test_overlaps_of_groups(pattern):
    shape, density = (16, 16, 3, 3), {"clean": 0.2, "adv": 0.1}
    nested = draw(shape, density, pattern, "nested")
    assert torch.equal(nested["clean"] & nested["adv"], nested["adv"])
    shared = draw(shape, dict.fromkeys(density, 0.2), pattern, "shared")
    assert torch.equal(shared["clean"], shared["adv"])
    if pattern == "channel":
        with pytest.raises(ValueError, match="independent, shared or nested"):
            draw(shape, density, pattern, "disjoint")
    else:
        disjoint = draw(shape, density, pattern, "disjoint")
        assert not (disjoint["clean"] & disjoint["adv"]).any()
        half = draw(shape, density, pattern, 0.5)
        common = int((half["clean"] & half["adv"]).sum())
        assert common == pytest.approx(0.5 * int(half["adv"].sum()), abs=9)


def test_an_overlap_that_nm_cannot_have_is_refused():
    with pytest.raises(ValueError, match="at least 288 weights are in both; lower a density"):
        draw((8, 8, 3, 3), {"clean": 0.5, "adv": 0.5}, "2:4", "disjoint")


@pytest.mark.parametrize("pattern", ["2:4", "block:16x16", "channel"])
def test_networks_of_every_pattern_swap_and_save(pattern, tmp_path):
    model = create_model("tiny", in_channels=1, pattern=pattern, density=0.25).eval()
    assert model.pattern == pattern
    parsed = patterns.parse(pattern)
    assert all(parsed.holds(mask) for conv in smart_convs(model).values() for mask in conv.masks.values())
    counts = nonzeros(model)
    assert counts["clean"] / counts["dense"] == pytest.approx(0.25, abs=0.05)
    x = torch.rand(3, 1, 8, 8)
    sparse = smart_kernels.swap(model, x)
    assert max(smart_kernels.verify(model, sparse, x).values()) < 1e-5
    assert {row["pattern"] for row in sparse.report()} & {pattern, "1:4"}
    save_checkpoint(tmp_path / "m.safetensors", model)
    loaded, _ = load_checkpoint(tmp_path / "m.safetensors")
    assert loaded.pattern == pattern
    assert torch.equal(loaded(x, path="adv"), model(x, path="adv"))


def test_depthwise_layers_take_every_pattern():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    for pattern in PATTERNS:
        model = convert(net, 0.25, pattern)
        for conv in smart_convs(model).values():
            assert all(patterns.parse(pattern).holds(mask) for mask in conv.masks.values())


def test_rewiring_refuses_masks_it_would_break(tmp_path):
    model, data = convert(make_net(), 0.25, "2:4"), make_data()
    before = {name: layer.mask_clean.clone() for name, layer in smart_convs(model).items()}
    with pytest.raises(ValueError, match=r"pattern '2:4', and rewiring moves single weights so far.*regrow='none'"):
        Rewirer(model)
    with pytest.raises(ValueError, match="regrow='none'"):
        train(model, data, TrainConfig(epochs=1), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    config = TrainConfig(epochs=1, batch_size=12, regrow="none")
    train(model, data, config, tmp_path / "run", progress=False)
    assert all(torch.equal(layer.mask_clean, before[name]) for name, layer in smart_convs(model).items())
