"""Runs beside each other: accuracy without an attack and under one, non-zero weights, multiplications."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smart import text
from smart.cards import read_card
from smart.checkpoint import load_checkpoint
from smart.costs import macs, nonzeros
from smart.runs import RunFolder
from smart_kernels.files import write_rows

# Columns of a row, and what they are called; the accuracies are in [0, 1].
COLUMNS = {
    "run": "run",
    "network": "network",
    "method": "method",
    "data": "data",
    "density": "density",
    "epochs": "epochs",
    "clean": "clean path, no attack",
    "robust": "adv path, attacked",
    "attack": "by",
    "measured_on": "on",
    "nonzeros_clean": "non-zeros clean",
    "nonzeros_adv": "adv",
    "nonzeros_union": "both",
    "nonzeros_dense": "of",
    "macs_clean": "MACs clean",
    "macs_adv": "adv",
    "macs_dense": "of",
}
NUMBERS = ("nonzeros", "macs")


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare_runs` found.

    Attributes:
        rows: one a run, with the keys of ``COLUMNS``; None where a number could not be had.
        left_out: why, by folder, for folders that hold nothing to compare.
        notes: what a reader must know: runs that go on, numbers that do not compare.
    """

    rows: list[dict[str, Any]]
    left_out: dict[str, str]
    notes: list[str]

    def table(self) -> str:
        """A line a run, aligned."""
        return text.align([list(COLUMNS.values()), *(_cells(row) for row in self.rows)], left=4)

    def markdown(self) -> str:
        """The same as a Markdown table, with notes and what was left out below it."""
        lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS), *(_cells(row) for row in self.rows)]
        table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        remarks = self.remarks()
        return table + ("\n\n" + "\n".join(f"* {remark}" for remark in remarks) if remarks else "")

    def remarks(self) -> list[str]:
        """Notes, and which folders were left out and why."""
        return [*self.notes, *(f"left out {folder}: {why}" for folder, why in self.left_out.items())]

    def write_csv(self, path: str | Path) -> None:
        """Writes the rows.

        Raises:
            OSError: the file cannot be written.
        """
        write_rows(path, self.rows, COLUMNS)


def compare_runs(folders: Sequence[str | Path]) -> Comparison:
    """Compares the best checkpoints of run folders; a folder without one is named, not fatal.

    Accuracies come from the card beside a checkpoint, measured on test images by ``smart eval --card``; without one,
    from the validation images in training, and the row says so. Each network is attacked on its adversarial path.

    Raises:
        ValueError: no folder holds a run with a finished epoch, or none was given.
    """
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    notes: list[str] = []
    for folder in dict.fromkeys(map(str, folders)):
        try:
            rows.append(_read_run(Path(folder), notes))
        except (OSError, ValueError, KeyError, TypeError) as error:
            left_out[folder] = " ".join(str(error).split()) or type(error).__name__
    if not rows:
        reasons = "; ".join(f"{folder}: {why}" for folder, why in left_out.items()) or "none was given"
        raise ValueError(f"there is nothing to compare, give folders that smart train wrote ({reasons})")
    for what, key in (("data", "data"), ("attacks", "attack"), ("images", "measured_on")):
        if len(values := sorted({str(row[key]) for row in rows})) > 1:
            notes.append(f"accuracies are on different {what}, which do not compare: {'; '.join(values)}")
    return Comparison(rows, left_out, notes)


def _read_run(path: Path, notes: list[str]) -> dict[str, Any]:
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise ValueError("it is no folder of a run" if path.is_dir() else "there is no such folder")
    try:
        started = json.loads(folder.config.read_text(encoding="utf-8"))
        config, data = started["config"], started["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its config.json is damaged ({error})") from error
    if not folder.best.is_file():
        raise ValueError("it has no finished epoch")
    model, metadata = load_checkpoint(folder.best)
    trained = _epochs(folder)
    if trained < config["epochs"]:
        notes.append(f"{path} is not finished: {trained} of {config['epochs']} epochs")
    shape = started.get("image_shape")
    work = macs(model, shape) if shape else {}
    alive = nonzeros(model)
    return {
        "run": path.name,
        "network": model.spec["name"],
        "method": model.method,
        "data": data,
        "density": _density(model.spec["density"]),
        "epochs": f"{metadata['epoch']} of {config['epochs']}",
        **_accuracies(folder, metadata, config, notes),
        **{f"nonzeros_{key}": alive[key] for key in ("clean", "adv", "union", "dense")},
        **{f"macs_{key}": work.get(key) for key in ("clean", "adv", "dense")},
    }


def _accuracies(
    folder: RunFolder, metadata: dict[str, Any], config: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """From the card if there is one that fits, else from the validation in training."""
    try:
        card = read_card(folder.best)
    except ValueError as error:
        notes.append(str(error))
        card = None
    if card is not None and (found := _from_card(card)):
        return found
    metrics = metadata["metrics"]
    attack = text.attack_name(f"pgd{config['val_attack_steps']}")
    return {
        "clean": metrics["val_clean"],
        "robust": metrics["val_adv"],
        "attack": f"{attack}, eps {text.show(config['eps'])}",
        "measured_on": "validation images",
    }


def _from_card(card: dict[str, Any]) -> dict[str, Any] | None:
    paths = card["paths"]
    clean, robust = (paths.get(path, {}).get(key) for path, key in (("clean", "clean_acc"), ("adv", "robust_acc")))
    if clean is None or robust is None:
        return None
    names = [text.attack_name(attack) for attack in card["attacks"] if attack != "clean"]
    return {
        "clean": clean / 100,
        "robust": robust / 100,
        "attack": f"{' + '.join(names)}, eps {card['eps']}",
        "measured_on": f"{card['n_examples']} {card['split']} images",
    }


def _epochs(folder: RunFolder) -> int:
    """Finished epochs, by the log."""
    if not folder.log.is_file():
        return 0
    with folder.log.open(newline="", encoding="utf-8") as file:
        return sum(1 for _ in csv.DictReader(file))


def _density(density: Any) -> str:
    values = list(density.values()) if isinstance(density, dict) else [density]
    return " / ".join(f"{value:g}" for value in dict.fromkeys(values))


def _cells(row: dict[str, Any]) -> list[str]:
    cells = []
    for key in COLUMNS:
        value = row[key]
        if value is None:
            cells.append("-")
        elif key in ("clean", "robust"):
            cells.append(f"{100 * value:.1f} %")
        else:
            cells.append(text.short(value) if key.startswith(NUMBERS) else str(value))
    return cells
