"""Pictures of robustness: curves against the radius. They need matplotlib, as those of :mod:`smart.plots`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from smart.plots import ADV, CLEAN, picture
from smart.text import path_name

# Between the colours of the two paths.
DIAL = ("#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#8C8C8C")


def plot_curves(
    file: str | Path,
    curves: Mapping[str, Mapping[float, Mapping[str, float]]],
    title: str,
    trained: float | None = None,
) -> None:
    """Accuracy of each configuration against the radius of the attack.

    Args:
        curves: as :func:`smart.robustness_curves` gives them.
        trained: the radius that the network was trained for, drawn as a line.
    """
    # Radii are told in grey levels, as is customary, unless they are larger than levels are used for.
    levels = max(eps for points in curves.values() for eps in points) <= 64 / 255
    scale = 255 if levels else 1
    with picture(file, (6.4, 4.2), title) as figure:
        axes = figure.subplots()
        dial = iter(DIAL * len(curves))
        for name, points in curves.items():
            colour = {"clean": CLEAN, "adv": ADV}.get(name) or next(dial)
            heights = [100 * point["accuracy"] for point in points.values()]
            radii = [scale * eps for eps in points]
            axes.plot(radii, heights, color=colour, marker="o", markersize=4, label=path_name(name))
        if trained is not None:
            axes.axvline(scale * trained, color="#8C8C8C", linewidth=1, linestyle="--", label="radius of training")
        unit = "grey levels of 255" if levels else "parts of [0, 1]"
        axes.set(xlabel=f"L$_\\infty$ radius ({unit})", ylabel="test accuracy (%)", ylim=(0, 103))
        axes.grid(color="#E5E5E5")
        axes.legend()
