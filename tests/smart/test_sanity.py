"""The checks pass on an honest network, and each way to mask gradients fails those that are made for it."""

from __future__ import annotations

import json

import pytest
import torch
from small import assert_same_state, make_data, make_trained, state_of
from torch import nn

from smart.sanity import Check, SanityReport, sanity_checks

EPS = 0.15
QUICK = {"eps": EPS, "steps": 10, "queries": 200, "seed": 1}


@pytest.fixture(scope="module")
def trained():
    return make_trained()


@pytest.fixture(scope="module")
def images():
    return make_data(60).train


@pytest.fixture(scope="module")
def honest(trained, images):
    return sanity_checks(trained, images, lambdas=[0.5], **QUICK)


class Behind(nn.Module):
    """A network behind something that hides its gradients."""

    def __init__(self, model, before=lambda x: x, after=lambda x: x):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x, path):
        return self.after(self.model(self.before(x), path=path))


def names(report):
    return {check.name for check in report.failed()}


def test_an_honest_network_passes(honest):
    assert not honest.failed(), honest.table()
    assert {check.path for check in honest.checks} == {"clean", "adv", "0.5"}
    assert len(honest.checks) == 3 * 8
    assert all(check.numbers for check in honest.checks)


def test_the_model_is_left_as_it_was(trained, images):
    before = state_of(trained.train())
    sanity_checks(trained, tuple(part[:6] for part in images), paths=["adv"], **QUICK)
    assert trained.training
    assert_same_state(before, state_of(trained.eval()))


def test_thresholds_of_the_input_hide_gradients(trained, images):
    """Rounding has the gradient zero: attacks by gradients find nothing, those without do."""
    report = sanity_checks(Behind(trained, before=lambda x: (4 * x).round() / 4), images, **{**QUICK, "eps": 0.25})
    assert {"an attack without bounds leaves nothing", "a black box is not stronger"} <= names(report)


def test_saturated_logits_hide_gradients(trained, images):
    report = sanity_checks(Behind(trained, after=lambda x: 1e4 * x), images, **{**QUICK, "eps": 0.25})
    assert {"another loss helps little", "loss grows with the radius"} <= names(report)


def test_a_network_that_ignores_its_images_has_no_loss_to_raise(images):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]))

        def forward(self, x, path):
            return self.logits + 0 * x.sum((1, 2, 3))[:, None]

    assert "loss grows with the radius" in names(sanity_checks(Constant(), images, paths=["adv"], **QUICK))


def test_report(honest):
    table = honest.table().splitlines()
    assert len(table) == 25 and all("pass" in line for line in table[1:])
    content = json.loads(json.dumps(honest.as_dict()))
    assert content["passed"] is True and content["n_examples"] == 60 and content["eps"] == EPS
    failed = SanityReport([Check("loss grows with the radius", "adv", False, {"at 0": 1.5})], {})
    assert "FAIL" in failed.table() and "at 0 1.5" in failed.table() and failed.as_dict()["passed"] is False


@pytest.mark.parametrize("eps", [0, 8, -1])
def test_refusals(trained, images, eps):
    with pytest.raises(ValueError, match="8/255"):
        sanity_checks(trained, images, eps)
