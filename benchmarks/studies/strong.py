"""Attacks stronger than those that every run of a study meets, on fewer images: to tell how far these overstate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

import smart
from benchmarks.studies.cases import ATTACKS, RECIPE
from smart.layers import SmartNet

RESTARTS = 10
STRONGEST = "autoattack"
PGD = [attack for attack in ATTACKS if attack != "clean"]
# Checks for masked gradients are made in this seed alone: they need as many passes as PGD with restarts.
CHECKED_SEED = 0


def attack(model: SmartNet, images: Tensor, labels: Tensor, paths: Sequence[str], seed: int) -> dict[str, Any]:
    """Shares of the same images that withstand, by path, attacks of rising strength.

    Args:
        images, labels: (N, C, H, W) and (N,), of the test split.
        paths: that are networks of their own.

    Returns:
        ``"clean"``: without an attack; ``"pgd"``: the study's own attacks together, as in ``row["robust"]``;
        ``"restarts"``: these with ``RESTARTS`` restarts; ``"autoattack"``: the standard version of AutoAttack. Of one
        seed also ``"sanity"``: checks for masked gradients, as :meth:`smart.SanityReport.as_dict` writes them.
    """
    common: dict[str, Any] = {"paths": paths, "eps": RECIPE.eps, "seed": seed}
    given = images, labels
    pgd = smart.evaluate(model, given, ATTACKS, transfer=True, **common)
    restarted = smart.evaluate(model, given, PGD, restarts=RESTARTS, transfer=True, **common)
    automatic = smart.evaluate(model, given, [STRONGEST], **common)
    found: dict[str, Any] = {
        "clean": {path: pgd[path]["clean"] for path in paths},
        "pgd": pgd.worst,
        "restarts": restarted.worst,
        "autoattack": {path: automatic[path][STRONGEST] for path in paths},
    }
    if seed == CHECKED_SEED:
        found["sanity"] = smart.sanity_checks(model, given, **common).as_dict()
    return found
