from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import assert_same_state, make_data, make_model, make_trained, state_of
from torch import nn

import smart_kernels
from smart.attacks import pgd
from smart.black_box import _side, _with_square, square

MODEL = make_model()
SIGNS = torch.where(torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.5, -1.0, 1.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Linear:
    """Two classes by the sign of a weighted sum; a function, not a module. Remembers what it was asked."""

    def __init__(self, bias=0.0):
        self.bias, self.asked, self.margins = bias, [], []

    def margin(self, x):
        """Logit of class 0 less that of class 1."""
        return (x * SIGNS).sum((1, 2, 3)) + self.bias

    def label(self, x):
        return (self.margin(x) < 0).long()

    def __call__(self, x, path):
        assert not torch.is_grad_enabled()
        margin = self.margin(x)
        self.asked.append(x)
        self.margins.append(margin)
        return torch.stack([margin / 2, -margin / 2], 1)


@settings(max_examples=25)
@given(
    eps=st.floats(0, 0.5),
    queries=st.integers(1, 12),
    path=st.sampled_from(["clean", "adv", 0.5]),
    height=st.integers(4, 9),
    seed=st.integers(0, 100),
)
def test_stays_in_the_ball_and_the_image_range(eps, queries, path, height, seed):
    generator = seeded(seed)
    x = torch.rand(3, 1, height, 8, generator=generator)
    x[0].round_()
    adv = square(MODEL, x, torch.tensor([0, 1, 2]), path, eps, queries, generator)
    assert adv.shape == x.shape and not adv.requires_grad
    assert adv.min() >= 0 and adv.max() <= 1
    assert (adv - x).abs().max() <= eps + 1e-6


def test_fools_a_linear_network(x):
    model = Linear()
    y = model.label(x)
    adv = square(model, x, y, eps=0.3, queries=300, generator=seeded())
    assert (model.label(adv) != y).all()


def test_keeps_what_lowers_the_margin(x):
    model = Linear(bias=100.0)
    adv = square(model, x[:1], torch.tensor([0]), eps=0.1, queries=60, generator=seeded())
    stripes, *later = model.margins[1:]
    assert len(later) == 59 and min(later) < stripes
    assert model.margin(adv) == min(stripes, *later)


def test_asks_no_more_about_images_that_fool(x):
    model = Linear()
    y = model.label(x)
    y[::2] = 1 - y[::2]
    adv = square(model, x, y, eps=0.3, queries=300, generator=seeded())
    counts = [len(asked) for asked in model.asked]
    assert torch.equal(adv[::2], x[::2]) and not torch.equal(adv[1::2], x[1::2])
    assert counts[0] == 6 and counts[1] == 3
    assert counts == sorted(counts, reverse=True) and len(counts) < 301


def test_a_tie_that_fools_is_kept_and_ends_the_search():
    def model(images, path):
        # The true class is 1: at zero the classes tie, and the first of them is chosen.
        asked.append(images)
        return torch.stack([torch.zeros(1), torch.tensor([1.0 if len(asked) < 4 else 0.0])], 1)

    asked = []
    x = torch.full((1, 1, 4, 4), 0.5)
    adv = square(model, x, torch.tensor([1]), eps=0.1, queries=20, generator=seeded())
    assert len(asked) == 4 and torch.equal(adv, asked[-1])


def test_generator_decides_everything(x, y):
    def attack(seed):
        return square(MODEL, x, y, "adv", 0.05, 20, seeded(seed))

    assert torch.equal(attack(0), attack(0)) and not torch.equal(attack(0), attack(1))
    state = torch.get_rng_state()
    attack(0)
    assert torch.equal(state, torch.get_rng_state())


def test_an_image_fares_the_same_beside_others(x):
    y = Linear().label(x)
    alone = y.clone()
    alone[1:] = 1 - alone[1:]
    together, first = (square(Linear(), x, labels, eps=0.05, queries=30, generator=seeded()) for labels in (y, alone))
    assert torch.equal(together[0], first[0]) and torch.equal(first[1:], x[1:])


def test_attack_is_on_the_path_given(x):
    choice = torch.tensor([0, 1, 1, 0, 0, 1])
    with torch.no_grad():
        y = MODEL(x, path=choice).argmax(1)
    mixed, clean, adv = (square(MODEL, x, y, path, 0.2, 40, seeded()) for path in (choice, "clean", "adv"))
    assert torch.allclose(mixed, torch.where(choice.bool()[:, None, None, None], adv, clean))
    assert not torch.allclose(clean, adv)


def test_starts_from_stripes():
    x = torch.full((2, 3, 6, 5), 0.5)
    adv = square(
        lambda images, path: torch.tensor([[1.0, 0.0]]).repeat(len(images), 1), x, torch.zeros(2).long(), "", 0.1, 1
    )
    delta = adv - x
    assert torch.allclose(delta.abs(), torch.tensor(0.1))
    assert torch.equal(delta, delta[:, :, :1].expand_as(delta))
    assert len(delta[:, :, 0].unique()) == 2


@pytest.mark.parametrize("side", [1, 2, 5])
def test_a_square_is_one_square_and_changes_something(side):
    x = torch.rand(200, 2, 6, 5, generator=seeded())
    x[:100].round_()
    best = (x + 0.1).clamp(0, 1)
    tried = _with_square(best, x, 0.1, side, seeded(1))
    changed = tried != best
    assert changed.flatten(1).any(1).all()
    assert torch.equal(tried[changed], (x - 0.1).clamp(0, 1)[changed])
    corners = set()
    for image in changed.any(1):
        rows, columns = (image.any(axis).nonzero().flatten() for axis in (1, 0))
        assert rows[-1] - rows[0] < side and columns[-1] - columns[0] < side
        corners.add((int(rows[0]), int(columns[0])))
    # Every place is tried, the last row and column too.
    assert len(corners) == (6 - side + 1) * (5 - side + 1)


def test_sides_follow_the_published_schedule():
    shape = torch.Size((1, 3, 32, 32))
    sides = {step: _side(step, 10_000, shape) for step in (0, 10, 11, 50, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)}
    # round(sqrt(0.8 / 2**k * 1024))
    assert list(sides.values()) == [29, 29, 20, 20, 14, 10, 7, 5, 4, 3, 2, 1]
    assert [_side(step, 100, shape) for step in (0, 1, 20, 99)] == [
        _side(step, 10_000, shape) for step in (0, 100, 2000, 9900)
    ]
    assert _side(0, 100, torch.Size((1, 1, 2, 9))) == 2 and _side(99, 100, torch.Size((1, 1, 1, 1))) == 1


def test_leaves_no_trace(model, x, y):
    model.train()
    model.net[1].eval()
    before, flags, x_before = state_of(model), [m.training for m in model.modules()], x.clone()
    outside = square(model, x, y, "adv", 0.1, 10, seeded())
    with torch.inference_mode():
        assert torch.equal(outside, square(model, x.clone(), y.clone(), "adv", 0.1, 10, seeded()))
    assert not outside.is_inference()
    assert torch.equal(outside, square(model.eval(), x, y, "adv", 0.1, 10, seeded()))
    model.train()
    model.net[1].eval()
    assert_same_state(before, state_of(model))
    assert flags == [m.training for m in model.modules()] and torch.equal(x, x_before)
    assert all(p.grad is None for p in model.parameters())


def test_attacks_a_swapped_network_as_its_original(x, y):
    sparse = smart_kernels.swap(MODEL, x, measure=False)
    for path in ("clean", "adv"):
        of_sparse, of_dense = (square(net, x, y, path, 0.1, 30, seeded()) for net in (sparse, MODEL))
        assert torch.equal(of_sparse, of_dense)


def test_is_weaker_than_pgd_and_stronger_than_noise():
    model, (x, y) = make_trained(), make_data(90).train
    noisy = (x + 0.25 * (2 * torch.rand(x.shape, generator=seeded()) - 1)).clamp(0, 1)
    searched = square(model, x, y, "clean", 0.25, 50, seeded())
    white = pgd(model, x, y, "clean", 0.25, 0.06, 20, generator=seeded())
    right = [int((model(images, path="clean").argmax(1) == y).sum()) for images in (white, searched, noisy)]
    assert right[0] < right[1] < right[2]


def test_zero_radius_changes_nothing(x, y):
    assert torch.equal(square(MODEL, x, y, eps=0, queries=5), x)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eps": 8}, "8/255"),
        ({"eps": float("nan")}, "eps"),
        ({"queries": 0}, "queries is 0"),
        ({"queries": 2.5}, "queries is 2.5"),
        ({"y": torch.tensor([0, 1])}, "one integer label"),
        ({"x": torch.full((6, 1, 8, 8), 1.5)}, r"\[0, 1\]"),
        ({"x": torch.zeros(6, 64)}, r"\(N, C, H, W\)"),
    ],
)
def test_bad_settings_are_refused(x, y, options, words):
    with pytest.raises(ValueError, match=words):
        square(**{"model": nn.Identity(), "x": x, "y": y, **options})
