from __future__ import annotations

import importlib.util
import random
import sys

import pytest
import torch
from small import assert_same_state, make_model, state_of
from torch import nn

from smart.auto_attack import auto_attack, missing
from smart.conversion import convert
from smart.evaluate import evaluate

needs_package = pytest.mark.skipif(missing() is not None, reason=str(missing()))
EPS = 0.25


@pytest.fixture(scope="module")
def attacked():
    """A network of five classes, and images that each path labels as it is said."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    model = convert(net, 0.5, seed=0).eval()
    x = torch.rand(8, 1, 6, 6)
    return model, x, {path: model(x, path=path).argmax(1) for path in ("clean", "adv")}


@needs_package
@pytest.mark.parametrize("path", ["adv", 0.5])
def test_it_fools_more_than_pgd_within_the_radius(attacked, path):
    model, x, _ = attacked
    y = model(x, path=path).argmax(1)
    before, state, python = torch.random.get_rng_state(), state_of(model.train()), random.getstate()
    adv = auto_attack(model, x, y, path, EPS, "apgd-t", seed=1)
    assert model.training and torch.equal(before, torch.random.get_rng_state()) and python == random.getstate()
    assert_same_state(state, state_of(model))
    model.eval()
    assert adv.shape == x.shape and not adv.requires_grad and adv.min() >= 0 and adv.max() <= 1
    assert (adv - x).abs().max() <= EPS + 1e-6
    fooled = model(adv, path=path).argmax(1) != y
    assert fooled.any()
    # What withstood is left as it was.
    assert torch.equal(adv[~fooled], x[~fooled])
    assert torch.equal(adv, auto_attack(model, x, y, path, EPS, "apgd-t", seed=1))
    weak = evaluate(model, (x, y), ["fgsm"], [path] if path == "adv" else [], [0.5] if path != "adv" else [], EPS)
    assert float((~fooled).double().mean()) <= weak[str(path)]["fgsm"]


@needs_package
def test_the_standard_version_through_evaluate(attacked):
    model, x, labels = attacked
    tracing = sys.gettrace()
    table = evaluate(model, (x[:3], labels["adv"][:3]), ["clean", "pgd5", "autoattack"], ["adv"], eps=EPS)
    assert table["adv"]["clean"] == 1 and table["adv"]["autoattack"] <= table["adv"]["pgd5"]
    assert table.worst["adv"] == min(table["adv"].values())
    assert sys.gettrace() is tracing


@needs_package
def test_each_path_is_attacked_as_deployed(attacked):
    """The images that fool one path are of that path: the radius given is the radius used, not the package's 0.3."""
    model, x, labels = attacked
    adv = {path: auto_attack(model, x, labels[path], path, EPS, "apgd-ce") for path in labels}
    assert not torch.equal(adv["clean"], adv["adv"])
    assert torch.equal(auto_attack(model, x, labels["clean"], "clean", 0.0, "apgd-ce"), x)


@needs_package
def test_refusals(attacked, x, y):
    model, images, labels = attacked
    three = make_model()
    with pytest.raises(ValueError, match="'autoattack' needs 4 classes, this network has 3: take PGD"):
        auto_attack(three, x, y)
    with pytest.raises(ValueError, match=r"unknown version 'rand' of AutoAttack: accepted are autoattack, apgd-ce"):
        auto_attack(model, images, labels["adv"], version="rand")
    with pytest.raises(ValueError, match="one path or lambda at a time"):
        auto_attack(model, images, labels["adv"], torch.zeros(8, dtype=torch.long))
    with pytest.raises(ValueError, match="8/255"):
        auto_attack(model, images, labels["adv"], eps=8)


def test_without_the_package_it_says_what_to_install(attacked, monkeypatch):
    model, x, labels = attacked
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install pyautoattack"):
        auto_attack(model, x, labels["adv"])
    with pytest.raises(ImportError, match="pip install pyautoattack"):
        evaluate(model, (x, labels["adv"]), ["clean", "autoattack"])
