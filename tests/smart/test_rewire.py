from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import make_model
from torch import nn

from smart.conversion import convert
from smart.layers import smart_convs
from smart.objectives import smart_loss
from smart.rewire import Rewirer
from smart.rewire.moves import _first


def conv_stack(widths: list[int]) -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in zip([1, *widths], widths, strict=False)))


def ones(model: nn.Module, path: str) -> int:
    return sum(int(layer.masks[path].sum()) for layer in smart_convs(model).values())


@settings(max_examples=60)
@given(
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    clean=st.floats(0.02, 1.0),
    adv=st.floats(0.02, 1.0),
    rate=st.floats(0.0, 0.99),
    zero_momentum=st.booleans(),
    full_layer=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_density_is_conserved_exactly(widths, clean, adv, rate, zero_momentum, full_layer, seed):
    torch.manual_seed(seed)
    model = convert(conv_stack(widths), {"clean": clean, "adv": adv}, seed=seed)
    layers = smart_convs(model)
    if full_layer:
        first = next(iter(layers.values()))
        first.set_mask("clean", torch.ones_like(first.mask_clean))
    rewirer = Rewirer(model, prune_rate=rate)
    counts = {path: ones(model, path) for path in ("clean", "adv")}
    for progress in (0.0, 0.2, 0.5, 0.9, 1.0):
        if not zero_momentum:
            for layer in layers.values():
                for sink in layer.gradient_sinks.values():
                    sink.copy_(torch.randn_like(sink))
        rewirer.after_step()
        rewirer.rewire(progress)
        assert {path: ones(model, path) for path in counts} == counts
        for layer in layers.values():
            assert all(mask.any() for mask in layer.masks.values())
            assert (layer.weight[~layer.union()] == 0).all()


def rewirer_with_momentum(model, **options) -> tuple[Rewirer, dict[str, dict[str, torch.Tensor]]]:
    rewirer = Rewirer(model, **options)
    for layer in smart_convs(model).values():
        for sink in layer.gradient_sinks.values():
            sink.copy_(torch.randn_like(sink))
    rewirer.after_step()
    return rewirer, rewirer._momentum


def test_prunes_the_smallest_and_regrows_the_largest_momentum():
    torch.manual_seed(0)
    model = convert(nn.Conv2d(4, 8, 3), {"clean": 0.3, "adv": 1.0})
    layer = smart_convs(model)["net"]
    old, weight = layer.mask_clean.clone(), layer.weight.detach().clone()
    rewirer, momentum = rewirer_with_momentum(model)
    momentum = momentum["net"]["clean"].abs()
    assert rewirer.rewire(0.0) == {"clean": math.ceil(0.5 * int(old.sum())), "adv": 0}
    new = layer.mask_clean
    removed, kept, grown, passed = old & ~new, old & new, new & ~old, ~old & ~new
    assert int(removed.sum()) == math.ceil(0.5 * int(old.sum()))
    assert weight[removed].abs().max() <= weight[kept].abs().min()
    assert momentum[grown].min() >= momentum[passed].max()
    # The other path holds every weight, so none loses its value.
    assert torch.equal(layer.weight, weight)


def test_a_regrown_weight_starts_at_zero_unless_the_other_path_has_it():
    torch.manual_seed(0)
    model = convert(nn.Conv2d(4, 8, 3), {"clean": 0.3, "adv": 0.3})
    layer = smart_convs(model)["net"]
    old = {path: mask.clone() for path, mask in layer.masks.items()}
    weight = layer.weight.detach().clone()
    rewirer_with_momentum(model)[0].rewire(0.0)
    for path, other in (("clean", "adv"), ("adv", "clean")):
        grown = layer.masks[path] & ~old[path]
        shared = grown & old[other] & layer.masks[other]
        assert shared.any() and torch.equal(layer.weight[shared], weight[shared])
        alone = grown & ~old[other]
        assert alone.any() and (layer.weight[alone] == 0).all()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
def test_ties_are_broken_by_place(scores, data):
    """As by a stable sort of all, whichever few are asked for."""
    among = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    places = sorted((score, i) for i, (score, counts) in enumerate(zip(scores, among, strict=True)) if counts)
    count = data.draw(st.integers(0, len(places)))
    found = _first(torch.tensor(scores, dtype=torch.float32), torch.tensor(among), count)
    assert found.tolist() == [i for _, i in places[:count]]


def test_layers_with_more_momentum_gain_weights():
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)), density=0.2)
    rewirer, momentum = rewirer_with_momentum(model)
    momentum["net.1"]["clean"].mul_(10)
    before = {name: int(layer.mask_clean.sum()) for name, layer in smart_convs(model).items()}
    rewirer.rewire(0.0)
    after = {name: int(layer.mask_clean.sum()) for name, layer in smart_convs(model).items()}
    assert after["net.1"] > before["net.1"] and after["net.0"] < before["net.0"]


