"""Whether a swapped network still answers as its original does: logits, predictions, and both under attack."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import smart_kernels
from smart import text
from smart.attacks import check_images, check_settings, pgd
from smart.black_box import square
from smart.layers import SmartNet
from smart.modes import eval_mode
from smart.seeds import derive_seed
from smart.twin import DenseTwin
from smart_kernels.model import SparseModel
from smart_kernels.paths import resolve
from smart_kernels.verify import TOLERANCE, relative_error, run_original

# A black-box attack decides by comparing logits, query after query. One comparison that rounding turns leads it
# elsewhere, so two attacks on the same function need not fool the same images: correct answers may differ by this share
# of all images, or by ALLOWED_IMAGES. Images made once and shown to both networks are judged one by one instead.
ALLOWED_SHARE = 0.05
ALLOWED_IMAGES = 2


@dataclass(frozen=True)
class Row:
    """Both networks on one path under one attack.

    Attributes:
        path, attack: as for :func:`smart.evaluate`, such as ``"adv"`` and ``"pgd20"``.
        images: how many.
        dense_accuracy, sparse_accuracy: in [0, 1], None without labels. PGD's images are made through the dense
            network and shown to both; Square attacks each network on its own.
        dense_accuracy_on_same: of the dense network on the images that were shown to the swapped one.
        differ: on those, the predictions of the two networks that differ.
        unexplained: those among them that rounding within the tolerance cannot explain.
        max_rel_error: on those, of the logits, max |difference| / max |logit|.
    """

    path: str
    attack: str
    images: int
    dense_accuracy: float | None
    sparse_accuracy: float | None
    dense_accuracy_on_same: float | None
    differ: int
    unexplained: int
    max_rel_error: float

    def disagreement(self, tolerance: float) -> str | None:
        """The gravest thing that is not as it should be, as a clause; None if the networks agree."""
        where = f"path {self.path!r} under {text.attack_name(self.attack)}"
        if self.unexplained:
            return f"{where}: {self.unexplained} of {self.images} predictions differ beyond rounding"
        if not self.max_rel_error <= tolerance:
            return f"{where}: logits differ by {self.max_rel_error:.2e}, where {tolerance:.0e} is accepted"
        if self.dense_accuracy is not None:
            allowed = max(ALLOWED_IMAGES, math.ceil(ALLOWED_SHARE * self.images))
            dense, sparse = (round(accuracy * self.images) for accuracy in (self.dense_accuracy, self.sparse_accuracy))
            if abs(dense - sparse) > allowed:
                return (
                    f"{where}: of {self.images} images the dense network answers {dense} rightly, the swapped one "
                    f"{sparse}, where a difference of {allowed} is accepted"
                )
        return None


@dataclass(frozen=True)
class Verification:
    """What :func:`verify_robustness` found.

    Attributes:
        errors: largest relative error of the clean images' logits by path, from :func:`smart_kernels.verify`.
        rows: one for each path and attack.
        settings: what they hold for: n_examples, eps, step, steps, queries, seed, tolerance.
    """

    errors: dict[str, float]
    rows: list[Row]
    settings: dict[str, Any]

    def disagreements(self) -> list[str]:
        """What is not as it should be, a clause for each row; empty if the networks agree."""
        return [clause for row in self.rows if (clause := row.disagreement(self.settings["tolerance"]))]

    def check(self) -> None:
        """Raises smart_kernels.VerificationError unless the networks agree."""
        if found := self.disagreements():
            raise smart_kernels.VerificationError(
                f"the swapped network does not answer as the original: {'; '.join(found)} (sparse.report() lists its "
                "backends, please report this)"
            )

    def table(self) -> str:
        """A line for each path and attack, accuracies in percent."""
        lines = [["path", "attack", "dense", "swapped", "predictions that differ"]]
        for row in self.rows:
            accuracies = (
                "-" if accuracy is None else f"{100 * accuracy:.1f} %"
                for accuracy in (row.dense_accuracy, row.sparse_accuracy)
            )
            lines.append([text.path_name(row.path), text.attack_name(row.attack), *accuracies, str(row.differ)])
        return text.align(lines, left=2)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: settings, logits' errors, rows, disagreements."""
        rows = [asdict(row) for row in self.rows]
        return {**self.settings, "max_rel_error": self.errors, "rows": rows, "disagreements": self.disagreements()}


