"""Pictures of the studies. They need matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks.studies import dial
from benchmarks.studies.cases import STUDIES
from benchmarks.studies.tables import Row, clean_accuracy, measured, of_case, robust_accuracy
from smart.plots import ADV, CLEAN, picture
from smart.plots_dial import LOOKS
from smart.plots_robustness import MARKERS, RUNS
from smart.text import attack_name, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of a path as it is meant to be used: what is measured, and how it is drawn.
GOALS = {
    "clean path, no attack": (clean_accuracy("clean"), CLEAN),
    "adversarial path, attacked": (robust_accuracy("adv"), ADV),
}


def plot_trade_off(file: str | Path, results: Mapping[str, Any], study: str, comment: str | None = None) -> None:
    """Robustness of the cases of a study against clean accuracy, weights and multiplications; a dot for each seed."""
    robust = robust_accuracy("adv")
    costs: dict[str, Callable[[Row], float]] = {
        "clean path, no attack (%)": clean_accuracy("clean"),
        "weights of both paths": lambda row: row["nonzeros"]["union"],
        "multiplications, adversarial path": lambda row: row["macs"]["adv"],
    }
    title = f"{STUDIES[study].title}: each seed, and the mean"
    with picture(file, (10.8, 4.4), title, comment) as figure:
        panels = figure.subplots(1, len(costs), sharey=True)
        for panel, (label, cost) in zip(panels, costs.items(), strict=True):
            for i, case in enumerate(STUDIES[study].cases):
                if runs := of_case(results["rows"], case):
                    look = {"color": RUNS[i % len(RUNS)], "marker": MARKERS[i % len(MARKERS)], "linewidths": 0}
                    places = [cost(row) for row in runs], [robust(row) for row in runs]
                    panel.scatter(*places, s=16, alpha=0.45, **look)
                    panel.scatter(*map(mean, places), s=70, label=case.name, **look)
            panel.set_xlabel(label)
            panel.grid(color="#E5E5E5")
            panel.margins(0.12)
            if not label.endswith("(%)"):
                # From nothing: half the cost is half the way.
                panel.set_xlim(left=0)
                panel.xaxis.set_major_formatter(lambda value, _: short(value) if value > 0 else "0")
        panels[0].set_ylabel("adversarial path, attacked (%)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)


def plot_choices(
    file: str | Path, results: Mapping[str, Any], studies: Sequence[str], comment: str | None = None
) -> None:
    """What each case of some studies gives on the two paths: a dot for each seed, a line at the mean.

    Studies that have not been run are left out.
    """
    studies = [name for name in studies if measured(results, name)]
    sizes = [len(STUDIES[name].cases) for name in studies]
    with picture(
        file, (10.8, 0.9 + 0.42 * sum(sizes) + 0.5 * len(sizes)), "What a choice of masks does", comment
    ) as figure:
        grid = figure.subplots(len(studies), len(GOALS), sharex="col", squeeze=False, height_ratios=sizes)
        for line, name in zip(grid, studies, strict=True):
            for axes, (what, colour) in zip(line, GOALS.values(), strict=True):
                _dots(axes, results["rows"], name, what, colour)
                axes.tick_params(axis="y", length=0, labelleft=axes is line[0])
            line[0].set_title(STUDIES[name].title, loc="left")
        for axes, label in zip(grid[-1], GOALS, strict=True):
            axes.set_xlabel(f"{label}: test accuracy (%)")


def plot_dial(file: str | Path, results: Mapping[str, Any], comment: str | None = None) -> None:
    """Robustness against clean accuracy at each position of the dials, a panel for each way to train them: means."""
    with picture(file, (9.6, 4.4), "The dials of one network: means over seeds", comment) as figure:
        cases = STUDIES["dial"].cases
        panels = figure.subplots(1, len(cases), sharex=True, sharey=True)
        for panel, case in zip(panels, cases, strict=True):
            runs = of_case(results["rows"], case)
            for name, (colour, marker, label) in LOOKS.items():
                of_dial = [[place for place in row["dial"] if place["dial"] == name] for row in runs]
                line = [
                    tuple(100 * mean(place[what] for place in position) for what in ("clean", dial.ATTACK))
                    for position in zip(*of_dial, strict=True)
                ]
                panel.plot(*zip(*line, strict=True), label=label, color=colour, marker=marker, markersize=4)
            panel.set_title(case.name)
            panel.set_xlabel("no attack: test accuracy (%)")
            panel.grid(color="#E5E5E5")
            panel.margins(0.12)
        panels[0].set_ylabel(f"{attack_name(dial.ATTACK)}: test accuracy (%)")
        panels[0].legend()


def _dots(axes: Axes, rows: Sequence[Row], study: str, what: Callable[[Row], float], colour: str) -> None:
    """A line of dots for each case; the mean of the first goes on down as a dashed line."""
    cases = STUDIES[study].cases
    for at, case in enumerate(cases):
        values = [what(row) for row in of_case(rows, case)]
        if not values:
            continue
        axes.scatter(values, [at] * len(values), s=22, alpha=0.55, color=colour, linewidths=0)
        axes.plot([mean(values)] * 2, [at - 0.3, at + 0.3], color=colour, linewidth=2)
        if at == 0:
            axes.axvline(mean(values), color="#8C8C8C", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_yticks(range(len(cases)), [case.name for case in cases])
    axes.set(ylim=(len(cases) - 0.4, -0.6))
    axes.grid(axis="x", color="#E5E5E5")
