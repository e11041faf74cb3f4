"""Channels that coupled layers agree on: masks at the start, rewired ones, and what is left to compute."""

import copy
import math

import pytest
import torch
from small import assert_same_state, make_data, state_of
from torch import nn

import smart_kernels
from smart import TrainConfig, create_model, train
from smart.checkpoint import load_checkpoint, save_checkpoint
from smart.conversion import PatternWarning, convert
from smart.costs import macs, nonzeros
from smart.coupled_masks import CoupledLayers
from smart.layers import DualBatchNorm2d, smart_convs
from smart.models import ResNet, build
from smart.rewire import Rewirer
from smart_kernels.coupling import find_streams
from smart_kernels.paths import PATHS

OVERLAPS = ["independent", "shared", "nested"]


def make(overlap="independent", density=0.25, seed=0, **options):
    """Two residual stages; the second begins with a shortcut convolution."""
    torch.manual_seed(0)
    net = ResNet((2, 2), 3, 1, (16, 24), (1, 2))
    return convert(net, density, "coupled", overlap, lambda _, name: name != "conv1", seed, **options)


def coupled(model):
    return CoupledLayers(smart_convs(model), find_streams(model))


def assert_coupled(model):
    """Every layer around a stream keeps the same channels of it, and its mask is made of both sides."""
    groups = coupled(model)
    for path in PATHS:
        kept = groups.kept(path)
        for name, layer in groups.layers.items():
            assert torch.equal(layer.masks[path], groups.mask(name, kept)), (path, name)
    return {path: groups.kept(path) for path in PATHS}


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_layers_around_a_stream_keep_the_same_channels(overlap):
    model = make(overlap, {"clean": 0.3, "adv": 0.2} if overlap == "nested" else 0.25)
    kept = assert_coupled(model)
    for stream in kept["clean"]:
        clean, adv = (kept[path][stream] for path in PATHS)
        if overlap == "nested":
            assert torch.equal(clean & adv, adv) and adv.sum() < clean.sum()
        else:
            assert torch.equal(clean, adv) == (overlap == "shared")
    again, other = make(), make(seed=1)
    assert nonzeros(again) == nonzeros(make())
    assert not torch.equal(again.net.stages[0][0].conv1.mask_adv, other.net.stages[0][0].conv1.mask_adv)


@pytest.mark.parametrize("name", ["resnet18", "wrn_40_2"])
@pytest.mark.parametrize("density", [0.05, 0.2, {"clean": 0.5, "adv": 0.37}])
def test_densities_are_met_to_a_channel(name, density):
    model = convert(build(name), density, "coupled", filter_fn=lambda _, layer: layer != "conv1")
    groups, kept = coupled(model), assert_coupled(model)
    weights = sum(layer.weight.numel() for layer in groups.layers.values())
    for path, wanted in density.items() if isinstance(density, dict) else [(path, density) for path in PATHS]:
        alive = sum(int(layer.masks[path].sum()) for layer in groups.layers.values())
        assert abs(alive / weights - wanted) < 5e-4, path
        for stream, channels in kept[path].items():
            assert abs(int(channels.sum()) - math.sqrt(wanted) * stream.channels) < 1.05, (path, stream)


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_channels_come_in_multiples(density):
    model = create_model("wrn_40_2", density=density, pattern="coupled:16")
    groups, kept = coupled(model), assert_coupled(model)["adv"]
    assert {int(channels.sum()) % 16 for channels in kept.values()} == {0}
    alive = sum(int(layer.mask_adv.sum()) for layer in groups.layers.values())
    weights = sum(layer.weight.numel() for layer in groups.layers.values())
    assert alive / weights == pytest.approx(density, abs=0.011)  # a step is an eighth of the widest stream
    assert min(rewire(model).values()) > 0
    assert {int(each.sum()) % 16 for path in PATHS for each in assert_coupled(model)[path].values()} == {0}


