"""AutoAttack (Croce & Hein 2020) on one path, through the package pyautoattack, the extra ``eval``."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from smart.attacks import check_eps, check_images
from smart.modes import eval_mode
from smart.seeds import seeded

# By name: parts of the standard version, in the order in which they run.
VERSIONS = {
    "autoattack": ["apgd-ce", "apgd-t", "fab-t", "square"],
    "apgd-ce": ["apgd-ce"],
    "apgd-t": ["apgd-t"],
    "fab-t": ["fab-t"],
}
# The targeted loss compares the first, the third and the fourth logit.
LEAST_CLASSES = {"autoattack": 4, "apgd-ce": 2, "apgd-t": 4, "fab-t": 2}


def missing() -> str | None:
    """Why AutoAttack cannot run, in one sentence; None if it can."""
    if importlib.util.find_spec("pyautoattack") is None:
        return "AutoAttack is the package pyautoattack, which is not installed: pip install pyautoattack"
    return None


def auto_attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    path: str | float | Tensor = "clean",
    eps: float = 8 / 255,
    version: str = "autoattack",
    seed: int = 0,
) -> Tensor:
    """The standard L-infinity version, or a part of it with the same settings; each image is attacked until it fools.

    With fewer than ten classes, every wrong class is a target once.

    Args:
        model: called as ``model(x, path=path)``; returns logits (N, classes). Left as it was.
        x: (N, C, H, W), float in [0, 1].
        y: true labels (N,), integers.
        path: a path or lambda for all images: a choice for each image cannot be attacked, parts are run on some only.
        eps: radius in units of the [0, 1] range.
        version: ``"autoattack"``, or of its parts ``"apgd-ce"``, ``"apgd-t"``, ``"fab-t"``.
        seed: of everything random; torch's global random state is left as it was.

    Returns:
        Attacked images like ``x``; those that withstood are as they were.

    Raises:
        ImportError: pyautoattack is not installed.
        ValueError: an unknown version; eps outside [0, 1]; x outside [0, 1]; labels of another shape; too few classes.
    """
    if why := missing():
        raise ImportError(why)
    from pyautoattack import AutoAttack

    if version not in VERSIONS:
        raise ValueError(f"unknown version {version!r} of AutoAttack: accepted are {', '.join(VERSIONS)}")
    if isinstance(path, Tensor):
        raise ValueError("path is a tensor: AutoAttack attacks one path or lambda at a time")
    check_eps(eps)
    check_images(x, y)
    with torch.inference_mode(False), eval_mode(model), _undisturbed(), seeded(seed, x.device):
        x, y = x.detach().clone().contiguous(), y.long()
        with torch.no_grad():
            classes = model(x[:1], path=path).shape[1]
        if classes < LEAST_CLASSES[version]:
            raise ValueError(
                f"{version!r} needs {LEAST_CLASSES[version]} classes, this network has {classes}: take PGD with the "
                "loss 'cw'"
            )
        attack = AutoAttack(_OnePath(model, path), eps=eps, norm="Linf", seed=seed, device=x.device)
        attack.attacks_to_run = list(VERSIONS[version])
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
        adv, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))
        # Its own rounding must not lend it a radius that it was not given.
        return torch.minimum(torch.maximum(adv.detach(), (x - eps).clamp(0, 1)), (x + eps).clamp(0, 1))


class _OnePath(nn.Module):
    """A network called with images alone."""

    def __init__(self, model: nn.Module, path: str | float) -> None:
        super().__init__()
        self.model, self.path = model, path

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, path=self.path)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keeps what AutoAttack would leave changed: the trace function, and the level of its logger."""
    tracing, logger = sys.gettrace(), logging.getLogger("auto-attack")
    level = logger.level
    # Its warnings are of the kind "only 4 classes": what matters of them is refused above.
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.settrace(tracing)
