from __future__ import annotations

import pytest
import torch
from small import assert_same_state, make_net, state_of
from torch import nn

from smart.conversion import convert
from smart.layers import DualBatchNorm2d, SmartConv2d, smart_convs
from smart.models import build, create_model, list_models


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "plain", "dual"),
    [("resnet34", 21_282_122, 21_299_146), ("wrn_16_8", 10_961_370, 10_968_570), ("wrn_40_2", 2_243_546, 2_248_954)],
)
def test_published_parameter_counts(name, plain, dual):
    assert parameters(build(name)) == plain
    assert parameters(create_model(name)) == dual


def test_resnet18_parameter_count():
    assert parameters(build("resnet18")) == 11_173_962


@pytest.mark.parametrize("name", list_models())
def test_models_run_on_both_paths_and_leave_the_stem_dense(name):
    model = create_model(name, num_classes=7, in_channels=1).eval()
    with torch.no_grad():
        outputs = [model(torch.rand(2, 1, 16, 16), path=path) for path in ("clean", "adv")]
    assert all(out.shape == (2, 7) and out.isfinite().all() for out in outputs)
    dense = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and not isinstance(m, SmartConv2d)]
    assert dense == ["net.conv1"]
    assert not any(type(m) is nn.BatchNorm2d for n, m in model.named_modules() if ".norms." not in n)


@pytest.mark.parametrize("name", list_models())
def test_models_trace(name):
    net = build(name).eval()
    x = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), net(x))


def test_seed_decides_weights_and_masks_and_leaves_the_global_state():
    before = torch.get_rng_state()
    first, again, other = (create_model("tiny", seed=seed) for seed in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    assert_same_state(state_of(first), state_of(again))
    name = next(iter(smart_convs(first)))
    assert not torch.equal(smart_convs(first)[name].mask_clean, smart_convs(other)[name].mask_clean)
    assert not torch.equal(first.net.fc.weight, other.net.fc.weight)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "resnet50"}, "resnet34"),
        ({"density": 0}, r"\(0, 1\]"),
        ({"density": 1.5}, r"\(0, 1\]"),
        ({"density": {"clean": 0.2}}, "'adv'"),
        ({"pattern": "3-of-4"}, "unknown pattern"),
        ({"pattern": "2:4", "density": 0.6}, "pattern 2:4 keeps 2 of every 4"),
        ({"overlap": "some"}, "disjoint"),
        ({"dropout": 0.3}, "no dropout"),
        ({"num_classes": 0}, "num_classes"),
        ({"mean": [0.5]}, "3 image channels"),
        ({"mean": [0.5] * 3, "std": [0.0] * 3}, "above 0"),
    ],
)
def test_create_model_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        create_model(**{"name": "tiny", **options})


def test_full_density_conversion_computes_what_the_network_did(x):
    net = make_net()
    for _ in range(3):
        net(torch.randn(8, 1, 8, 8))
    net.eval()
    before = state_of(net)
    model = convert(net, density=1.0)
    for path in ("clean", "adv", 0.5, torch.tensor([0, 1, 0, 1, 1, 0])):
        torch.testing.assert_close(model(x, path=path), net(x))
    assert not model.training and all(not m.training for m in model.modules())
    assert_same_state(before, state_of(net))


def test_normalisation_is_inside(x):
    net = make_net().eval()
    model = convert(net, density=1.0, mean=[0.3], std=[0.2])
    torch.testing.assert_close(model(x), net((x - 0.3) / 0.2))


class Odd(nn.Module):
    """A shared convolution and norm, a grouped one, reflect padding, a string padding, half of it without norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding="same", dilation=2)
        self.shared = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.alias = self.shared
        self.norm = nn.BatchNorm2d(4, affine=False, momentum=None)
        self.branches = nn.ModuleList([self.norm, nn.Conv2d(4, 4, 1, groups=4, bias=False)])

    def forward(self, x):
        x = self.norm(self.shared(self.stem(x)))
        x = self.branches[0](self.alias(x))
        return self.branches[1](x).flatten(1)


def test_convert_keeps_shared_layers_and_odd_arguments():
    torch.manual_seed(0)
    net = Odd().eval().double()
    model = convert(net, density=1.0)
    x = torch.rand(2, 2, 9, 9, dtype=torch.double)
    torch.testing.assert_close(model(x, path="adv"), net(x))
    assert model.net.shared is model.net.alias and isinstance(model.net.shared, SmartConv2d)
    assert model.net.norm is model.net.branches[0] and isinstance(model.net.norm, DualBatchNorm2d)
    assert model.net.branches[1].groups == 4 and model.net.branches[1].weight.dtype == torch.double
    assert len(smart_convs(model)) == 3


def test_convert_of_a_net_without_norms_and_of_a_bare_convolution():
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), density=0.5)
    assert model(torch.rand(1, 3, 5, 5)).shape == (1, 2, 3, 3)
    assert isinstance(convert(nn.Conv2d(3, 4, 3), density=0.5).net, SmartConv2d)


def test_filter_leaves_layers_dense_and_sees_names():
    seen = []
    model = convert(make_net(), 0.5, filter_fn=lambda module, name: seen.append((type(module), name)) or name == "4")
    assert seen == [(nn.Conv2d, "0"), (nn.Conv2d, "4")]
    assert list(smart_convs(model)) == ["net.4"]


def test_weights_are_zero_outside_the_union():
    for layer in smart_convs(create_model("tiny")).values():
        assert (layer.weight[~layer.union()] == 0).all() and (layer.weight[layer.union()] != 0).all()


def test_convert_refuses():
    with pytest.raises(ValueError, match="has 0 nn"):
        convert(nn.Linear(3, 3), 0.5)
    with pytest.raises(ValueError, match="filter_fn accepts none"):
        convert(make_net(), 0.5, filter_fn=lambda module, name: False)
    with pytest.raises(ValueError, match="two paths already"):
        convert(convert(make_net(), 0.5), 0.5)
    with pytest.raises(TypeError, match="function"):
        convert(lambda x: x, 0.5)