def test_full_network_keeps_masks_and_values():
    model = convert(conv_stack([3, 3]), density=1.0)
    weights = {name: layer.weight.detach().clone() for name, layer in smart_convs(model).items()}
    assert rewirer_with_momentum(model)[0].rewire(0.0) == {"clean": 0, "adv": 0}
    for name, layer in smart_convs(model).items():
        assert layer.union().all() and torch.equal(layer.weight, weights[name])


def test_without_room_the_largest_pruned_weights_come_back():
    torch.manual_seed(0)
    model = convert(nn.Conv2d(4, 8, 3), density=0.9, overlap="shared")
    layer = smart_convs(model)["net"]
    old, weight = layer.mask_clean.clone(), layer.weight.detach().clone()
    room = int((~old).sum())
    assert rewirer_with_momentum(model)[0].rewire(0.0)["clean"] == room
    removed, kept = old & ~layer.mask_clean, old & layer.mask_clean
    assert int(removed.sum()) == room and weight[removed].abs().max() <= weight[kept].abs().min()
    assert torch.equal(layer.weight[kept], weight[kept])


def test_optimizer_forgets_dead_weights_and_only_convolutions_are_touched(x, y):
    model = make_model(density=0.3).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rewirer = Rewirer(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        smart_loss(model, x, y, x, y).loss.backward()
        optimizer.step()
        rewirer.after_step()
    others = {n: p.detach().clone() for n, p in model.named_parameters() if n not in ("net.0.weight", "net.4.weight")}
    rewirer.rewire(0.0)
    for layer in smart_convs(model).values():
        buffer = optimizer.state[layer.weight]["momentum_buffer"]
        assert (buffer[~layer.union()] == 0).all() and (buffer != 0).any()
    for name, parameter in model.named_parameters():
        assert name not in others or torch.equal(parameter, others[name])


def test_momentum_follows_the_effective_gradients(x, y):
    model = make_model().train()
    rewirer = Rewirer(model, momentum=0.5)
    layer = smart_convs(model)["net.4"]
    expected = torch.zeros_like(layer.weight)
    for _ in range(3):
        smart_loss(model, x, y, x, y).loss.backward()
        expected = 0.5 * expected + layer.gradient_sinks["adv"]
        rewirer.after_step()
        assert not layer.gradient_sinks["adv"].any()
    torch.testing.assert_close(rewirer.state_dict()["net.4.adv"], expected)
    assert (expected[~layer.mask_adv] != 0).any()


def test_static_masks_cost_nothing_and_stay():
    model = make_model()
    rewirer = Rewirer(model, method="static")
    before = {name: layer.mask_clean.clone() for name, layer in smart_convs(model).items()}
    rewirer.after_step()
    assert rewirer.rewire(0.0) == {"clean": 0, "adv": 0} and not rewirer.state_dict()
    for name, layer in smart_convs(model).items():
        assert not layer.gradient_sinks and torch.equal(layer.mask_clean, before[name])


def test_state_round_trip_and_refusals():
    model = make_model()
    rewirer, momentum = rewirer_with_momentum(model)
    other = Rewirer(make_model())
    other.load_state_dict(rewirer.state_dict())
    assert torch.equal(other.state_dict()["net.0.adv"], momentum["net.0"]["adv"])
    with pytest.raises(ValueError, match="does not fit"):
        other.load_state_dict({})
    for options in ({"prune_rate": 1.0}, {"momentum": 1.0}, {"schedule": "step"}, {"until": 0.0}, {"method": "set"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Rewirer(model, **options)
    with pytest.raises(ValueError, match="no masked convolutions"):
        Rewirer(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="progress"):
        rewirer.rewire(1.2)


def test_gradients_that_are_not_finite_are_refused():
    rewirer, momentum = rewirer_with_momentum(make_model())
    momentum["net.0"]["clean"].fill_(math.nan)
    with pytest.raises(RuntimeError, match="learning rate"):
        rewirer.rewire(0.0)


@pytest.mark.parametrize(
    ("schedule", "rates"), [("linear", [0.4, 0.3, 0]), ("cosine", [0.4, 0.341421, 0]), ("constant", [0.4, 0.4, 0.4])]
)
@pytest.mark.parametrize("until", [1.0, 0.5])
def test_prune_rate_falls_to_zero(schedule, rates, until):
    rewirer = Rewirer(make_model(), prune_rate=0.4, schedule=schedule, until=until)
    assert [rewirer.rate(p * until) for p in (0.0, 0.25, 1.0)] == pytest.approx(rates, abs=1e-6)
    assert until == 1 or rewirer.rate(0.51) == 0
