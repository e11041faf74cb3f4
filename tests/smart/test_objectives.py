from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small import make_model
from torch import Tensor, nn

from smart.attacks import pgd
from smart.lambdas import Lambdas
from smart.objectives import adversarial_loss, dial_loss, oat_loss, smart_loss, standard_loss, trades_loss


def test_loss_is_the_mean_of_the_two_paths(model, x, y):
    part = smart_loss(model, x[:4], y[:4], 1 - x, y)
    clean, adv = model(x[:4], path="clean"), model(1 - x, path="adv")
    torch.testing.assert_close(part.clean_loss, F.cross_entropy(clean, y[:4]))
    torch.testing.assert_close(part.adv_loss, F.cross_entropy(adv, y))
    torch.testing.assert_close(part.loss, 0.5 * part.clean_loss + 0.5 * part.adv_loss)
    assert part.clean_accuracy == (clean.argmax(1) == y[:4]).float().mean()
    assert part.adv_accuracy == (adv.argmax(1) == y).float().mean()
    assert part.loss.requires_grad and not part.clean_loss.requires_grad and not part.adv_loss.requires_grad


def test_the_loss_of_the_dial_weighs_by_lambda_and_leaves_the_statistics(model, x, y):
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    part = dial_loss(model, x[:4], y[:4], 1 - x, y, 0.3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(norm.track_running_stats for norm in model.net[1].norms.values())
    clean, adv = model(x[:4], path=0.3), model(1 - x, path=0.3)
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(part.loss, 0.7 * F.cross_entropy(clean, y[:4]) + 0.3 * F.cross_entropy(adv, y))
    part.loss.backward()
    norms = model.net[1].norms
    assert all(norm.weight.grad.abs().sum() > 0 for norm in norms.values())


class Given(nn.Module):
    """Returns the logits that it is given as images, and keeps the paths it was called on."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: list[object] = []

    def forward(self, x: Tensor, path: object) -> Tensor:
        self.paths.append(path)
        return x


# Probabilities (3/4, 1/4) and (1/2, 1/2) for two images clean; (1/4, 3/4) and (1/2, 1/2) attacked.
CLEAN = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
ATTACKED = torch.tensor([[1.0, 3.0], [2.0, 2.0]]).log()
LABELS = torch.tensor([0, 1])


def test_trades_by_hand():
    model = Given()
    clean, adv = CLEAN.clone().requires_grad_(), ATTACKED.clone().requires_grad_()
    part = trades_loss(model, clean, adv, LABELS, beta=6.0)
    # KL of the first image: 3/4 log 3 + 1/4 log 1/3 = 1/2 log 3; of the second: 0.
    divergence = (0.5 * math.log(3)) / 2
    entropy = -(math.log(3 / 4) + math.log(1 / 2)) / 2
    assert float(part.clean_loss) == pytest.approx(entropy) and float(part.adv_loss) == pytest.approx(divergence)
    assert part.loss.item() == pytest.approx(entropy + 6 * divergence)
    assert part.clean_accuracy == 0.5 and part.adv_accuracy == 0.0 and model.paths == ["clean", "adv"]
    part.loss.backward()
    # Of beta / 2 * KL by the attacked logits: q - p. It reaches the clean side too.
    assert torch.allclose(adv.grad, torch.tensor([[-1.5, 1.5], [0.0, 0.0]]), atol=1e-6)
    cross_entropy_alone = torch.tensor([[-0.125, 0.125], [0.25, -0.25]])
    assert not torch.allclose(clean.grad, cross_entropy_alone, atol=1e-2)


def test_trades_attacks_what_its_loss_measures(x, y):
    model = make_model(None, method="trades")
    adv, noise = (
        pgd(model, x, y, "adv", 0.2, 0.05, steps, generator=torch.Generator().manual_seed(0), loss="kl")
        for steps in (8, 1)
    )
    distances = [float(trades_loss(model, x, each, y).adv_loss) for each in (adv, noise)]
    assert distances[0] > 2 * distances[1] > 0


def test_oat_mixes_by_each_images_lambda():
    model = Given()
    lambdas = Lambdas(torch.tensor([0.0, 0.4]), 1)
    part = oat_loss(model, CLEAN, ATTACKED[:1], LABELS, lambdas)
    # The second image counts clean by 0.6; attacked, (1/4, 3/4) with label 1, by 0.4.
    expected = (-math.log(3 / 4) - 0.6 * math.log(1 / 2) - 0.4 * math.log(3 / 4)) / 2
    assert float(part.loss) == pytest.approx(expected)
    assert float(part.clean_loss) == pytest.approx(-(math.log(3 / 4) + math.log(1 / 2)) / 2)
    assert float(part.adv_loss) == pytest.approx(-math.log(3 / 4)) and part.adv_accuracy == 1.0
    assert model.paths[0] is lambdas and model.paths[1].values.tolist() == [pytest.approx(0.4)]


@pytest.mark.parametrize(
    ("loss", "path", "kept", "unknown"),
    [(standard_loss, "clean", "clean", "adv"), (adversarial_loss, "adv", "adv", "clean")],
    ids=["standard", "pgd_at"],
)
def test_one_kind_of_images_alone(loss, path, kept, unknown):
    model = Given()
    part = loss(model, CLEAN, LABELS)
    expected = -(math.log(3 / 4) + math.log(1 / 2)) / 2
    assert float(part.loss) == pytest.approx(expected) == float(getattr(part, f"{kept}_loss"))
    assert getattr(part, f"{kept}_accuracy") == 0.5 and model.paths == [path]
    assert getattr(part, f"{unknown}_loss").isnan() and getattr(part, f"{unknown}_accuracy").isnan()
