"""The ways to train, by one word each: what it puts into a network, and what it minimises. A new one is a line here.

All run in the same trainer on the same batches, with the same attack, optimizer and schedule; so two runs that differ
in this word alone compare the methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from smart.config import TrainConfig
from smart.lambdas import Lambdas, draw_lambdas
from smart.mask_plan import MaskPlan
from smart.objectives import (
    SmartLoss,
    adversarial_loss,
    dial_loss,
    oat_loss,
    smart_loss,
    standard_loss,
    trades_loss,
)
from smart.share import WHOLE, Share

DENSE = "unstructured"  # the pattern of a network without masks


class Attack(Protocol):
    """Attacks images (N, C, H, W) with labels (N,) on a path, with the settings of the training."""

    def __call__(self, x: Tensor, y: Tensor, path: str | float | Lambdas, loss: str = "ce") -> Tensor: ...


@dataclass(frozen=True)
class Batch:
    """What a step trains on.

    Attributes:
        x, y: images (N, C, H, W), float in [0, 1], and labels (N,).
        attack: makes attacked ones.
        step: from 0, over the run.
        generator: of all that is drawn for the step.
        share: the whole batch, or the part of it that this is.
    """

    x: Tensor
    y: Tensor
    attack: Attack
    step: int
    generator: torch.Generator
    config: TrainConfig
    share: Share = WHOLE


@dataclass(frozen=True)
class Method:
    """How a network is trained.

    Attributes:
        about: in one line, with its source.
        loss: of one batch; it makes the attacks it needs.
        masks: whether convolutions have masks; others are dense.
        norms: ``"single"``, one batch norm for both paths, which then are the same; ``"dual"``, one for each, mixed
            between them; ``"switched"``, the clean one at lambda 0 alone.
        film: whether FiLM layers follow the norms, conditioned on lambda.
        noise: whether weights get noise in proportion to lambda.
        one_mask: whether both paths have the same mask.
        dial: whether it can train at sampled lambdas (``dial`` of the config).
        judged_by: validation accuracies whose sum decides which epoch is best.
    """

    about: str
    loss: Callable[[nn.Module, Batch], SmartLoss]
    masks: bool = False
    norms: str = "dual"
    film: bool = False
    noise: bool = False
    one_mask: bool = False
    dial: bool = False
    judged_by: tuple[str, ...] = ("val_clean", "val_adv")


# ---- what a step minimises ----


def _standard(model: nn.Module, batch: Batch) -> SmartLoss:
    return standard_loss(model, batch.x, batch.y)


def _pgd_at(model: nn.Module, batch: Batch) -> SmartLoss:
    return adversarial_loss(model, batch.attack(batch.x, batch.y, "adv"), batch.y)


def _trades(model: nn.Module, batch: Batch) -> SmartLoss:
    adv = batch.attack(batch.x, batch.y, "adv", loss="kl")
    return trades_loss(model, batch.x, adv, batch.y, batch.config.trades_beta)


def _two_paths(model: nn.Module, batch: Batch) -> SmartLoss:
    """Half of the batch clean, half attacked; of a sampled dial every other step trains between the paths."""
    half = len(batch.x) // 2
    at = None
    if batch.config.dial == "sampled" and batch.step % 2:
        # Never an end itself.
        at = float(torch.rand((), generator=batch.generator).clamp(1e-3, 1 - 1e-3))
    adv = batch.attack(batch.x[half:], batch.y[half:], "adv" if at is None else at)
    images = batch.x[:half], batch.y[:half], adv, batch.y[half:]
    return smart_loss(model, *images) if at is None else dial_loss(model, *images, at)


def _oat(model: nn.Module, batch: Batch) -> SmartLoss:
    lambdas = draw_lambdas(len(batch.x), batch.generator, batch.x.device, batch.share)
    adv = batch.attack(batch.x[lambdas.clean :], batch.y[lambdas.clean :], lambdas.attacked())
    return oat_loss(model, batch.x, adv, batch.y, lambdas)


METHODS: dict[str, Method] = {
    "smart": Method("two paths, a mask and norms each (Kundu et al. 2023)", _two_paths, masks=True, dial=True),
    "dual_bn": Method("SMART at density 1: dense weights, norms of each path", _two_paths, dial=True),
    "float": Method(
        "noise on dense weights in proportion to lambda, norms of each path (FLOAT, Kundu et al. 2022)",
        _two_paths,
        norms="switched",
        noise=True,
    ),
    "floats": Method(
        "FLOAT on sparse weights, one mask for both paths (FLOATS)",
        _two_paths,
        masks=True,
        norms="switched",
        noise=True,
        one_mask=True,
    ),
    "oat": Method(
        "FiLM layers conditioned on lambda, switched norms (Wang et al. 2020)", _oat, norms="switched", film=True
    ),
    "trades": Method("CE(clean) + beta KL(clean || attacked) (Zhang et al. 2019)", _trades, norms="single"),
    "pgd_at": Method("attacked images alone (Madry et al. 2018)", _pgd_at, norms="single"),
    "standard": Method("clean images alone", _standard, norms="single", judged_by=("val_clean",)),
}


def find_method(name: str) -> Method:
    """A method by its word.

    Raises:
        ValueError: an unknown one.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: accepted are {', '.join(METHODS)}")
    return METHODS[name]


def read_plan(name: str, choices: Mapping[str, Any]) -> MaskPlan:
    """The masks that a network for a method has; ``choices`` are those of :meth:`smart.mask_plan.MaskPlan.read`.

    Raises:
        ValueError, TypeError: the method is unknown or has no such masks; as for :meth:`MaskPlan.read`.
    """
    method = find_method(name)
    if method.one_mask and choices.get("overlap", "independent") in ("independent", "free"):
        choices = {**choices, "overlap": "shared"}
    if not method.masks and choices.get("density") is None and choices.get("pattern", DENSE) == DENSE:
        choices = {**choices, "density": 1.0}
    plan = MaskPlan.read(**choices)
    if not method.masks and (set(plan.density.values()) != {1.0} or str(plan.pattern) != DENSE):
        raise ValueError(
            f"method {name!r} has dense weights, and density is {plan.density}, pattern {plan.pattern}: leave both "
            f"out, or take one with masks, {' or '.join(repr(each) for each in METHODS if METHODS[each].masks)}"
        )
    if method.one_mask and plan.overlap != "shared":
        raise ValueError(f"method {name!r} has one mask for both paths, and overlap is {plan.overlap!r}: leave it out")
    return plan


def check_dial(name: str, dial: str) -> None:
    """Raises ValueError where a method cannot train at sampled lambdas."""
    if dial == "sampled" and not find_method(name).dial:
        able = " or ".join(repr(each) for each in METHODS if METHODS[each].dial)
        raise ValueError(f"dial is 'sampled' and the method {name!r}: it trains the dial of {able}, take 'ends'")
