"""The dials between the paths: by weights, by stage, and the trade-off that they draw."""

from __future__ import annotations

import csv

import pytest
import torch
from small import make_data, make_model
from torch import nn

from smart.attacks import pgd
from smart.conversion import convert
from smart.costs import macs, macs_at, nonzeros
from smart.dial import Position, positions, trade_off
from smart.evaluate import evaluate
from smart.layers import DualBatchNorm2d, smart_convs
from smart.models import create_model
from smart_kernels import paths

STAGES = ["0", "4"]


@pytest.fixture
def staged():
    return make_model(stages=STAGES)


def test_each_stage_runs_on_its_own_path(staged, x):
    conv1, norm1, relu, _, conv2, norm2, *rest = staged.net
    assert [layer.stage for layer in (conv1, norm1, conv2, norm2)] == [0, 0, 1, 1] and staged.stages == 2
    for path in (("clean", "adv"), ("adv", "clean"), (0.25, "adv")):
        h = x
        for conv, norm, own in ((conv1, norm1, path[0]), (conv2, norm2, path[1])):
            with paths.running(own):
                h = relu(norm(conv(h)))
        torch.testing.assert_close(nn.Sequential(*rest)(h), staged(x, path=path))
        assert torch.equal(staged(x, path=path), staged(x, path=list(path)))
    assert torch.equal(staged(x, path=("adv", "adv")), staged(x, path="adv"))
    assert not torch.allclose(staged(x, path=("clean", "adv")), staged(x, path=("adv", "clean")))


def test_gradients_by_stage_reach_that_path_alone(staged, x):
    staged.train()
    staged(x, path=("adv", "clean")).sum().backward()
    norms = [module.norms for module in staged.modules() if isinstance(module, DualBatchNorm2d)]
    touched = [{name: norm.bias.grad is not None for name, norm in each.items()} for each in norms]
    assert touched == [{"clean": False, "adv": True}, {"clean": True, "adv": False}]


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        (("clean",), ValueError, "a sequence of 1.*it has 2 stages"),
        (("clean", "adv", "adv"), ValueError, "a sequence of 3"),
        (("clean", "robust"), ValueError, "unknown path 'robust'"),
        (("clean", 1.5), ValueError, "lambda is 1.5"),
        (("clean", None), TypeError, "one for each stage"),
    ],
)
def test_bad_paths_by_stage_are_refused(staged, x, path, error, words):
    with pytest.raises(error, match=words):
        staged(x, path=path)
    with pytest.raises(ValueError, match="it has no stages"):
        make_model()(x, path=("clean", "adv"))


def test_stages_of_the_networks_by_name():
    for name, count in (("tiny", 3), ("resnet18", 4), ("wrn_16_8", 3)):
        model = create_model(name)
        assert model.stages == count
        for layer_name, layer in smart_convs(model).items():
            assert layer.stage == int(layer_name.split(".")[2])
    norms = {n: m.stage for n, m in model.named_modules() if isinstance(m, DualBatchNorm2d)}
    assert norms["net.bn"] == 2 and norms["net.stages.1.0.bn1"] == 1


def test_positions(staged):
    found = positions(staged, lambdas=(1, 0, 0.5))
    assert found == [
        Position("weights", 0.0, "clean"),
        Position("weights", 0.5, 0.5),
        Position("weights", 1.0, "adv"),
        Position("first_stages", 0.0, "clean"),
        Position("first_stages", 0.5, ("adv", "clean")),
        Position("first_stages", 1.0, "adv"),
        Position("last_stages", 0.0, "clean"),
        Position("last_stages", 0.5, ("clean", "adv")),
        Position("last_stages", 1.0, "adv"),
    ]
    assert {place.dial for place in positions(make_model())} == {"weights"}
    with pytest.raises(ValueError, match="this network has no stages"):
        positions(make_model(), ["first_stages"])
    with pytest.raises(ValueError, match="weights, first_stages, last_stages"):
        positions(staged, ["stages"])
    with pytest.raises(ValueError, match="no position"):
        trade_off(staged, make_data(), dials=["weights"], lambdas=())


def test_costs_of_a_position(staged):
    cost, shape = macs(staged, (1, 8, 8)), (1, 8, 8)
    assert [macs_at(staged, shape, path) for path in ("clean", "adv", 0.5)] == [
        cost[key] for key in ("clean", "adv", "union")
    ]
    first, last = smart_convs(staged).values()
    mixed = macs_at(staged, shape, ("adv", "clean"))
    assert mixed == 64 * int(first.mask_adv.sum()) + 9 * int(last.mask_clean.sum()) + 18


def test_the_trade_off_is_what_evaluation_says_of_each_position(staged, tmp_path):
    data = make_data()
    table = trade_off(staged, data, ["clean", "pgd3"], lambdas=(0, 0.5, 1), eps=0.1, seed=3)
    direct = evaluate(staged, data, ["clean", "pgd3"], lambdas=[0.5], eps=0.1, seed=3)
    for row in table:
        if not isinstance(row["path"], tuple):
            assert {key: row[key] for key in ("clean", "pgd3")} == direct[str(row["path"])]
    counts = nonzeros(staged)
    assert [row["nonzeros"] for row in table[:3]] == [counts[key] for key in ("clean", "union", "adv")]
    assert len(table) == 9 and table.settings == direct.settings
    table.write_csv(tmp_path / "dial.csv")
    with (tmp_path / "dial.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows[3:6]] == ["clean", "adv,clean", "adv"] and rows[4]["seed"] == "3"


def test_positions_by_stage_are_attacked_themselves(staged, monkeypatch):
    import smart.named_attacks

    attacked = []

    def record(model, x, y, path, *args, **kwargs):
        attacked.append(torch.equal(model(x, path=path), staged(x, path=("adv", "clean"))))
        return pgd(model, x, y, path, *args, **kwargs)

    monkeypatch.setattr(smart.named_attacks, "pgd", record)
    monkeypatch.setattr("smart.dial.positions", lambda *args: [Position("first_stages", 0.5, ("adv", "clean"))])
    trade_off(staged, make_data(), ["pgd2"], eps=0.1)
    assert attacked == [True]


def test_labels_that_are_no_class_are_refused(staged):
    images, labels = make_data().test
    for bad in (labels + 1, labels - 1):
        with pytest.raises(ValueError, match="the model has 3 classes, give 0 to 2"):
            trade_off(staged, (images, bad))


def test_stages_can_be_named():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), nn.Conv2d(4, 2, 1))
    model = convert(net, 0.5, stages=["1", "2"], masked_layers="last_stages", dedicated_layers="2")
    assert {name: layer.stage for name, layer in smart_convs(model).items()} == {"net.0": 0, "net.1.0": 0, "net.2": 1}
    assert [layer.shares_mask for layer in smart_convs(model).values()] == [True, True, False]
