"""Expert paths: what a caller may ask for, and how the choice reaches the layers.

A network carries several *expert paths* (in SMART: ``"clean"`` and ``"adv"``) over shared weights. A call picks one by

* a name;
* a float lambda in [0, 1], the trade-off dial: 0 is ``"clean"``, 1 is ``"adv"``, between them the two are mixed;
* an integer tensor (N,) of 0/1 that picks a path for each sample of the batch;
* where the network is divided into stages, a sequence of one of the first two for each stage.

The choice belongs to the call. Inside one call it is kept in a thread-local, so layers of an ordinary network (whose
``forward`` knows nothing of paths) can read it, while other threads run other paths of the same model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

PATHS = ("clean", "adv")

_running = threading.local()

OnePath = str | float  # of a whole network, or of one of its stages
Path = OnePath | tuple[OnePath, ...]


def resolve(path: OnePath | Sequence[OnePath], names: Sequence[str] = PATHS, stages: int = 0) -> Path:
    """Checks a path of a whole batch; returns one of ``names``, a float strictly between 0 and 1, or a tuple of such.

    Args:
        stages: of the network; a sequence must have that length. One that says the same for all is no longer a tuple.

    Raises:
        ValueError: an unknown name, a number outside [0, 1], a sequence of another length.
        TypeError: neither a name nor a number.
    """
    if isinstance(path, (list, tuple)):
        if not stages or len(path) != stages:
            has = f"it has {stages} stages" if stages else "it has no stages"
            raise ValueError(f"path is {path!r}, a sequence of {len(path)}, one for each stage of the network: {has}")
        each = tuple(_resolve_one(one, names) for one in path)
        return each[0] if len(set(each)) == 1 else each
    return _resolve_one(path, names)


def _resolve_one(path: OnePath, names: Sequence[str]) -> OnePath:
    if isinstance(path, str):
        if path in names:
            return path
        raise ValueError(
            f"unknown path {path!r}: this network has {_listing(names)}; a lambda in [0, 1] is accepted too"
        )
    if isinstance(path, Real) and not isinstance(path, bool):
        if not 0.0 <= path <= 1.0:
            raise ValueError(
                f"lambda is {path}: it must lie in [0, 1], 0 for the clean path and 1 for the adversarial one"
            )
        if len(names) < 2 or path == 0:
            return names[0]
        return names[1] if path == 1 else float(path)
    raise TypeError(
        f"path is a {type(path).__name__}: give {_listing(names)}, a lambda in [0, 1], an integer tensor (N,) of 0 "
        "and 1, or a sequence of such names or lambdas, one for each stage"
    )


def _listing(names: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in names)


@contextmanager
def running(path: Path) -> Iterator[None]:
    """Makes ``path`` (already resolved) the one that layers of this thread see until the block ends."""
    outer = getattr(_running, "path", PATHS[0])
    _running.path = path
    try:
        yield
    finally:
        _running.path = outer


def current(stage: int = 0) -> OnePath:
    """What the call under way in this thread means for a layer of a stage; ``"clean"`` outside any call."""
    return at_stage(getattr(_running, "path", PATHS[0]), stage)


def at_stage(path: Path, stage: int) -> OnePath:
    """What a resolved path means for a layer of a stage, counted from 0."""
    return path[stage] if isinstance(path, tuple) else path


@dataclass(frozen=True, eq=False)
class Samples:
    """A path for each sample of a batch, as kernels take it that run all samples in one launch.

    Attributes:
        choice: (N,) int64 of 0 and 1.
        order: (N,) int32, the samples of the first path, then those of the second.
        first: (1,) int32, how many run on the first path.
    """

    choice: Tensor
    order: Tensor
    first: Tensor

    @classmethod
    def of(cls, choice: Tensor, x: Tensor) -> Samples:
        """Sorts the samples on the device, which nobody waits for.

        Args:
            choice: (N,) of 0 and 1.
            x: (N, ...), the batch.

        Raises:
            ValueError, TypeError: ``choice`` is not that. Other values on a GPU stop it with an assertion there.
        """
        _check_choice(choice, x)
        inside = ((choice == 0) | (choice == 1)).all()
        if choice.device.type == "cpu":
            if not inside:
                raise ValueError("path tensor holds values outside 0..1")
        else:
            torch._assert_async(inside)
        choice = choice.to(device=x.device, dtype=torch.long)
        order = torch.argsort(choice, stable=True).to(torch.int32)
        first = (len(choice) - choice.sum(0, keepdim=True)).to(torch.int32)
        return cls(choice, order, first)


def run_per_sample(
    run: Callable[[Tensor, str], Tensor], x: Tensor, choice: Tensor, names: Sequence[str] = PATHS
) -> Tensor:
    """Runs every sample on the path chosen for it, as one sub-batch a path: the cost is the sum of the two parts.

    Args:
        run: maps a batch (M, ...) and a path name to outputs (M, ...), or to any tuples or dicts of such.
        x: (N, ...).
        choice: (N,) of 0 and 1, an index into ``names``.

    Returns:
        Outputs (N, ...) in the order of ``x``.
    """
    groups = group_samples(choice, x, names)
    if len(groups) == 1:
        return run(x, groups[0][0])
    outputs = [run(x[rows], name) for name, rows in groups]
    return tree_map(lambda *parts: merge_samples(parts, groups) if isinstance(parts[0], Tensor) else parts[0], *outputs)


def group_samples(choice: Tensor, x: Tensor, names: Sequence[str] = PATHS) -> list[tuple[str, Tensor]]:
    """Splits a batch by path: pairs of a path name and the rows (M,) of ``x`` that run on it; at least one pair."""
    _check_choice(choice, x)
    choice = choice.to(device=x.device, dtype=torch.long)
    if choice.numel() and not 0 <= int(choice.min()) <= int(choice.max()) < len(names):
        raise ValueError(f"path tensor holds values outside 0..{len(names) - 1}, which stand for {_listing(names)}")
    groups = [(name, torch.nonzero(choice == i).flatten()) for i, name in enumerate(names)]
    return [(name, rows) for name, rows in groups if len(rows)] or [(names[0], choice)]


def _check_choice(choice: Tensor, x: Tensor) -> None:
    if choice.dim() != 1 or choice.shape[0] != x.shape[0]:
        raise ValueError(
            f"path tensor has shape {tuple(choice.shape)}: for a batch of {x.shape[0]} ({x.shape[0]},) is needed"
        )
    if choice.is_floating_point() or choice.is_complex():
        raise TypeError(
            f"path tensor has dtype {choice.dtype}: give integers or booleans, 0 for clean and 1 for adversarial"
        )


def merge_samples(outputs: Sequence[Tensor], groups: Sequence[tuple[str, Tensor]]) -> Tensor:
    """Puts the outputs of the groups of :func:`group_samples` back into the order of the batch."""
    order = torch.cat([rows for _, rows in groups])
    return torch.cat(list(outputs))[torch.argsort(order)]
