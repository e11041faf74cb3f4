"""Accuracy against the radius of an attack: a curve says more than the one radius a network was trained for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from smart.attacks import check_eps
from smart.data import ImageData
from smart.evaluate import evaluate
from smart.named_attacks import attack_steps
from smart.progress import hidden
from smart_kernels.files import write_rows
from smart_kernels.paths import PATHS

# From no attack to one that may change every pixel to anything, in units of the radius of the training.
FACTORS = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 4)

Curve = dict[str, dict[float, dict[str, float]]]


class Curves(Curve):
    """``curves["adv"][8 / 255]`` is ``{"accuracy": ..., "loss": ...}``: by configuration and radius.

    Attributes:
        settings: what they hold for: attack, steps, step (as a part of eps), restarts, n_examples, seed.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings

    def rows(self) -> list[dict[str, Any]]:
        """One flat row a point: evaluated, eps, accuracy, loss, and the settings."""
        return [
            {"evaluated": name, "eps": eps, **point, **self.settings}
            for name, points in self.items()
            for eps, point in points.items()
        ]

    def write_csv(self, path: str | Path) -> None:
        """Writes :meth:`rows`.

        Raises:
            OSError: the file cannot be written.
        """
        write_rows(path, self.rows())


def robustness_curves(
    model: nn.Module,
    data: ImageData | tuple[Tensor, Tensor],
    radii: Sequence[float],
    attack: str = "pgd20",
    paths: Sequence[str] = PATHS,
    lambdas: Sequence[float] = (),
    restarts: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Curves:
    """Attacks each configuration as deployed at each radius; PGD's step is a quarter of the radius.

    The random starts of an image are the same draw at each radius, scaled by it.

    Args:
        radii: L-infinity radii in [0, 1]; 0 is no attack.
        attack: by name; others as for :func:`smart.evaluate`.

    Raises:
        ValueError, ImportError: no radius, or one outside [0, 1]; as for :func:`smart.evaluate`.
    """
    radii = sorted(set(radii))
    if not radii:
        raise ValueError("there is no radius to attack at: give at least one, such as 8/255")
    for eps in radii:
        check_eps(eps)
    curves: Curves | None = None
    for eps in tqdm(radii, desc="curve", unit="radius", disable=hidden(progress)):
        table = evaluate(
            model, data, [attack], paths, lambdas, eps, restarts=restarts, batch_size=batch_size, seed=seed
        )
        if curves is None:
            used = {key: table.settings[key] for key in ("n_examples", "restarts", "seed")}
            curves = Curves({"attack": attack, "steps": attack_steps(attack), "step": "eps/4", **used})
        for name, row in table.items():
            point = {"accuracy": row[attack], "loss": table.losses[name][attack]}
            curves.setdefault(name, {})[eps] = point
    assert curves is not None
    return curves
