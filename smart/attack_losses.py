"""What an attack by gradients raises: one loss is easily blind where another sees.

Each takes logits (N, classes), labels (N,) and the logits of the images before the attack, and gives a loss a sample
(N,), higher where the attack is nearer to its aim.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

AttackLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, y: Tensor, before: Tensor) -> Tensor:
    """Of the true class (Madry et al. 2018)."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor, before: Tensor) -> Tensor:
    """The best other logit less that of the true class (Carlini & Wagner 2017): above 0 where the model is fooled."""
    return _best_other(logits, y) - _true(logits, y)


def dlr(logits: Tensor, y: Tensor, before: Tensor) -> Tensor:
    """The margin over the gap of the first to the third logit (Croce & Hein 2020): blind to the logits' scale.

    Raises:
        ValueError: fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"the loss 'dlr' needs three classes, this network has {logits.shape[1]}: take 'cw'")
    first, _, third = logits.topk(3, dim=1).values.unbind(1)
    return margin(logits, y, before) / (first - third + 1e-12)


def kl(logits: Tensor, y: Tensor, before: Tensor) -> Tensor:
    """How far the probabilities have gone from those before the attack (TRADES, Zhang et al. 2019); no label needed."""
    was = F.log_softmax(before, dim=1)
    return F.kl_div(F.log_softmax(logits, dim=1), was, reduction="none", log_target=True).sum(1)


def _true(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None])[:, 0]


def _best_other(logits: Tensor, y: Tensor) -> Tensor:
    return logits.scatter(1, y[:, None], -math.inf).amax(1)


LOSSES: dict[str, AttackLoss] = {"ce": cross_entropy, "cw": margin, "dlr": dlr, "kl": kl}


def attack_loss(name: str) -> AttackLoss:
    """A loss by name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r} of an attack: accepted are {', '.join(LOSSES)}")
    return LOSSES[name]
