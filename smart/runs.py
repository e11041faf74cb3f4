"""The folder of a training run: its config, its log, and the checkpoints it can be resumed from.

Every file is replaced whole, so a run that is killed at any moment leaves a folder that can be resumed.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smart.checkpoint import versions
from smart.config import TrainConfig
from smart_kernels.files import write_text


class RunFolder:
    """Names and writes the files of a run: config.json, log.csv, best.safetensors, last.safetensors."""

    def __init__(self, out: str | Path) -> None:
        self.path = Path(out)
        self.config = self.path / "config.json"
        self.log = self.path / "log.csv"
        self.best = self.path / "best.safetensors"
        self.last = self.path / "last.safetensors"

    def start(
        self,
        config: TrainConfig,
        model: Mapping[str, Any] | None,
        data: str,
        overwrite: bool,
        image_shape: Sequence[int] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Begins a new run here; ``image_shape`` (C, H, W) and ``about`` are kept for those who read the run.

        Raises:
            FileExistsError: the folder holds a run and ``overwrite`` is False.
            OSError: the folder cannot be written.
        """
        if self.config.exists() and not overwrite:
            raise FileExistsError(f"{self.path} already holds a run: resume it, overwrite it, or choose another folder")
        for file in (self.last, self.best, self.log):
            if file.exists():
                file.unlink()
        resolved = {
            "config": config.to_dict(),
            "model": model,
            "data": data,
            "image_shape": image_shape,
            "versions": versions(),
            **(about or {}),
        }
        write_text(self.config, json.dumps(resolved, indent=2) + "\n")

    def check_same(self, config: TrainConfig, model: Mapping[str, Any] | None, data: str) -> None:
        """Checks that a run to be resumed here was started with the same settings.

        Raises:
            FileNotFoundError: there is no run here.
            ValueError: its config file is damaged or says something else.
        """
        if not self.config.is_file():
            raise FileNotFoundError(
                f"there is no run to resume in {self.path}: it has no config.json, start one without resume"
            )
        try:
            saved = json.loads(self.config.read_text(encoding="utf-8"))
            # What a run from before a setting existed did is the setting's default.
            config_then = TrainConfig.from_dict(saved["config"]).to_dict()
            started = _flat(config_then, saved["model"], saved["data"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.config} is damaged ({error}): restore it, or start again in another folder"
            ) from error
        # Through JSON, as the saved settings went.
        now = json.loads(json.dumps(_flat(config.to_dict(), model, data)))
        for key in sorted(now.keys() | started.keys()):
            if now.get(key) != started.get(key):
                raise ValueError(
                    f"the run in {self.path} was started with {key} {started.get(key)!r}, not {now.get(key)!r}: "
                    "resume it with the same settings, or choose another folder"
                )

    def write_log(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Replaces log.csv by one row per epoch of ``history``, which has at least one."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_text(self.log, text.getvalue())


def _flat(config: Mapping[str, Any], model: Mapping[str, Any] | None, data: str) -> dict[str, Any]:
    """One level of keys, so that what differs can be named."""
    parts = {f"model {key}": value for key, value in model.items()} if model is not None else {"model": None}
    return {**config, **parts, "data": data}
