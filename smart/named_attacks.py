"""Attacks by name, as they are asked for in :func:`smart.evaluate` and on the command line."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from smart.attack_losses import LOSSES
from smart.attacks import fgsm, pgd
from smart.auto_attack import VERSIONS, auto_attack, missing
from smart.black_box import square

# Of AutoAttack's parts, those that count their work in steps at all do 100 of them.
AUTO_STEPS = 100
_NUMBERED = re.compile(rf"(pgd|square)([1-9]\d{{0,4}})(?:-({'|'.join(LOSSES)}))?")
ACCEPTED = (
    "'clean', 'fgsm', 'pgdN' with N steps, such as 'pgd20', with another loss than cross-entropy 'pgdN-cw', 'pgdN-dlr' "
    f"or 'pgdN-kl', 'squareN' with N queries, such as 'square100', and {', '.join(map(repr, VERSIONS))}"
)


def attack_steps(attack: str) -> int:
    """The steps of an attack by name: 0 for ``"clean"``, 1 for ``"fgsm"``, N for ``"pgdN"`` and ``"squareN"``.

    A step of PGD takes a gradient, one of Square is a query. AutoAttack and its parts count as 100, the steps of APGD.

    Raises:
        ValueError: any other name.
    """
    if attack in ("clean", "fgsm"):
        return ("clean", "fgsm").index(attack)
    return AUTO_STEPS if attack in VERSIONS else int(_parts(attack)[1])


def check_attack(attack: str) -> None:
    """Checks that an attack is known and can run here.

    Raises:
        ValueError: an unknown name. ImportError: it needs a package that is not installed.
    """
    attack_steps(attack)
    if attack in VERSIONS and (why := missing()):
        raise ImportError(why)


def run_attack(
    attack: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    path: str | float,
    eps: float,
    step: float,
    restarts: int,
    seed: int,
) -> Tensor:
    """Images (N, C, H, W) attacked on ``path`` by an attack given by name; ``"clean"`` leaves them as they are.

    Args:
        eps, step, restarts: as for :func:`smart.pgd`; an attack that has no steps or restarts leaves them unused.
        seed: of everything random in it.
    """
    if attack == "clean":
        return x
    if attack == "fgsm":
        return fgsm(model, x, y, path, eps)
    if attack in VERSIONS:
        return auto_attack(model, x, y, path, eps, attack, seed % 2**32)
    kind, steps, loss = _parts(attack)
    generator = torch.Generator().manual_seed(seed)
    if kind == "square":
        return square(model, x, y, path, eps, int(steps), generator)
    return pgd(model, x, y, path, eps, step, int(steps), restarts, generator=generator, loss=loss or "ce")


def _parts(attack: str) -> tuple[str, str, str | None]:
    """The kind, the number and the loss in a name."""
    match = _NUMBERED.fullmatch(attack)
    if match is None or (match[1] == "square" and match[3]):
        raise ValueError(f"unknown attack {attack!r}: accepted are {ACCEPTED}")
    return match[1], match[2], match[3]