def verify_robustness(
    model: nn.Module,
    sparse: SparseModel,
    images: Tensor,
    labels: Tensor | None,
    eps: float = 8 / 255,
    step: float | None = None,
    steps: int = 20,
    queries: int = 100,
    paths: Sequence[str | float] | None = None,
    seed: int = 0,
    batch: int = 256,
    tolerance: float | None = None,
    strict: bool = True,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> Verification:
    """Compares a swapped network with its original: logits, predictions, and accuracy under a white and a black box.

    PGD needs gradients, which the swapped network does not have: its images are made through the dense twin of the path
    and shown to both networks. The Square Attack asks for logits only, so it attacks both directly, with the same
    seeds; the images that it made against the swapped network are shown to the dense one as well. A prediction may
    differ only where the dense network's own lead is within twice the tolerance, relative to the largest logit.

    Args:
        model: the original; left as it was.
        sparse: what :func:`smart_kernels.swap` made of it, on the same device.
        images: (N, C, H, W), float in [0, 1], on any device.
        labels: (N,), integers; None compares logits and predictions only.
        eps, step: L-infinity radius and PGD step in units of the [0, 1] range; default step: eps / 4.
        steps: of PGD; 0 leaves PGD out.
        queries: of the Square Attack; 0 leaves it out.
        paths: names of paths, or lambdas in [0, 1]; default: all of the network's named paths.
        seed: of the attacks, which are those of :func:`smart.evaluate` with this seed and batch size.
        batch: images that run at once.
        tolerance: the largest relative error of logits accepted; default: as for :func:`smart_kernels.verify`.
        strict: raise where answers disagree; False leaves that to :meth:`Verification.check`. Logits of ``images`` that
            disagree always raise.
        progress: wraps the list of what is to be run, as tqdm does.

    Raises:
        VerificationError: the networks disagree; the message names path, attack and how many images.
        ValueError: no images or labels for them, images outside [0, 1], an unknown path or setting.
    """
    if step is None:
        step = eps / 4 or 1e-9
    _check(images, labels, eps, step, steps, queries, batch)
    if tolerance is None:
        tolerance = max(TOLERANCE.get(_dtype(net), TOLERANCE[torch.float32]) for net in (model, sparse))
    attacks = ["clean"]
    if labels is not None:
        attacks += [f"{name}{count}" for name, count in (("pgd", steps), ("square", queries)) if count]
    pairs = {
        str(path): _Pair(model, sparse, path, eps, step, steps, queries)
        for path in (resolve(path, sparse.paths) for path in paths or sparse.paths)
    }
    device = next(model.parameters()).device
    starts = range(0, len(images), batch)
    errors: dict[str, float] = {}
    for start in starts:
        found = smart_kernels.verify(model, sparse, images[start : start + batch].to(device), tolerance)
        errors = {path: max(error, errors.get(path, 0.0)) for path, error in found.items()}

    work = [(path, attack, start) for path in pairs for attack in attacks for start in starts]
    answers: dict[tuple[str, str], list[tuple[Tensor, ...]]] = {(path, attack): [] for path, attack, _ in work}
    with eval_mode(model):
        for path, attack, start in progress(work) if progress else work:
            x = images[start : start + batch].to(device)
            y = labels[start : start + batch].to(device) if labels is not None else None
            answers[path, attack].append(pairs[path].answer(attack, x, y, derive_seed(seed, attack, start)))
    rows = [
        _row(*key, *(torch.cat(logits).cpu() for logits in zip(*batches, strict=True)), labels, tolerance)
        for key, batches in answers.items()
    ]
    settings = {"n_examples": len(images), "eps": eps, "step": step, "steps": steps, "queries": queries}
    verification = Verification(errors, rows, {**settings, "seed": seed, "tolerance": tolerance})
    if strict:
        verification.check()
    return verification


class _Pair:
    """Both networks on one path, and the attacks on them."""

    def __init__(
        self,
        model: nn.Module,
        sparse: SparseModel,
        path: str | float,
        eps: float,
        step: float,
        steps: int,
        queries: int,
    ) -> None:
        self.path = path
        self.dense = _Dense(model, path)
        dtype = _dtype(sparse)
        self.sparse = lambda x, path: sparse(x.to(dtype), path=path)
        self.pgd = partial(pgd, eps=eps, step=step, steps=steps)
        self.square = partial(square, eps=eps, queries=queries)

    def answer(self, attack: str, x: Tensor, y: Tensor | None, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, classes) of a batch under attack: dense and swapped on the same images, dense on its own."""
        same = own = x
        if attack.startswith("pgd"):
            same = own = self.pgd(self.dense, x, y, self.path, generator=torch.Generator().manual_seed(seed))
        elif attack.startswith("square"):
            same, own = (
                self.square(network, x, y, self.path, generator=torch.Generator().manual_seed(seed))
                for network in (self.sparse, self.dense)
            )
        with torch.no_grad():
            dense = self.dense(same, path=self.path)
            own_dense = dense if own is same else self.dense(own, path=self.path)
            return dense, self.sparse(same, path=self.path), own_dense


class _Dense(nn.Module):
    """The original on one path, called as a two-path network is; with the masks multiplied in once if it has any."""

    def __init__(self, model: nn.Module, path: str | float) -> None:
        super().__init__()
        self.net = DenseTwin(model, path) if isinstance(model, SmartNet) and isinstance(path, str) else model

    def forward(self, x: Tensor, path: str | float) -> Tensor:
        return run_original(self.net, x, path)


def _row(
    path: str, attack: str, dense: Tensor, sparse: Tensor, own: Tensor, labels: Tensor | None, tolerance: float
) -> Row:
    """Judges logits (N, classes) of all images: both networks' on the same images, the dense one's on its own."""
    theirs, ours = dense.argmax(1, keepdim=True), sparse.argmax(1, keepdim=True)
    # Of the class that the dense network chose over the one that the swapped one chose; both may be off by a tolerance.
    lead = (dense.gather(1, theirs) - dense.gather(1, ours)).double()
    explained = lead <= 2 * tolerance * dense.abs().max().double()
    differ = theirs != ours
    accuracies = (
        None if labels is None else float((logits.argmax(1) == labels.cpu()).double().mean())
        for logits in (own, sparse, dense)
    )  # fmt: skip
    return Row(
        path,
        attack,
        len(dense),
        *accuracies,
        differ=int(differ.sum()),
        unexplained=int((differ & ~explained).sum()),
        max_rel_error=relative_error(sparse, dense),
    )


def _dtype(net: nn.Module) -> torch.dtype:
    """What a network computes in."""
    tensors = (*net.parameters(), *net.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


def _check(
    images: Tensor, labels: Tensor | None, eps: float, step: float, steps: int, queries: int, batch: int
) -> None:
    if not len(images):
        raise ValueError("there are no images to compare on: give at least one")
    check_settings(eps, step, 1, 1)
    for name, value, least in (("steps", steps, 0), ("queries", queries, 0), ("batch", batch, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}: give an integer of at least {least}")
    if labels is not None:
        check_images(images, labels)
