"""What a training run shows: a bar on a terminal, a line for each epoch in a log, curves in TensorBoard."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm


def hidden(shown: bool) -> bool | None:
    """What tqdm's ``disable`` takes, for a bar that is on terminals only: its lines would fill a file."""
    return None if shown else True


class Progress:
    """Shows how far a run is, and when it will end; the time left is that of the whole training, checks included.

    On a terminal a bar moves at each step. Elsewhere, as in a file, there is one line for each epoch.

    Args:
        shown: whether anything is shown.
        epochs, steps: of the run, and of one epoch.
        done: epochs that were finished before.
        file: default: stderr.
    """

    def __init__(self, shown: bool, epochs: int, steps: int, done: int = 0, file: TextIO | None = None) -> None:
        file = file if file is not None else sys.stderr
        self._file = file
        self._lines = shown and not file.isatty()
        self._epochs, self._done = epochs, done
        self._started = time.monotonic()
        # Averaged over all that was done, since the check after an epoch takes long and no step.
        self._bar = tqdm(
            total=epochs * steps,
            initial=done * steps,
            desc="train",
            unit="step",
            smoothing=0,
            disable=not shown or self._lines,
            file=file,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def step(self, epoch: int, losses: Mapping[str, float]) -> None:
        """A step of ``epoch``, from 1, is done."""
        self._bar.update()
        shown = {name: f"{value:.3f}" for name, value in losses.items() if not math.isnan(value)}
        self._bar.set_postfix(epoch=f"{epoch}/{self._epochs}", **shown, refresh=False)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch is done, with this row of the log."""
        if not self._lines:
            return
        taken, done = time.monotonic() - self._started, row["epoch"] - self._done
        left = taken / done * (self._epochs - row["epoch"])
        scores = ", ".join(f"{name} {100 * row[name]:.1f} %" for name in ("val_clean", "val_adv"))
        print(
            f"epoch {row['epoch']}/{self._epochs}: loss {row['loss']:.3f}, {scores}, {row['seconds']:.1f} s; "
            f"{tqdm.format_interval(left)} left",
            file=self._file,
            flush=True,
        )


class TensorBoard:
    """Writes the rows of a run's log as curves.

    Args:
        folder: where TensorBoard finds them; what it holds of epochs after ``done`` is no longer shown.
        done: epochs that were finished before.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"TensorBoard is not here ({error}): pip install tensorboard, or train without it; log.csv has the "
                "same numbers"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def add(self, row: Mapping[str, Any]) -> None:
        """A row of the log, one curve for each of its numbers."""
        for name, value in row.items():
            if name != "epoch" and value is not None:
                self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
