"""What training minimises."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class SmartLoss(NamedTuple):
    """The loss of one batch, all of shape (); only ``loss`` carries gradients. Accuracies lie in [0, 1]."""

    loss: Tensor
    clean_loss: Tensor
    adv_loss: Tensor
    clean_accuracy: Tensor
    adv_accuracy: Tensor


def smart_loss(model: nn.Module, x_clean: Tensor, y_clean: Tensor, x_adv: Tensor, y_adv: Tensor) -> SmartLoss:
    """0.5 * CE(clean images through the clean path) + 0.5 * CE(attacked images through the adversarial path).

    A reconstruction of the objective of SMART (arXiv 2302.03523), whose code is not public.

    Args:
        x_clean, x_adv: (N, C, H, W) and (M, C, H, W), float in [0, 1].
        y_clean, y_adv: (N,) and (M,), int64.
    """
    clean_logits = model(x_clean, path="clean")
    adv_logits = model(x_adv, path="adv")
    clean_loss = F.cross_entropy(clean_logits, y_clean)
    adv_loss = F.cross_entropy(adv_logits, y_adv)
    return SmartLoss(
        0.5 * clean_loss + 0.5 * adv_loss,
        clean_loss.detach(),
        adv_loss.detach(),
        (clean_logits.argmax(1) == y_clean).float().mean(),
        (adv_logits.argmax(1) == y_adv).float().mean(),
    )
