"""What a training run gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from smart.checkpoint import load_into
from smart.layers import SmartNet


@dataclass
class TrainResult:
    """What a run gave.

    Attributes:
        history: one row per epoch, as in log.csv: epoch (from 1), lr, losses and accuracies in training (None where the
            method has none), ``val_clean`` (clean images, clean path), ``val_adv`` (PGD, adversarial path), prune rate,
            densities, seconds.
        best, last: the rows of the epoch with the highest mean of ``val_clean`` and ``val_adv`` (of standard training
            ``val_clean`` alone), and of the last one.
        out, log_path, best_path, last_path: the run folder and its files; None without one.
    """

    history: list[dict[str, Any]]
    best: dict[str, Any]
    out: Path | None = None
    log_path: Path | None = None
    best_path: Path | None = None
    last_path: Path | None = None
    best_state: dict[str, Tensor] | None = field(default=None, repr=False)

    @property
    def last(self) -> dict[str, Any]:
        return self.history[-1]

    def load_best(self, model: SmartNet) -> None:
        """Loads the weights, masks and norms of the best epoch into ``model``."""
        if self.best_path is not None:
            load_into(model, self.best_path)
        elif self.best_state is not None:
            model.load_state_dict(self.best_state)
