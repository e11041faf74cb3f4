"""The trade-off between accuracy and robustness of one trained network: every dial it has, at every position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from smart.costs import alive_at, macs_at
from smart.data import ImageData
from smart.evaluate import evaluate
from smart.layers import SmartNet
from smart.progress import hidden
from smart_kernels.files import write_rows
from smart_kernels.paths import Path as ExpertPath
from smart_kernels.paths import resolve

# What is turned: lambda, or how many stages run on the adversarial path, from the first or from the last on.
DIALS = ("weights", "first_stages", "last_stages")
LAMBDAS = tuple(i / 10 for i in range(11))


@dataclass(frozen=True)
class Position:
    """A dial at a position from 0, clean, to 1, adversarial; the model is called with ``path``."""

    dial: str
    at: float
    path: ExpertPath


class TradeOff(list[dict[str, Any]]):
    """A row for each position of each dial.

    Keys: dial, position, path, the accuracy in [0, 1] under each attack by its name, macs and nonzeros (of one image
    and of the convolutions, on that path).

    Attributes:
        settings: what they hold for: n_examples, eps, step, restarts, seed.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings

    def write_csv(self, path: str | Path) -> None:
        """Writes the rows, with the settings in each.

        Raises:
            OSError: the file cannot be written.
        """
        rows = [{**row, "path": _word(row["path"]), **self.settings} for row in self]
        write_rows(path, rows)


def positions(
    model: SmartNet, dials: Sequence[str] | None = None, lambdas: Sequence[float] = LAMBDAS
) -> list[Position]:
    """Where the dials can stand.

    Args:
        dials: of ``DIALS``; default: all that the network has, those by stage if it has stages.
        lambdas: of the dial ``"weights"``.

    Raises:
        ValueError: an unknown dial, or one by stage of a network without stages; a lambda outside [0, 1].
    """
    if dials is None:
        dials = DIALS if model.stages else DIALS[:1]
    found = []
    for dial in dials:
        if dial not in DIALS:
            raise ValueError(f"unknown dial {dial!r}: accepted are {', '.join(DIALS)}")
        if dial == "weights":
            found += [Position(dial, float(at), resolve(at)) for at in sorted({float(at) for at in lambdas})]
            continue
        if not model.stages:
            raise ValueError(f"dial is {dial!r}: this network has no stages, take 'weights', or convert it with stages")
        for count in range(model.stages + 1):
            path = ["adv"] * count + ["clean"] * (model.stages - count)
            path = path if dial == "first_stages" else path[::-1]
            found.append(Position(dial, count / model.stages, resolve(path, stages=model.stages)))
    return found


def trade_off(
    model: SmartNet,
    data: ImageData | tuple[Tensor, Tensor],
    attacks: Sequence[str] = ("clean", "pgd20"),
    dials: Sequence[str] | None = None,
    lambdas: Sequence[float] = LAMBDAS,
    eps: float = 8 / 255,
    step: float | None = None,
    restarts: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> TradeOff:
    """Measures every position of the dials; each is attacked itself, with what is random in an attack the same for all.

    Args:
        dials, lambdas: as for :func:`positions`.
        attacks, eps, step, restarts, batch_size, seed: as for :func:`smart.evaluate`.

    Raises:
        ValueError: as for :func:`positions` and :func:`smart.evaluate`.
    """
    images = (data.test if isinstance(data, ImageData) else data)[0]
    places = positions(model, dials, lambdas)
    convs = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    table: TradeOff | None = None
    measured: dict[ExpertPath, dict[str, Any]] = {}
    for path in tqdm(
        dict.fromkeys(place.path for place in places), desc="dial", unit="place", disable=hidden(progress)
    ):
        at_path = evaluate(
            _Fixed(model, path), data, attacks, ["clean"], (), eps, step, restarts, batch_size=batch_size, seed=seed
        )
        table = TradeOff(at_path.settings) if table is None else table
        cost = macs_at(model, images.shape[1:], path), sum(alive_at(conv, path) for conv in convs)
        measured[path] = {**at_path["clean"], "macs": cost[0], "nonzeros": cost[1]}
    if table is None:
        raise ValueError("there is no position to measure: give at least one lambda")
    table += [{"dial": p.dial, "position": p.at, "path": p.path, **measured[p.path]} for p in places]
    return table


class _Fixed(nn.Module):
    """A network at one position, for code that knows of two paths only."""

    def __init__(self, model: SmartNet, path: ExpertPath) -> None:
        super().__init__()
        self.model, self.path = model, path

    def forward(self, x: Tensor, path: object = None) -> Tensor:
        return self.model(x, path=self.path)


def _word(path: ExpertPath) -> str:
    """A path as text: ``"adv"``, ``"0.5"``, ``"adv,clean,clean"``."""
    return ",".join(map(str, path)) if isinstance(path, tuple) else str(path)
