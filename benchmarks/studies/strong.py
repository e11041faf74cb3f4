"""Attacks stronger than those of every study, on fewer images, to tell how far these overstate; and their table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

import smart
from benchmarks.studies.cases import ATTACKS, RECIPE, STUDIES
from benchmarks.studies.tables import Row, of_case, signed, spread
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


HEADING = (
    "",
    "path",
    "seeds",
    "no attack",
    "attacked as above",
    "with restarts",
    "AutoAttack",
    "as above less AutoAttack",
    "checks passed",
)


def markdown(results: Mapping[str, Any], name: str) -> str:
    """A line for each case of a study and path that is a network of its own; and what it is of, in a sentence."""
    lines = [f"| {' | '.join(HEADING)} |", "|" + "---|" * len(HEADING)]
    for case in STUDIES[name].cases:
        runs = of_case(results["rows"], case)
        paths = runs[0]["strong"]["clean"] if runs else ()
        for path in paths:
            cells = [case.name, path if len(paths) > 1 else "the only one", *_cells(runs, path)]
            lines.append(f"| {' | '.join(cells)} |")
    about = results["strong"]
    return "\n".join([*lines, "", f"{about['images']} of the test images, {about['restarts']} restarts."])


def share(attack: str, path: str) -> Callable[[Row], float]:
    """What withstands ``"clean"``, ``"pgd"``, ``"restarts"`` or ``"autoattack"`` on a path, in percent."""
    return lambda row: 100 * row["strong"][attack][path]


def _cells(runs: Sequence[Row], path: str) -> list[str]:
    overstated = [share("pgd", path)(row) - share("autoattack", path)(row) for row in runs]
    checks = [check for row in runs for check in row["strong"].get("sanity", {}).get("checks", ())]
    passed = [check["passed"] for check in checks if check["path"] == path]
    return [
        str(len(runs)),
        *(spread(runs, share(attack, path)) for attack in ("clean", "pgd", "restarts", "autoattack")),
        signed(overstated),
        f"{sum(passed)} of {len(passed)}" if passed else "",
    ]
