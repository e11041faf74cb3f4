"""The studies as Markdown tables: means over seeds, with standard deviations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.studies.cases import STUDIES, StudyCase
from smart import text
from smart_kernels.paths import PATHS

Row = Mapping[str, Any]
HEADING = (
    "",
    "seeds",
    "clean path",
    "attacked",
    "adv path",
    "attacked",
    "less the first line's",
    "weights a path",
    "of both",
    "in common",
    "multiplications, clean / adv",
    "training",
)


def of_case(rows: Sequence[Row], case: StudyCase) -> list[Row]:
    """The runs of a case, by seed."""
    return sorted((row for row in rows if row["case"] == case.name), key=lambda row: row["seed"])


def measured(results: Mapping[str, Any], name: str) -> bool:
    """Whether there is anything to compare in a study: runs of two cases."""
    return sum(bool(of_case(results["rows"], case)) for case in STUDIES[name].cases) > 1


def clean_accuracy(path: str) -> Callable[[Row], float]:
    """What a row says of a path without an attack, in percent."""
    return lambda row: 100 * row["accuracy"][path]["clean"]


def robust_accuracy(path: str) -> Callable[[Row], float]:
    """What a row says of a path under the worst of all attacks for each image, in percent."""
    return lambda row: 100 * row["robust"][path]


def markdown(results: Mapping[str, Any], name: str) -> str:
    """The table of one study: a line for each case that has runs."""
    if not measured(results, name):
        return "Not measured yet."
    first = of_case(results["rows"], STUDIES[name].cases[0])
    lines = [f"| {' | '.join(HEADING)} |", "|" + "---|" * len(HEADING)]
    for case in STUDIES[name].cases:
        if runs := of_case(results["rows"], case):
            lines.append(f"| {' | '.join([case.name, *_cells(runs, first)])} |")
    return "\n".join(lines)


def _cells(runs: Sequence[Row], first: Sequence[Row]) -> list[str]:
    accuracies = [spread(runs, what(path)) for path in PATHS for what in (clean_accuracy, robust_accuracy)]
    return [
        str(len(runs)),
        *accuracies,
        difference(runs, first, robust_accuracy("adv")),
        _counts(runs, "nonzeros", "adv"),
        _counts(runs, "nonzeros", "union"),
        f"{100 * mean(in_common(row) for row in runs):.0f} %",
        f"{_counts(runs, 'macs', 'clean')} / {_counts(runs, 'macs', 'adv')}",
        f"{mean(row['train_cpu_s'] for row in runs):.0f} s",
    ]


def spread(runs: Sequence[Row], what: Callable[[Row], float]) -> str:
    """Mean and standard deviation over seeds: ``"81.2 ± 0.6"``."""
    values = [what(row) for row in runs]
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def difference(runs: Sequence[Row], others: Sequence[Row], what: Callable[[Row], float]) -> str:
    """The mean difference of runs of the same seed, and the least and the largest: ``"-1.2 (-2.0 to -0.5)"``."""
    of_seed = {row["seed"]: what(row) for row in others}
    values = [what(row) - of_seed[row["seed"]] for row in runs if row["seed"] in of_seed]
    return signed(values) if any(values) else ""


def signed(values: Sequence[float]) -> str:
    """The mean, and the least and the largest of several: ``"+1.2 (-0.5 to +2.0)"``."""
    return f"{mean(values):+.1f}" + (f" ({min(values):+.1f} to {max(values):+.1f})" if len(values) > 1 else "")


def in_common(row: Row) -> float:
    """The part of the adversarial path's weights that the clean path has too."""
    counts = row["nonzeros"]
    return (counts["clean"] + counts["adv"] - counts["union"]) / counts["adv"]


def _counts(runs: Sequence[Row], what: str, key: str) -> str:
    return text.short(mean(row[what][key] for row in runs))


def measured_at(results: Mapping[str, Any], link: str) -> str:
    """Where numbers come from, in a sentence; ``link`` is to the file."""
    return f"Measured at commit `{results['commit']}` with `{results['command']}`: {link}."


def note(results: Mapping[str, Any], link: str) -> str:
    """What the tables are of, in one paragraph."""
    data, recipe, machine = results["data"], results["recipe"], results["machine"]
    sizes = ", ".join(f"{data[split]['images']:,} {split}" for split in ("train", "val", "test"))
    return (
        f"{data['name']}, {sizes} images; {results['network']}; {recipe['epochs']} epochs, "
        f"PGD-{recipe['attack_steps']} in training, L-infinity eps {text.show(recipe['eps'])}; "
        f"{machine['cpu']}, {results['threads']} thread, torch {results['versions']['torch']}. "
        f"{measured_at(results, link)}"
    )
