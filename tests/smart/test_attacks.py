from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small import assert_same_state, make_model, state_of

from smart.attacks import fgsm, pgd
from smart.layers import smart_convs
from smart.rewire import Rewirer

MODEL = make_model()


@settings(max_examples=25)
@given(
    eps=st.floats(0, 0.5),
    step=st.floats(0.001, 0.5),
    steps=st.integers(1, 4),
    restarts=st.integers(1, 3),
    random_start=st.booleans(),
    path=st.sampled_from(["clean", "adv", 0.5]),
    seed=st.integers(0, 100),
)
def test_stays_in_the_ball_and_the_image_range(eps, step, steps, restarts, random_start, path, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 1, 8, 8, generator=generator)
    x[0].round_()
    adv = pgd(MODEL, x, torch.tensor([0, 1, 2]), path, eps, step, steps, restarts, random_start, generator)
    assert adv.shape == x.shape and not adv.requires_grad
    assert adv.min() >= 0 and adv.max() <= 1
    assert (adv - x).abs().max() <= eps + 1e-6


def losses(model, x, y, path):
    with torch.no_grad():
        return F.cross_entropy(model(x, path=path), y, reduction="none")


@pytest.mark.parametrize("path", ["clean", "adv", 0.5, torch.tensor([0, 1, 1, 0, 0, 1])])
def test_raises_the_loss_of_the_path_it_attacks(model, x, y, path):
    generator = torch.Generator().manual_seed(0)
    before = losses(model, x, y, path).mean()
    single = losses(model, fgsm(model, x, y, path, eps=0.1), y, path).mean()
    many = losses(model, pgd(model, x, y, path, 0.1, 0.02, 20, generator=generator), y, path).mean()
    assert before < single and before < many


def test_attack_is_on_the_path_given(model, x, y):
    on_clean, on_adv = (pgd(model, x, y, path, 0.1, 0.02, 10, random_start=False) for path in ("clean", "adv"))
    assert losses(model, on_clean, y, "clean").mean() > losses(model, on_adv, y, "clean").mean()
    assert losses(model, on_adv, y, "adv").mean() > losses(model, on_clean, y, "adv").mean()


def test_leaves_no_trace(model, x, y):
    model.train()
    model.net[1].eval()
    rewirer = Rewirer(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before, flags, x_before = state_of(model), [m.training for m in model.modules()], x.clone()
    with torch.no_grad():
        pgd(model, x, y, "adv", steps=3, restarts=2)
    fgsm(model, x, y, 0.3)
    assert_same_state(before, state_of(model))
    assert flags == [m.training for m in model.modules()] and torch.equal(x, x_before)
    assert all(bool((p.grad == 7).all()) for p in model.parameters())
    assert not any(sink.any() for layer in smart_convs(model).values() for sink in layer.gradient_sinks.values())
    rewirer.close()


def test_works_inside_no_grad_and_inference_mode(model, x, y):
    outside = pgd(model, x, y, "adv", steps=3, random_start=False)
    with torch.no_grad():
        assert torch.equal(outside, pgd(model, x, y, "adv", steps=3, random_start=False))
    with torch.inference_mode():
        assert torch.equal(outside, pgd(model, x.clone(), y.clone(), "adv", steps=3, random_start=False))
    assert torch.equal(outside, pgd(model.train(), x, y, "adv", steps=3, random_start=False))


def test_generator_decides_the_random_start(model, x, y):
    def attack(seed):
        return pgd(model, x, y, "adv", 0.1, 0.01, 2, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(attack(0), attack(0)) and not torch.equal(attack(0), attack(1))


def test_restarts_keep_the_best_of_each_sample(model, x, y):
    def attack(restarts):
        return pgd(model, x, y, "adv", 0.2, 0.2, 1, restarts, generator=torch.Generator().manual_seed(0))

    previous_fooled, previous_loss = None, None
    for restarts in (1, 2, 4, 8):
        adv = attack(restarts)
        loss = losses(model, adv, y, "adv")
        fooled = model(adv, path="adv").argmax(1) != y
        if previous_loss is not None:
            assert (fooled >= previous_fooled).all()
            assert (loss >= previous_loss - 1e-6)[fooled == previous_fooled].all()
        previous_fooled, previous_loss = fooled, loss
    assert loss.mean() > losses(model, attack(1), y, "adv").mean()


def test_restarts_rank_fooling_above_loss(model, x, y, monkeypatch):
    runs = []
    outcomes = iter([(True, 1.0), (False, 5.0), (True, 2.0), (True, 1.5)])

    def outcome(model, adv, y, path, measure, before):
        runs.append(adv)
        fooled, loss = next(outcomes)
        return torch.full((len(y),), fooled), torch.full((len(y),), loss)

    monkeypatch.setattr("smart.attacks._outcome", outcome)
    best = pgd(model, x, y, "adv", 0.1, 0.01, 1, restarts=4, generator=torch.Generator().manual_seed(0))
    assert [torch.equal(best, run) for run in runs] == [False, False, True, False]


def test_zero_radius_changes_nothing(model, x, y):
    assert torch.equal(pgd(model, x, y, eps=0), x) and torch.equal(fgsm(model, x, y, eps=0), x)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eps": 8}, "8/255"),
        ({"eps": -0.1}, "eps"),
        ({"eps": float("nan")}, "eps"),
        ({"step": 0}, "step"),
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"restarts": 0}, "restarts"),
        ({"y": torch.tensor([0, 1])}, "one integer label"),
        ({"y": torch.zeros(6)}, "one integer label"),
        ({"x": torch.full((6, 1, 8, 8), 1.5)}, r"\[0, 1\]"),
        ({"x": torch.full((6, 1, 8, 8), float("nan"))}, "NaN"),
    ],
)
def test_bad_settings_are_refused(model, x, y, options, words):
    with pytest.raises(ValueError, match=words):
        pgd(**{"model": model, "x": x, "y": y, **options})