def test_a_stream_that_has_no_multiple_keeps_what_it_has():
    net = nn.Sequential(nn.Conv2d(3, 20, 3), nn.ReLU(), nn.Conv2d(20, 7, 3))
    for density, wanted in ((0.1, [16, 7]), (1.0, [20, 7])):
        model = convert(net, density, "coupled:16")
        assert [int(layer.mask_adv.flatten(1).any(1).sum()) for layer in smart_convs(model).values()] == wanted


def test_layers_with_one_mask_give_their_streams_one_set_of_channels():
    model = make(dedicated_layers=r"stages\.1\..*")
    for _ in range(2):
        kept = assert_coupled(model)
        same = [torch.equal(a, b) for a, b in zip(*(kept[path].values() for path in PATHS), strict=True)]
        # The first stage's stream and the insides of its two blocks; the same of the second.
        assert sorted(same) == [False] * 3 + [True] * 3
        assert min(rewire(model).values()) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": "disjoint"}, "masks of pattern 'coupled' are independent, shared or nested"),
        ({"overlap": 0.5}, "masks of pattern 'coupled' are independent, shared or nested"),
        ({"allocation": "erk"}, "with pattern coupled no layer has channels of its own"),
        ({"allocation": "global"}, "take 'uniform'"),
    ],
)
def test_what_coupled_channels_cannot_have_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_network_that_cannot_be_traced_gets_channels_of_each_layer():
    net = nn.Sequential(nn.Conv2d(8, 16, 3), Branches(), nn.Conv2d(16, 8, 3))
    with pytest.warns(PatternWarning, match="cannot be traced .*Each layer gets channels of its own"):
        model = convert(net, 0.25, "coupled")
    assert model.pattern == "channel"
    assert torch.equal(model.net[0].mask_adv, convert(net, 0.25, "channel").net[0].mask_adv)
    with pytest.raises(ValueError, match=r"Take pattern 'channel', or a forward that torch.fx can trace"):
        convert(net, 0.25, "coupled", strict=True)


@pytest.mark.parametrize("name", ["tiny", "wrn_16_8"])
def test_activations_keep_the_channels_of_their_stream_and_nothing_changes(name):
    model = create_model(name, in_channels=1, density=0.2, pattern="coupled").eval()
    for module in model.modules():
        if isinstance(module, DualBatchNorm2d):  # constants of dropped channels that are not zero
            for norm in module.norms.values():
                nn.init.normal_(norm.bias)
                norm.running_mean.normal_()
    x = torch.rand(2, 1, 8, 8)
    sparse = smart_kernels.swap(model, x, measure=False)
    assert sparse.runs_compact
    assert max(smart_kernels.verify(model, sparse, x).values()) < 1e-5
    for path in PATHS:
        compact = sparse._compact.of(sparse.net, path, sparse.paths)
        for layer, conv in smart_convs(model).items():
            inputs, _, outputs, _ = compact.channels[layer]
            kept = [int(conv.masks[path].transpose(0, side).flatten(1).any(1).sum()) for side in (1, 0)]
            assert [inputs, outputs] == kept, layer


def rewire(model, progress=0.0, **options):
    """One rewiring by random gradients."""
    torch.manual_seed(1)
    rewirer = Rewirer(model, **options)
    for layer in smart_convs(model).values():
        for sink in layer.gradient_sinks.values():
            sink.copy_(torch.randn_like(sink))
    rewirer.after_step()
    moved = rewirer.rewire(progress)
    rewirer.close()
    return moved


@pytest.mark.parametrize("method", ["sparse_momentum", "rigl"])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_rewiring_keeps_coupling_densities_and_overlap(overlap, method):
    model = make(overlap, {"clean": 0.4, "adv": 0.2} if overlap == "nested" else 0.25)
    before, counts = assert_coupled(model), macs(model, (1, 8, 8))
    common = [int((before["clean"][s] & before["adv"][s]).sum()) for s in before["clean"]]
    for progress in (0.0, 0.3):
        assert min(rewire(model, progress, method=method).values()) > 0
        after = assert_coupled(model)
        assert all(macs(model, (1, 8, 8))[path] == counts[path] for path in PATHS)
        if overlap != "independent":
            assert [int((a & b).sum()) for a, b in zip(*(after[p].values() for p in PATHS), strict=True)] == common
        for layer in smart_convs(model).values():
            assert (layer.weight[~layer.union()] == 0).all()
            assert layer.shares_mask == (overlap == "shared")
    for path in PATHS:
        moved = [not torch.equal(a, b) for a, b in zip(before[path].values(), after[path].values(), strict=True)]
        assert all(moved)


