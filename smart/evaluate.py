"""Accuracy under attack; each configuration is attacked as it is deployed, with its masks, norms and lambda."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from smart.attacks import check_settings
from smart.data import ImageData, as_floats
from smart.modes import eval_mode
from smart.named_attacks import attack_steps, check_attack, run_attack
from smart.progress import hidden
from smart.seeds import derive_seed, seeded
from smart_kernels.files import write_rows
from smart_kernels.paths import PATHS, resolve


class Evaluation(dict[str, dict[str, float]]):
    """Accuracies in [0, 1] by configuration and attack, ``table["adv"]["pgd20"]``; a lambda is written ``"0.25"``.

    Attributes:
        settings: what the numbers hold for: n_examples, eps, step, restarts, seed.
        losses: the mean cross-entropy in the same places, ``table.losses["adv"]["pgd20"]``.
        worst: by configuration, the share of images that withstand every attack, images transferred from another
            configuration included: each image counts with the attack that is worst for it.
        transfer: with ``transfer=True`` the whole matrix, ``table.transfer["pgd20"][attacked][evaluated]``.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings
        self.losses: dict[str, dict[str, float]] = {}
        self.worst: dict[str, float] = {}
        self.transfer: dict[str, dict[str, dict[str, float]]] = {}

    def rows(self) -> list[dict[str, Any]]:
        """One flat row a number: evaluated, attacked, attack, its steps, accuracy, and the settings."""
        matrix = self.transfer
        if not matrix:
            attacks = next(iter(self.values()), {})
            matrix = {attack: {name: {name: row[attack]} for name, row in self.items()} for attack in attacks}
        return [
            {
                "evaluated": evaluated,
                "attacked": attacked,
                "attack": attack,
                "steps": attack_steps(attack),
                "accuracy": accuracy,
                **self.settings,
            }
            for attack, by_attacked in matrix.items()
            for attacked, by_evaluated in by_attacked.items()
            for evaluated, accuracy in by_evaluated.items()
        ]

    def write_csv(self, path: str | Path) -> None:
        """Writes :meth:`rows`.

        Raises:
            OSError: the file cannot be written.
        """
        write_rows(path, self.rows())


def evaluate(
    model: nn.Module,
    data: ImageData | tuple[Tensor, Tensor],
    attacks: Sequence[str] = ("clean", "fgsm", "pgd20"),
    paths: Sequence[str] = PATHS,
    lambdas: Sequence[float] = (),
    eps: float = 8 / 255,
    step: float | None = None,
    restarts: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    transfer: bool = False,
    progress: bool = False,
    part: tuple[int, int] = (0, 1),
) -> Evaluation:
    """Measures every configuration (the paths, then the lambdas) under every attack; leaves the model as it was.

    Args:
        model: a two-path network on any device.
        data: its test split is used; or images (N, C, H, W), floats in [0, 1] or bytes, and labels (N,).
        attacks: ``"clean"`` (none); ``"fgsm"``; ``"pgd"`` and a number of steps, as in ``"pgd20"``, and if another loss
            than cross-entropy is to be raised, that, as in ``"pgd20-cw"`` (see :mod:`smart.attack_losses`);
            ``"square"`` and a number of queries, as in ``"square100"`` (black box, see :func:`smart.square`);
            ``"autoattack"``, or ``"apgd-ce"``, ``"apgd-t"``, ``"fab-t"`` of it (needs pyautoattack).
        eps, step: L-infinity radius and PGD step in units of the [0, 1] range; default step: eps / 4.
        restarts: of PGD. What is random in an attack depends on ``seed``, the attack and the batch, not on the
            configuration.
        transfer: also evaluate each configuration on the images that were made against each other one.
        part: (i, n) evaluates the i-th of every n batches alone; the accuracies and losses of all parts add up to those
            of the whole.

    Raises:
        ValueError: an unknown attack, path, or setting; no images.
        ImportError: AutoAttack is asked for and not installed.
    """
    images, labels = data.test if isinstance(data, ImageData) else data
    if not len(images):
        raise ValueError("there are no images to evaluate: give at least one")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}: give one for each of the {len(images)} images")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give at least 1")
    if step is None:
        step = eps / 4 or 1e-9
    check_settings(eps, step, 1, restarts)
    for name, given in (("attacks", attacks), ("paths", paths)):
        if isinstance(given, str):
            raise TypeError(f"{name} is {given!r}: give a list, [{given!r}]")
    attacks = list(dict.fromkeys(attacks))
    for attack in attacks:
        check_attack(attack)
    configurations: dict[str, str | float] = {str(p): resolve(p) for p in (*paths, *lambdas)}
    if not configurations or not attacks:
        raise ValueError("there is nothing to evaluate: give at least one path or lambda, and one attack")

    settings = {"n_examples": len(images), "eps": eps, "step": step, "restarts": restarts, "seed": seed}
    correct = {attack: {a: dict.fromkeys(configurations, 0) for a in configurations} for attack in attacks}
    losses = {name: dict.fromkeys(attacks, 0.0) for name in configurations}
    device = next(model.parameters()).device
    with seeded(seed, device):
        _check_labels(model, next(iter(configurations.values())), as_floats(images[:1].to(device)), labels)
    starts = range(part[0] * batch_size, len(images), part[1] * batch_size)
    mine = torch.zeros(len(images), dtype=torch.bool)
    for start in starts:
        mine[start : start + batch_size] = True
    withstood = {name: mine.clone() for name in configurations}
    bar = tqdm(
        total=len(attacks) * len(configurations) * len(starts),
        desc="evaluate",
        unit="batch",
        disable=hidden(progress),
    )
    with bar, eval_mode(model):
        for attack in attacks:
            for attacked, path in configurations.items():
                for start in starts:
                    x = as_floats(images[start : start + batch_size].to(device))
                    y = labels[start : start + batch_size].to(device)
                    batch_seed = derive_seed(seed, attack, start)
                    # Networks with noise in their weights draw it from the global state.
                    with seeded(batch_seed, device):
                        adv = run_attack(attack, model, x, y, path, eps, step, restarts, batch_seed)
                        for evaluated in configurations if transfer else (attacked,):
                            with torch.no_grad():
                                logits = model(adv, path=configurations[evaluated])
                            right = logits.argmax(1) == y
                            if evaluated == attacked:
                                losses[attacked][attack] += float(F.cross_entropy(logits.double(), y, reduction="sum"))
                            correct[attack][attacked][evaluated] += int(right.sum())
                            withstood[evaluated][start : start + batch_size] &= right.cpu()
                    bar.update()

    table = Evaluation(settings)
    for name in configurations:
        table[name] = {attack: correct[attack][name][name] / len(images) for attack in attacks}
        table.losses[name] = {attack: losses[name][attack] / len(images) for attack in attacks}
        table.worst[name] = float(withstood[name].double().mean())
    if transfer:
        table.transfer = {
            attack: {a: {e: count / len(images) for e, count in row.items()} for a, row in by_attacked.items()}
            for attack, by_attacked in correct.items()
        }
    return table


def _check_labels(model: nn.Module, path: Any, image: Tensor, labels: Tensor) -> None:
    """Raises ValueError where a label is no class of the model's."""
    with eval_mode(model), torch.no_grad():
        classes = model(image, path=path).shape[1]
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels range from {labels.min()} to {labels.max()}: the model has {classes} classes, "
            f"give 0 to {classes - 1}"
        )
