"""Networks whose weights are computed before each call: they swap with the weights of now, and stay what they were."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from smart_kernels import swap, verify


class KeepLarge(nn.Module):
    def forward(self, weight):
        return weight * (weight.abs() > 0.05)


def prune_twice(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.random_structured(layer, "weight", amount=0.25, dim=0)
    prune.l1_unstructured(layer, "bias", 0.5)


WAYS = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.8),
    "prune twice, bias too": prune_twice,
    "parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", KeepLarge()),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "weight norm by hooks": weight_norm,
    "spectral norm by hooks": spectral_norm,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("training", [False, True])
def test_computed_weights_become_plain_ones(way, training):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(100, 5)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in (0, 3, 5):
            WAYS[way](model[i])
    x = torch.rand(2, 3, 9, 9)
    model(x)  # in training mode, so that everything has moved
    model.train(training)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]

    sparse = swap(model, x)
    assert sparse.uncaptured is None
    assert max(verify(model, sparse, x).values()) < 1e-5
    density = {row["name"]: row["density"]["clean"] for row in sparse.report()}
    if "prune" in way or way == "parametrization":
        assert set(density) == {"0", "3", "5"}
        assert max(density.values()) < 1

    assert [type(module) for module in model.modules()] == kinds
    assert model.training == training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.train()
    model(x).sum().backward()  # what computes the weights still runs, gradients and all
