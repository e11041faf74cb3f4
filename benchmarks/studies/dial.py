"""The trade-off of one network: how it is at every position of each of its dials, and the table of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

import smart
from benchmarks.studies.cases import RECIPE, STUDIES
from benchmarks.studies.tables import Row, of_case, spread
from smart import ImageData, text
from smart.layers import SmartNet

ATTACK = "pgd20"
LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0)
NAMES = {"first_stages": "first {} adversarial", "last_stages": "last {} adversarial"}


def turn(model: SmartNet, data: ImageData, seed: int) -> list[dict[str, Any]]:
    """The rows of :func:`smart.trade_off`, without an attack and under ``ATTACK``, on the test images."""
    rows = smart.trade_off(model, data, attacks=("clean", ATTACK), lambdas=LAMBDAS, eps=RECIPE.eps, seed=seed)
    return [{**row, "path": list(row["path"]) if isinstance(row["path"], tuple) else row["path"]} for row in rows]


def markdown(results: Mapping[str, Any]) -> str:
    """A line a position: what each case of the study of dials is there."""
    runs = {case.name: of_case(results["rows"], case) for case in STUDIES["dial"].cases}
    heading = ["", *(f"{name}: no attack | attacked" for name in runs), "multiplications"]
    lines = [f"| {' | '.join(heading)} |", "|" + "---|" * (2 * len(runs) + 2)]
    for place in places(next(iter(runs.values()))[0]):
        cells = [spread(rows, at(place, what)) for rows in runs.values() for what in ("clean", ATTACK)]
        macs = mean(places(row)[place]["macs"] for rows in runs.values() for row in rows)
        lines.append(f"| {' | '.join([place, *cells, text.short(macs)])} |")
    return "\n".join(lines)


def at(place: str, what: str) -> Callable[[Row], float]:
    """The accuracy of a run at a position, ``"clean"`` or under ``ATTACK``, in percent."""
    return lambda row: 100 * places(row)[place][what]


def places(row: Row) -> dict[str, Mapping[str, Any]]:
    """The positions of a run by name, each once, from the clean path to the adversarial one."""
    turned: Sequence[Mapping[str, Any]] = row["dial"]
    ends = {each["path"]: each for each in turned if each["path"] in ("clean", "adv")}
    stages = len({each["position"] for each in turned if each["dial"] == "first_stages"}) - 1
    between = {_name(each, stages): each for each in turned if 0 < each["position"] < 1}
    return {"clean path": ends["clean"], **between, "adversarial path": ends["adv"]}


def _name(place: Mapping[str, Any], stages: int) -> str:
    if place["dial"] == "weights":
        return f"lambda {place['position']:g}"
    count = round(place["position"] * stages)
    return NAMES[place["dial"]].format("stage" if count == 1 else f"{count} stages")