def test_channels_are_ranked_by_all_coupled_layers_together():
    model = make("shared")
    groups = coupled(model)
    stream = max(groups.streams, key=lambda each: len(each.writers) + len(each.readers))
    kept = groups.kept("clean")
    alive, dead = (mask.nonzero().flatten().tolist() for mask in (kept[stream], ~kept[stream]))
    assert len(stream.writers) >= 2 and len(stream.readers) >= 2
    with torch.no_grad():
        for name in (*stream.writers, *stream.readers):
            side = int(name in stream.readers)
            # Each layer by itself finds another channel the smallest.
            layer = groups.layers[name]
            layer.weight.transpose(0, side)[alive[1:]] = layer.masks["clean"].transpose(0, side)[alive[1:]] * 0.1
            layer.weight.transpose(0, side)[alive[0]] *= 0
    rewirer = Rewirer(model, prune_rate=1e-9)  # one channel of each stream
    layer = groups.layers[stream.readers[-1]]
    layer.gradient_sinks["adv"][:, dead[2]] = 1.0
    rewirer.after_step()
    rewirer.rewire(0.0)
    after = groups.kept("clean")[stream]
    assert not after[alive[0]] and after[alive[1:]].all() and after[dead[2]]


def test_regrown_channels_change_nothing_and_can_learn():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 12, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 1))
    model = convert(net, 0.25, "coupled", "shared").eval()
    first, second = model.net[0], model.net[3]

    def inner():
        return first.mask_adv.flatten(1).any(1)

    old, outputs = inner(), second.mask_adv.flatten(1).any(1)
    # The channels to go are of no use, so that only those that come could change anything.
    weak = old.nonzero().flatten()[: math.ceil(0.5 * int(old.sum()))]
    with torch.no_grad():
        second.weight[:, weak] = 0
        first.weight[weak] *= 1e-3
    x = torch.rand(2, 4, 5, 5)
    expected = model(x, path="adv")
    rewire(model)
    new, outputs = inner() & ~old, outputs & second.mask_adv.flatten(1).any(1)
    assert int(new.sum()) == len(weak) and not inner()[weak].any() and outputs.any()
    torch.testing.assert_close(model(x, path="adv")[:, outputs], expected[:, outputs])
    rows, others = (first.weight[each][first.mask_adv[each]] for each in (new, old & ~new & inner()))
    assert (rows != 0).all() and (second.weight[:, new] == 0).all()
    assert 0.1 < float((rows.square().mean() / others.square().mean()).detach()) < 10
    model(x, path="adv").square().sum().backward()
    assert (second.weight.grad[:, new].abs().sum((0, 2, 3)) > 0).any()


def test_training_is_repeatable_and_saves(tmp_path):
    config = TrainConfig(
        epochs=2, batch_size=16, lr=0.05, attack_steps=1, val_attack_steps=1, crop_padding=0, flip=False
    )
    runs = []
    for _ in range(2):
        model = make(density={"clean": 0.3, "adv": 0.25})
        train(model, make_data(32), config, progress=False)
        runs.append(state_of(model))
        assert_coupled(model)
    assert_same_state(*runs)
    model = create_model("tiny", in_channels=1, pattern="coupled", density=0.3)
    save_checkpoint(tmp_path / "m.safetensors", model)
    loaded, _ = load_checkpoint(tmp_path / "m.safetensors")
    assert loaded.pattern == "coupled"
    assert_same_state(loaded.state_dict(), model.state_dict())
    assert_coupled(copy.deepcopy(loaded))
