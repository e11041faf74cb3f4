"""Pictures of robustness: curves against the radius, runs beside each other. They need matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smart.plots import ADV, CLEAN, picture
from smart.text import path_name, short

# Between the colours of the two paths.
DIAL = ("#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#8C8C8C")
# Runs, told apart by colour, and after eight by form.
RUNS = (CLEAN, ADV, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C", "#2B2B2B")
MARKERS = ("o", "s", "^", "D", "v")


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


def plot_comparison(file: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Robustness of runs against what it costs: clean accuracy, non-zero weights, multiplications of the attacked path.

    Args:
        rows: as :func:`smart.compare.compare_runs` gives them; a number that is None is left out of its panel.
    """
    costs = {
        "clean": ("clean path, no attack (%)", 100.0),
        "nonzeros_union": ("non-zero weights of both paths", 1.0),
        "macs_adv": ("multiplications, adversarial path", 1.0),
    }
    title = "Robustness of the adversarial path, and what it costs"
    with picture(file, (10.8, 4.4), title) as figure:
        panels = figure.subplots(1, len(costs), sharey=True)
        for panel, (key, (label, scale)) in zip(panels, costs.items(), strict=True):
            for i, row in enumerate(rows):
                if row[key] is not None:
                    colour, marker = RUNS[i % len(RUNS)], MARKERS[i // len(RUNS) % len(MARKERS)]
                    place = scale * row[key], 100 * row["robust"]
                    panel.scatter(*place, s=60, color=colour, marker=marker, label=row["run"])
            panel.set_xlabel(label)
            panel.grid(color="#E5E5E5")
            panel.margins(0.15)
            if scale == 1:
                # From nothing: half the cost is half the way.
                panel.set_xlim(left=0)
                panel.xaxis.set_major_formatter(lambda value, _: short(value) if value > 0 else "0")
        attacks = {row["attack"] for row in rows}
        panels[0].set_ylabel(
            f"adversarial path under {attacks.pop()} (%)" if len(attacks) == 1 else "adversarial path, attacked (%)"
        )
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(rows)))
