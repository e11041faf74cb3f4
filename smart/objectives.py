"""What training minimises."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from smart.layers import kept_statistics


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
    return _weighted(model, x_clean, y_clean, x_adv, y_adv, ("clean", "adv"), 0.5)


def dial_loss(model: nn.Module, x_clean: Tensor, y_clean: Tensor, x_adv: Tensor, y_adv: Tensor, at: float) -> SmartLoss:
    """(1 - l) * CE(clean images) + l * CE(attacked images), both through the path at lambda l, strictly in (0, 1).

    It trains the dial between the paths, as OAT trains its own (Wang et al. 2020). Batch norms norm by the batch and
    leave their running statistics alone, which stay those of the two paths' own images. That SMART's dial should be
    trained like this is our choice.

    Args:
        x_clean, y_clean, x_adv, y_adv: as for :func:`smart_loss`; ``x_adv`` attacked at this lambda.
        at: lambda.
    """
    with kept_statistics(model):
        return _weighted(model, x_clean, y_clean, x_adv, y_adv, (at, at), at)


def _weighted(
    model: nn.Module,
    x_clean: Tensor,
    y_clean: Tensor,
    x_adv: Tensor,
    y_adv: Tensor,
    paths: tuple[str | float, str | float],
    share: float,
) -> SmartLoss:
    """Clean and attacked images, each through its path; the loss of the latter has this share."""
    clean_logits, adv_logits = model(x_clean, path=paths[0]), model(x_adv, path=paths[1])
    clean_loss = F.cross_entropy(clean_logits, y_clean)
    adv_loss = F.cross_entropy(adv_logits, y_adv)
    return SmartLoss(
        (1 - share) * clean_loss + share * adv_loss,
        clean_loss.detach(),
        adv_loss.detach(),
        (clean_logits.argmax(1) == y_clean).float().mean(),
        (adv_logits.argmax(1) == y_adv).float().mean(),
    )
