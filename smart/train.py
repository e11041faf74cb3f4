"""The training loop, one for all methods: what they share is here, what tells them apart in :mod:`smart.methods`."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smart.attacks import pgd
from smart.checkpoint import save_checkpoint
from smart.config import TrainConfig
from smart.costs import nonzeros
from smart.data import ImageData, batches
from smart.evaluate import evaluate
from smart.fit import check_fit
from smart.global_norms import global_norms
from smart.lambdas import Lambdas
from smart.layers import SmartNet
from smart.methods import Batch, check_dial, find_method
from smart.numerics import autocast, deterministic, memory_format
from smart.objectives import SmartLoss
from smart.progress import Progress, TensorBoard
from smart.rewire import Rewirer, check_method
from smart.runs import RunFolder
from smart.seeds import derive_seed, seeded
from smart.share import Share
from smart.train_result import TrainResult
from smart.training_state import load_state, save_state
from smart_kernels import patterns

__all__ = ["TrainConfig", "TrainResult", "train"]


def train(
    model: SmartNet,
    data: ImageData,
    config: TrainConfig | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    overwrite: bool = False,
    tensorboard: bool = False,
    command: str | None = None,
) -> TrainResult:
    """Trains ``model`` in place, on its device, by the method it was made for; it ends in eval mode.

    Its weights are then those of the last epoch.

    All randomness follows from the config's seed and the epoch, so a run resumed after any finished epoch gives, on the
    same machine, the numbers of one that was never stopped. On Ctrl-C, KeyboardInterrupt goes on to the caller and the
    folder can be resumed.

    Where torch has a process group, as under torchrun, its processes share each batch (see :mod:`smart.share`) and norm
    by the whole of it; all of them must call this with equal arguments, on a model on their own device. The first one
    writes, and every one returns the same.

    Args:
        out: run folder for config.json, log.csv, best.safetensors and last.safetensors; None keeps nothing on disk.
        resume: go on from the last finished epoch in ``out``; ``model`` must be made as for the first start.
        progress: show a progress bar with the time left, or where stderr is no terminal a line for each epoch.
        overwrite: start anew in a folder that holds a run.
        tensorboard: write the log for TensorBoard, too, into ``out``.
        command: that started this, for config.json.

    Raises:
        ValueError: data that does not fit the model; resuming with other settings; a damaged checkpoint.
        FileExistsError, FileNotFoundError: ``out`` holds a run, or none to resume.
        OSError: ``out`` cannot be written. ImportError: TensorBoard is not installed.
        RuntimeError: the loss, or a weight, is no longer finite; the folder keeps the last good epoch. Or processes
            differ.
    """
    config = config or TrainConfig()
    check_fit(model, data)
    check_method(config.rewire, config.redistribute, patterns.parse(model.pattern))
    check_dial(model.method, config.dial)
    if (resume or tensorboard) and out is None:
        raise ValueError(f"{'resume' if resume else 'tensorboard'} needs the run folder: give out")
    share = Share.current()
    share.check_batch(min(config.batch_size, len(data.train[0])))
    folder = RunFolder(out) if out is not None else None
    if folder is not None and resume:
        folder.check_same(config, model.spec, data.name)
    elif folder is not None:
        about = {"command": command, "device": str(model.mean.device), "processes": share.size}
        share.lead(lambda: folder.start(config, model.spec, data.name, overwrite, data.image_shape, about))
    with ExitStack() as stack:
        stack.enter_context(deterministic(config.deterministic))
        layout = stack.enter_context(memory_format(model, config.channels_last))
        if share.size > 1:
            stack.enter_context(global_norms(model))
        run = _Run(model, data, config, folder, share, layout)
        if run.rewirer is not None:
            stack.callback(run.rewirer.close)
        if resume:
            run.restore()
        if tensorboard and share.leads and folder is not None:
            run.tensorboard = TensorBoard(folder.path, len(run.history))
            stack.callback(run.tensorboard.close)
        run.epochs(progress and share.leads)
    model.eval()
    if folder is None:
        return TrainResult(run.history, run.best, best_state=run.best_state)
    share.lead(lambda: folder.write_log(run.history))
    return TrainResult(run.history, run.best, folder.path, folder.log, folder.best, folder.last)


class _Run:
    """The state of a run between epochs."""

    def __init__(
        self,
        model: SmartNet,
        data: ImageData,
        config: TrainConfig,
        folder: RunFolder | None,
        share: Share,
        layout: torch.memory_format,
    ) -> None:
        self.model, self.data, self.config, self.folder = model, data, config, folder
        self.share, self.layout = share, layout
        self.tensorboard: TensorBoard | None = None
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

    def epochs(self, shown: bool) -> None:
        """Trains the epochs that are left."""
        done, total = len(self.history), self.config.epochs
        tensors = [*self.model.state_dict().values(), self.labels]
        self.share.check_same("the model, its data or the config", tensors, str(self.config))
        with Progress(shown, total, self.steps, done) as progress:
            for epoch in range(done, total):
                self.epoch(epoch, progress)

    def epoch(self, epoch: int, progress: Progress) -> None:
        """Trains one epoch (from 0), checks it on the validation split, and saves it."""
        started = time.perf_counter()
        self.model.train()
        config = self.config
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "epoch", epoch))
        totals = torch.zeros(len(SmartLoss._fields))
        rate = 0.0
        # Dropout draws from the global state, in each process its own. So does noise on weights, which are one.
        own = [self.share.rank] if self.share.rank and not self.method.noise else []
        with seeded(derive_seed(config.seed, "dropout", epoch, *own), self.device):
            loader = batches(self.images, self.labels, config.batch_size, generator, config.crop_padding, config.flip)
            for i, (x, y) in enumerate(loader):
                step = epoch * self.steps + i
                rate = self._rewire_if_due(step, rate)
                x, y = self.share.take(x).contiguous(memory_format=self.layout), self.share.take(y)
                losses = self._step(x, y, step, generator, f"epoch {epoch + 1}, step {i + 1} of {self.steps}")
                totals += losses
                named = dict(zip(SmartLoss._fields, losses.tolist(), strict=True))
                progress.step(epoch + 1, {"clean": named["clean_loss"], "adv": named["adv_loss"]})
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise self._diverged(f"after the last step of epoch {epoch + 1} {name} is not finite")
        self._agree(f"the network after epoch {epoch + 1}")
        means = dict(zip(SmartLoss._fields, (totals / self.steps).tolist(), strict=True))
        row = {"lr": self.optimizer.param_groups[0]["lr"], **means, **self._validate(), "prune_rate": rate}
        counts = nonzeros(self.model)
        row.update({f"density_{key}": counts[key] / counts["dense"] for key in ("clean", "adv", "union")})
        rounded = {key: None if math.isnan(value) else round(value, 6) for key, value in row.items()}
        seconds = self.share.lead(lambda: round(time.perf_counter() - started, 2))
        self._finish({"epoch": epoch + 1, **rounded, "seconds": seconds})
        progress.epoch(self.history[-1])

    def _agree(self, what: str) -> None:
        """Sees to it that all processes know all gradients, and checks that they have one network."""
        if self.rewirer is not None:
            # What it remembers is a mean of gradients: the mean over processes may as well be taken at the end.
            self.share.average(self.rewirer.state_dict().values())
        self.share.check_same(what, list(self.model.state_dict().values()))

    def _rewire_if_due(self, step: int, rate: float) -> float:
        """Rewires before a step at which it is due; returns the prune rate used last in this epoch.

        Rewiring opens an epoch rather than closing one: so what is validated and saved has been trained since.
        """
        every = self.config.rewire_every * (self.steps if self.config.rewire_unit == "epochs" else 1)
        if self.rewirer is None or step == 0 or step % every:
            return rate
        progress = step / (self.config.epochs * self.steps)
        self._agree(f"the network before step {step + 1}")
        self.rewirer.rewire(progress)
        return self.rewirer.rate(progress)

    def _step(self, x: Tensor, y: Tensor, step: int, generator: torch.Generator, place: str) -> Tensor:
        """Trains on this process's images of a batch; returns the numbers of a SmartLoss, of the whole batch."""
        config = self.config
        if config.lr_schedule == "cosine":
            lr = 0.5 * config.lr * (1 + math.cos(math.pi * step / (config.epochs * self.steps)))
            self.optimizer.param_groups[0]["lr"] = lr

        def start(x: Tensor) -> Tensor:
            draws = self.share.draw(lambda n: torch.rand(n, *x.shape[1:], generator=generator), len(x))
            return x + config.eps * (2 * draws.to(x.device) - 1)

        def attack(x: Tensor, y: Tensor, path: str | float | Lambdas, loss: str = "ce") -> Tensor:
            settings = config.eps, config.attack_step, config.attack_steps
            return pgd(self.model, x, y, path, *settings, loss=loss, start=start(x))

        with autocast(config.amp, self.device):
            outcome = self.method.loss(self.model, Batch(x, y, attack, step, generator, config, self.share))
        losses = torch.stack([part.detach().float() for part in outcome])
        self.share.average([losses])
        losses = losses.cpu()
        if not math.isfinite(losses[0]):
            raise self._diverged(f"the loss is {losses[0]} in {place}")
        self.optimizer.zero_grad(set_to_none=True)
        outcome.loss.backward()
        self.share.average(p.grad for p in self.model.parameters() if p.grad is not None)
        self.optimizer.step()
        if self.rewirer is not None:
            self.rewirer.after_step()
        return losses

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
        part = self.share.rank, self.share.size
        common = {"eps": config.eps, "step": config.attack_step, "seed": config.seed, "part": part}
        with autocast(config.amp, self.device):
            clean = evaluate(self.model, self.data.val, ["clean"], ["clean"], **common)
            adv = evaluate(self.model, self.data.val, [attack], ["adv"], **common)
        scores = torch.tensor([clean["clean"]["clean"], adv["adv"][attack]], dtype=torch.float64, device=self.device)
        self.share.average([scores])
        val_clean, val_adv = (scores * self.share.size).tolist()
        return {"val_clean": val_clean, "val_adv": val_adv}

    def _finish(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        # On a tie the later epoch has trained longer.
        is_best = not self.best or self._score(row) >= self._score(self.best)
        if is_best:
            self.best = row
        if self.folder is not None:
            self.share.lead(lambda: self._save(self.folder, row, is_best))
        elif is_best:
            self.best_state = {key: value.clone() for key, value in self.model.state_dict().items()}

    def _save(self, folder: RunFolder, row: dict[str, Any], is_best: bool) -> None:
        # `last` is what resuming goes by: an epoch that dies before it is written is simply trained again.
        extra = {"config": self.config.to_dict(), "epoch": row["epoch"], "metrics": row}
        if is_best:
            save_checkpoint(folder.best, self.model, extra)
        extra |= {"history": self.history, "best": self.best}
        save_state(folder.last, self.model, self.optimizer, self.rewirer, extra)
        folder.write_log(self.history)
        if self.tensorboard is not None:
            self.tensorboard.add(row)

    def restore(self) -> None:
        """Goes back to the last finished epoch in the run folder; without one, stays at the start."""
        assert self.folder is not None
        if self.folder.last.exists():
            metadata = load_state(self.folder.last, self.model, self.optimizer, self.rewirer)
            self.history, self.best = metadata["history"], metadata["best"]

    def _score(self, row: dict[str, Any]) -> float:
        return sum(row[name] for name in self.method.judged_by)
