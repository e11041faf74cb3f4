from __future__ import annotations

import pytest
import torch
from small import make_data, make_model, make_trained
from torch import nn

from smart.attack_losses import LOSSES, attack_loss
from smart.attacks import pgd

LOGITS = torch.tensor([[2.0, 1.0, -1.0], [0.0, 3.0, 1.0]])
Y = torch.tensor([0, 0])


def test_values_by_hand():
    before = torch.tensor([[0.0, 0.0, 0.0], [0.0, 3.0, 1.0]])
    assert LOSSES["cw"](LOGITS, Y, before).tolist() == [-1.0, 3.0]
    assert LOSSES["dlr"](LOGITS, Y, before).tolist() == pytest.approx([-1 / 3, 1.0])
    expected = -LOGITS.log_softmax(1)[:, 0]
    assert torch.allclose(LOSSES["ce"](LOGITS, Y, before), expected)
    # From uniform probabilities: mean of -log q, less log 3; and nothing where nothing has changed.
    kl = LOSSES["kl"](LOGITS, Y, before)
    assert kl[0] == pytest.approx(float(-LOGITS.log_softmax(1)[0].mean() - torch.tensor(3.0).log()))
    assert kl[1] == pytest.approx(0, abs=1e-6)


def test_margin_is_above_0_just_where_the_model_is_fooled():
    logits = torch.randn(500, 7, generator=torch.Generator().manual_seed(0))
    y = torch.arange(500) % 7
    for name in ("cw", "dlr"):
        assert torch.equal(LOSSES[name](logits, y, logits) > 0, logits.argmax(1) != y)


def test_dlr_does_not_see_the_scale_of_the_logits():
    one, other = (LOSSES["dlr"](LOGITS * scale, Y, LOGITS) for scale in (1, 1e4))
    assert torch.allclose(one, other)


def test_what_each_attack_raises_is_its_loss(x, y):
    model = make_model()
    with torch.no_grad():
        before = model(x, path="adv")
    found = {}
    for loss in LOSSES:
        generator = torch.Generator().manual_seed(0)
        adv = pgd(model, x, y, "adv", 0.2, 0.02, 30, restarts=2, generator=generator, loss=loss)
        with torch.no_grad():
            found[loss] = model(adv, path="adv")
    for loss, measure in LOSSES.items():
        reached = {name: float(measure(logits, y, before).mean()) for name, logits in found.items()}
        assert reached[loss] >= max(reached.values()) - 0.02 * abs(max(reached.values())), (loss, reached)
        assert reached[loss] > float(measure(before, y, before).mean())


class Saturated(nn.Module):
    """A network whose logits are so large that float32 gives the cross-entropy no gradient: masked gradients."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, path):
        return 1e4 * self.model(x, path=path)


def test_margins_see_through_saturated_logits():
    """Why one loss is not enough: the cross-entropy's gradient is exactly zero here, the others' is not."""
    model = Saturated(make_trained())
    x, y = make_data(60).train
    fooled = {}
    for loss in ("ce", "cw", "dlr"):
        generator = torch.Generator().manual_seed(0)
        adv = pgd(model, x, y, "adv", 0.25, 0.05, 10, generator=generator, loss=loss)
        with torch.no_grad():
            fooled[loss] = int((model(adv, path="adv").argmax(1) != y).sum())
    assert min(fooled["cw"], fooled["dlr"]) > fooled["ce"] + 10


def test_refusals(model, x, y):
    with pytest.raises(ValueError, match="unknown loss 'mse' of an attack: accepted are ce, cw, dlr, kl"):
        attack_loss("mse")
    with pytest.raises(ValueError, match="unknown loss"):
        pgd(model, x, y, loss="hinge")
    with pytest.raises(ValueError, match="'dlr' needs three classes, this network has 2"):
        LOSSES["dlr"](torch.zeros(1, 2), torch.tensor([0]), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="no gradient at the image itself"):
        pgd(model, x, y, random_start=False, loss="kl")
