from __future__ import annotations

import torch
import torch.nn.functional as F

from smart.objectives import smart_loss


def test_loss_is_the_mean_of_the_two_paths(model, x, y):
    part = smart_loss(model, x[:4], y[:4], 1 - x, y)
    clean, adv = model(x[:4], path="clean"), model(1 - x, path="adv")
    torch.testing.assert_close(part.clean_loss, F.cross_entropy(clean, y[:4]))
    torch.testing.assert_close(part.adv_loss, F.cross_entropy(adv, y))
    torch.testing.assert_close(part.loss, 0.5 * part.clean_loss + 0.5 * part.adv_loss)
    assert part.clean_accuracy == (clean.argmax(1) == y[:4]).float().mean()
    assert part.adv_accuracy == (adv.argmax(1) == y).float().mean()
    assert part.loss.requires_grad and not part.clean_loss.requires_grad and not part.adv_loss.requires_grad
