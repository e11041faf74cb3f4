"""The picture of a network's trade-off. It needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smart.plots import ADV, CLEAN, picture
from smart.text import attack_name, short

LOOKS = {
    "weights": ("#2B2B2B", "o", "lambda: weights mixed"),
    "first_stages": ("#009E73", "s", "stages: the first ones adversarial"),
    "last_stages": ("#CC79A7", "^", "stages: the last ones adversarial"),
}


def plot_trade_off(file: str | Path, rows: Sequence[Mapping[str, Any]], attack: str, title: str) -> None:
    """Accuracy without an attack against accuracy under it, a line for each dial; and beside it what each place costs.

    Args:
        rows: as :func:`smart.trade_off` gives them.
        attack: the one to draw, by name.
    """
    with picture(file, (9.6, 4.4), title) as figure:
        trade, cost = figure.subplots(1, 2, sharey=True)
        for dial, (colour, marker, label) in LOOKS.items():
            of_dial = sorted((row for row in rows if row["dial"] == dial), key=lambda row: row["position"])
            heights = [100 * row[attack] for row in of_dial]
            look = {"color": colour, "marker": marker, "markersize": 4}
            if of_dial:
                trade.plot([100 * row["clean"] for row in of_dial], heights, label=label, **look)
                cost.plot([row["macs"] for row in of_dial], heights, **look)
        for row in rows:
            if row["path"] in ("clean", "adv"):
                colour = CLEAN if row["path"] == "clean" else ADV
                trade.scatter(100 * row["clean"], 100 * row[attack], s=60, color=colour, zorder=3)
                cost.scatter(row["macs"], 100 * row[attack], s=60, color=colour, zorder=3)
        trade.set(xlabel="no attack: test accuracy (%)", ylabel=f"{attack_name(attack)}: test accuracy (%)")
        trade.set_title("Every dial from the clean path (blue) to the adversarial (red)")
        cost.set(xlabel="multiplications an image")
        cost.xaxis.set_major_formatter(lambda value, _: short(value) if value > 0 else "0")
        cost.set_title("What each position costs")
        trade.legend()
        for axes in (trade, cost):
            axes.grid(color="#E5E5E5")
            axes.margins(0.12)
