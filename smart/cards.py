"""Cards: what was measured of a checkpoint, as JSON beside it, with all that is needed to measure it again.

In the manner of RobustBench (https://robustbench.github.io): accuracies in percent without an attack and under the
worst of all attacks, for each path; the threat model; and the file that the numbers are of, by its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from smart.checkpoint import versions
from smart.costs import macs, nonzeros
from smart.evaluate import Evaluation
from smart.layers import SmartNet
from smart.named_attacks import attack_steps
from smart.text import show
from smart_kernels.files import write_text

FORMAT = "smart-card"


def card_path(checkpoint: str | Path) -> Path:
    """Where the card of a checkpoint lies: ``best.card.json`` for ``best.safetensors``."""
    return Path(checkpoint).with_suffix(".card.json")


def make_card(
    checkpoint: str | Path,
    model: SmartNet,
    metadata: Mapping[str, Any],
    data: tuple[str, Tensor, Tensor],
    table: Evaluation,
    command: str | None = None,
) -> dict[str, Any]:
    """The card of a checkpoint.

    Args:
        model, metadata: as :func:`smart.load_checkpoint` gave them.
        data: the name, and the images and labels that ``table`` was measured on.
        table: what :func:`smart.evaluate` gave.
        command: that measured it.
    """
    name, images, labels = data
    used = table.settings
    attacks = list(next(iter(table.values())))
    spec = model.spec or {}
    return {
        "format": FORMAT,
        "checkpoint": Path(checkpoint).name,
        "sha256": file_sha256(checkpoint),
        "architecture": spec.get("name"),
        "model": model.spec,
        "dataset": name,
        "split": "test",
        "n_examples": used["n_examples"],
        "examples_sha256": images_sha256(images, labels),
        "threat_model": "Linf",
        "eps": show(used["eps"]),
        "attacks": {attack: {"steps": attack_steps(attack)} for attack in attacks},
        "step": show(used["step"]),
        "restarts": used["restarts"],
        "seed": used["seed"],
        "paths": {path: _summary(row, table.worst[path], attacks) for path, row in table.items()},
        "accuracy": dict(table),
        "transfer": table.transfer,
        "nonzeros": nonzeros(model),
        "macs": macs(model, images.shape[1:]),
        "training": {key: metadata.get(key) for key in ("config", "epoch", "metrics")},
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


def _summary(row: Mapping[str, float], worst: float, attacks: Sequence[str]) -> dict[str, float]:
    """Percentages: without an attack, and under the worst of the attacks for each image; each where it was measured."""
    summary = {"clean_acc": round(100 * row["clean"], 2)} if "clean" in row else {}
    if any(attack != "clean" for attack in attacks):
        summary["robust_acc"] = round(100 * worst, 2)
    return summary


def write_card(card: Mapping[str, Any], checkpoint: str | Path) -> Path:
    """Writes a card beside its checkpoint.

    Raises:
        OSError: the file cannot be written.
    """
    path = card_path(checkpoint)
    write_text(path, json.dumps(card, indent=2) + "\n")
    return path


def read_card(checkpoint: str | Path) -> dict[str, Any] | None:
    """The card beside a checkpoint; None without one.

    Raises:
        ValueError: it is damaged, or of another checkpoint than the file that lies there now.
    """
    path = card_path(checkpoint)
    if not path.is_file():
        return None
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no card ({error}): write it again with smart eval --card") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT or not isinstance(card.get("paths"), dict):
        raise ValueError(f"{path} is no card: write it again with smart eval --card")
    if card.get("sha256") != file_sha256(checkpoint):
        raise ValueError(f"{path} is of another checkpoint than {checkpoint}: write it again with smart eval --card")
    return card


def file_sha256(file: str | Path) -> str:
    """Of a whole file, as sha256sum prints it."""
    with Path(file).open("rb") as opened:
        digest = hashlib.sha256()
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def images_sha256(images: Tensor, labels: Tensor) -> str:
    """Of images and their labels, whatever file they came from."""
    digest = hashlib.sha256(f"{images.dtype} {tuple(images.shape)};".encode())
    for tensor in (images, labels):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
