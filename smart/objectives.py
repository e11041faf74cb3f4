"""What training minimises."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smart.lambdas import Lambdas
from smart.modes import kept_statistics


class SmartLoss(NamedTuple):
    """The loss of one batch, all of shape (); only ``loss`` carries gradients. Accuracies lie in [0, 1].

    NaN stands for what a method does not compute: the loss on clean images where it trains on attacked ones alone.
    """

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


def standard_loss(model: nn.Module, x: Tensor, y: Tensor) -> SmartLoss:
    """CE of clean images: standard training, in which no image is attacked.

    Args:
        x, y: (N, C, H, W), float in [0, 1], and (N,), int64.
    """
    logits = model(x, path="clean")
    loss = F.cross_entropy(logits, y)
    return SmartLoss(loss, loss.detach(), _unknown(loss), _accuracy(logits, y), _unknown(loss))


def adversarial_loss(model: nn.Module, x_adv: Tensor, y: Tensor) -> SmartLoss:
    """CE of attacked images alone: PGD adversarial training (Madry et al. 2018, arXiv 1706.06083).

    Args:
        x_adv, y: (N, C, H, W), float in [0, 1], and (N,), int64.
    """
    logits = model(x_adv, path="adv")
    loss = F.cross_entropy(logits, y)
    return SmartLoss(loss, _unknown(loss), loss.detach(), _unknown(loss), _accuracy(logits, y))


def trades_loss(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, beta: float = 6.0) -> SmartLoss:
    """CE(clean images) + beta * KL(p(clean) || p(attacked)): TRADES (Zhang et al. 2019, arXiv 1901.08573).

    The KL is summed over classes and averaged over images. Gradients flow through both sides of it, as in the
    published code; the adversarial loss in the result is the KL.

    Args:
        x, x_adv, y: (N, C, H, W) each, float in [0, 1], and (N,), int64; ``x_adv`` attacked by the loss ``"kl"``.
        beta: the weight of robustness; published for CIFAR-10: 6.
    """
    clean_logits, adv_logits = model(x, path="clean"), model(x_adv, path="adv")
    clean_loss = F.cross_entropy(clean_logits, y)
    clean, adv = F.log_softmax(clean_logits, 1), F.log_softmax(adv_logits, 1)
    divergence = F.kl_div(adv, clean, reduction="batchmean", log_target=True)
    return SmartLoss(
        clean_loss + beta * divergence,
        clean_loss.detach(),
        divergence.detach(),
        _accuracy(clean_logits, y),
        _accuracy(adv_logits, y),
    )


def oat_loss(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, lambdas: Lambdas) -> SmartLoss:
    """The mean over images of (1 - l) * CE(clean) + l * CE(attacked), each at its own lambda l (OAT).

    Wang et al. 2020, "Once-for-All Adversarial Training" (arXiv 2010.11828), and its published code, in which images at
    lambda 0 are not attacked. The clean and the adversarial loss in the result are plain means.

    Args:
        x, y: (N, C, H, W), float in [0, 1], and (N,), int64; all run clean.
        x_adv: (N - lambdas.clean, C, H, W), the last ones attacked, each at its lambda.
        lambdas: of the N images.
    """
    y_adv = y[lambdas.clean :]
    clean_logits, adv_logits = model(x, path=lambdas), model(x_adv, path=lambdas.attacked())
    clean_losses = F.cross_entropy(clean_logits, y, reduction="none")
    adv_losses = F.cross_entropy(adv_logits, y_adv, reduction="none")
    weights = lambdas.values.to(clean_losses.dtype)
    total = ((1 - weights) * clean_losses).sum() + (weights[lambdas.clean :] * adv_losses).sum()
    return SmartLoss(
        total / len(x),
        clean_losses.detach().mean(),
        adv_losses.detach().mean(),
        _accuracy(clean_logits, y),
        _accuracy(adv_logits, y_adv),
    )


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
        _accuracy(clean_logits, y_clean),
        _accuracy(adv_logits, y_adv),
    )


def _accuracy(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.argmax(1) == y).float().mean()


def _unknown(like: Tensor) -> Tensor:
    return torch.full_like(like, float("nan"), requires_grad=False)
