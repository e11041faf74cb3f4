from __future__ import annotations

import torch
import torch.nn.functional as F

from smart.objectives import dial_loss, smart_loss


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
