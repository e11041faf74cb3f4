"""The training loop, one for all methods: what they share is here, what tells them apart in :mod:`smart.methods`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from smart.attacks import pgd
from smart.checkpoint import CheckpointError, load_into, read_checkpoint, save_checkpoint
from smart.config import TrainConfig
from smart.costs import nonzeros
from smart.data import ImageData, batches
from smart.evaluate import evaluate
from smart.fit import check_fit
from smart.lambdas import Lambdas
from smart.layers import SmartNet
from smart.methods import Batch, check_dial, find_method
from smart.objectives import SmartLoss
from smart.rewire import Rewirer, check_method
from smart.runs import RunFolder
from smart.seeds import derive_seed, seeded
from smart_kernels import patterns

__all__ = ["TrainConfig", "TrainResult", "train"]


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


def train(
    model: SmartNet,
    data: ImageData,
    config: TrainConfig | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    overwrite: bool = False,
) -> TrainResult:
    """Trains ``model`` in place, on its device, by the method it was made for; it ends in eval mode.

    Its weights are then those of the last epoch.

    All randomness follows from the config's seed and the epoch, so a run resumed after any finished epoch gives, on the
    same machine, the numbers of one that was never stopped. On Ctrl-C, KeyboardInterrupt goes on to the caller and the
    folder can be resumed.

    Args:
        out: run folder for config.json, log.csv, best.safetensors and last.safetensors; None keeps nothing on disk.
        resume: go on from the last finished epoch in ``out``; ``model`` must be made as for the first start.
        progress: show a progress bar.
        overwrite: start anew in a folder that holds a run.

    Raises:
        ValueError: data that does not fit the model; resuming with other settings; a damaged checkpoint.
        FileExistsError, FileNotFoundError: ``out`` holds a run, or none to resume.
        OSError: ``out`` cannot be written.
        RuntimeError: the loss, or a weight, is no longer finite; the folder keeps the last good epoch.
    """
    config = config or TrainConfig()
    check_fit(model, data)
    check_method(config.rewire, config.redistribute, patterns.parse(model.pattern))
    check_dial(model.method, config.dial)
    if resume and out is None:
        raise ValueError("resume needs the run folder: give out")
    folder = RunFolder(out) if out is not None else None
    if folder is not None and resume:
        folder.check_same(config, model.spec, data.name)
    elif folder is not None:
        folder.start(config, model.spec, data.name, overwrite, data.image_shape)
    run = _Run(model, data, config, folder)
    try:
        if resume:
            run.restore()
        run.epochs(progress)
    finally:
        if run.rewirer is not None:
            run.rewirer.close()
    model.eval()
    if folder is None:
        return TrainResult(run.history, run.best, best_state=run.best_state)
    folder.write_log(run.history)
    return TrainResult(run.history, run.best, folder.path, folder.log, folder.best, folder.last)


class _Run:
    """The state of a run between epochs."""

    def __init__(self, model: SmartNet, data: ImageData, config: TrainConfig, folder: RunFolder | None) -> None:
        self.model, self.data, self.config, self.folder = model, data, config, folder
        self.method = find_method(model.method)
        self.device = model.mean.device
        self.images, self.labels = (tensor.to(self.device) for tensor in data.train)
        self.steps = max(1, len(self.images) // config.batch_size)
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.rewirer = self._new_rewirer() if self.method.masks else None
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.best_state: dict[str, Tensor] | None = None

    def _new_rewirer(self) -> Rewirer:
        config = self.config
        return Rewirer(
            self.model,
            self.optimizer,
            config.momentum,
            config.prune_rate,
            config.prune_schedule,
            config.rewire,
            config.redistribute,
            config.rewire_until,
        )

    def epochs(self, progress: bool) -> None:
        """Trains the epochs that are left."""
        done, total = len(self.history), self.config.epochs
        with tqdm(
            total=total * self.steps, initial=done * self.steps, desc="train", unit="step", disable=not progress
        ) as bar:
            for epoch in range(done, total):
                self.epoch(epoch, bar)

    def epoch(self, epoch: int, bar: tqdm) -> None:
        """Trains one epoch (from 0), checks it on the validation split, and saves it."""
        started = time.perf_counter()
        self.model.train()
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "epoch", epoch))
        totals = torch.zeros(len(SmartLoss._fields), device=self.device)
        rate = 0.0
        # Dropout, and noise on weights, draw from the global state.
        with seeded(derive_seed(self.config.seed, "dropout", epoch), self.device):
            loader = batches(
                self.images, self.labels, self.config.batch_size, generator, self.config.crop_padding, self.config.flip
            )
            for i, (x, y) in enumerate(loader):
                step = epoch * self.steps + i
                rate = self._rewire_if_due(step, rate)
                outcome = self._step(x, y, step, generator, f"epoch {epoch + 1}, step {i + 1} of {self.steps}")
                totals += torch.stack([part.detach() for part in outcome])
                bar.update()
                losses = {"clean": outcome.clean_loss.item(), "adv": outcome.adv_loss.item()}
                shown = {name: f"{value:.3f}" for name, value in losses.items() if not math.isnan(value)}
                bar.set_postfix(epoch=f"{epoch + 1}/{self.config.epochs}", **shown, refresh=False)
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise self._diverged(f"after the last step of epoch {epoch + 1} {name} is not finite")
        means = dict(zip(SmartLoss._fields, (totals / self.steps).tolist(), strict=True))
        row = {"lr": self.optimizer.param_groups[0]["lr"], **means, **self._validate(), "prune_rate": rate}
        counts = nonzeros(self.model)
        row.update({f"density_{key}": counts[key] / counts["dense"] for key in ("clean", "adv", "union")})
        rounded = {key: None if math.isnan(value) else round(value, 6) for key, value in row.items()}
        self._finish({"epoch": epoch + 1, **rounded, "seconds": round(time.perf_counter() - started, 2)})

    def _rewire_if_due(self, step: int, rate: float) -> float:
        """Rewires before a step at which it is due; returns the prune rate used last in this epoch.

        Rewiring opens an epoch rather than closing one: so what is validated and saved has been trained since.
        """
        every = self.config.rewire_every * (self.steps if self.config.rewire_unit == "epochs" else 1)
        if self.rewirer is None or step == 0 or step % every:
            return rate
        progress = step / (self.config.epochs * self.steps)
        self.rewirer.rewire(progress)
        return self.rewirer.rate(progress)

    def _step(self, x: Tensor, y: Tensor, step: int, generator: torch.Generator, place: str) -> SmartLoss:
        config = self.config
        if config.lr_schedule == "cosine":
            lr = 0.5 * config.lr * (1 + math.cos(math.pi * step / (config.epochs * self.steps)))
            self.optimizer.param_groups[0]["lr"] = lr

        def attack(x: Tensor, y: Tensor, path: str | float | Lambdas, loss: str = "ce") -> Tensor:
            settings = config.eps, config.attack_step, config.attack_steps
            return pgd(self.model, x, y, path, *settings, generator=generator, loss=loss)

        outcome = self.method.loss(self.model, Batch(x, y, attack, step, generator, config))
        if not bool(outcome.loss.isfinite()):
            raise self._diverged(f"the loss is {outcome.loss.item()} in {place}")
        self.optimizer.zero_grad(set_to_none=True)
        outcome.loss.backward()
        self.optimizer.step()
        if self.rewirer is not None:
            self.rewirer.after_step()
        return outcome

    def _diverged(self, what: str) -> RuntimeError:
        kept = "no epoch was kept"
        if self.history and self.folder is not None:
            kept = f"{self.folder.last} keeps epoch {self.history[-1]['epoch']}"
        return RuntimeError(
            f"{what}; {kept}: lower lr (now {self.config.lr:g}) and start again, or check the images for extreme values"
        )

    def _validate(self) -> dict[str, float]:
        config = self.config
        attack = f"pgd{config.val_attack_steps}"
        common = {"eps": config.eps, "step": config.attack_step, "seed": config.seed}
        clean = evaluate(self.model, self.data.val, ["clean"], ["clean"], **common)
        adv = evaluate(self.model, self.data.val, [attack], ["adv"], **common)
        return {"val_clean": clean["clean"]["clean"], "val_adv": adv["adv"][attack]}

    def _finish(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        # On a tie the later epoch has trained longer.
        is_best = not self.best or self._score(row) >= self._score(self.best)
        if is_best:
            self.best = row
        if self.folder is None:
            if is_best:
                self.best_state = {key: value.clone() for key, value in self.model.state_dict().items()}
            return
        # `last` is what resuming goes by: an epoch that dies before it is written is simply trained again.
        extra = {"config": self.config.to_dict(), "epoch": row["epoch"], "metrics": row}
        if is_best:
            save_checkpoint(self.folder.best, self.model, extra)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        velocity = {
            names[parameter]: state["momentum_buffer"]
            for parameter, state in self.optimizer.state.items()
            if state.get("momentum_buffer") is not None
        }
        tensors = {"optimizer": velocity, "rewirer": self.rewirer.state_dict() if self.rewirer is not None else {}}
        save_checkpoint(self.folder.last, self.model, {**extra, "history": self.history, "best": self.best}, tensors)
        self.folder.write_log(self.history)

    def restore(self) -> None:
        """Goes back to the last finished epoch in the run folder; without one, stays at the start."""
        assert self.folder is not None
        if not self.folder.last.exists():
            return
        metadata, groups = read_checkpoint(self.folder.last)
        if "history" not in metadata:
            raise CheckpointError(
                f"{self.folder.last} holds no training state: resume from the last.safetensors of a run"
            )
        load_into(self.model, self.folder.last)
        parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        for name, buffer in groups.get("optimizer", {}).items():
            parameter = parameters[name]
            self.optimizer.state[parameter]["momentum_buffer"] = buffer.to(parameter.device)
        if self.rewirer is not None:
            self.rewirer.load_state_dict(groups.get("rewirer", {}))
        self.history, self.best = metadata["history"], metadata["best"]

    def _score(self, row: dict[str, Any]) -> float:
        return sum(row[name] for name in self.method.judged_by)
