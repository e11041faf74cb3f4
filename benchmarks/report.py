"""Turns result files into the tables people read: ``python -m benchmarks.report`` (``make results``).

It rewrites what stands in README.md between its markers, and docs/coverage.md; with up-to-date files it changes
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smart.bench import SPARSE
from smart.demo import summary
from smart_kernels.paths import PATHS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
COVERAGE = ROOT / "docs" / "coverage.md"
DEMO = RESULTS / "demo"  # reports of `smart demo`, one a seed
BEGIN, END = "<!-- {}: written by `make results` -->", "<!-- end of {} -->"


def render(results: Mapping[str, Any], name: str) -> str:
    """One result file as a Markdown table: a line for each network, batch and path."""
    rows = results["rows"]
    runners = [runner for runner in dict.fromkeys(row["runner"] for row in rows) if runner != SPARSE]
    heading = ["network", "batch", "path", *(f"{runner} ms" for runner in runners), "sparse ms", "speed-up", "weights"]
    lines = [f"| {' | '.join(heading)} |", "|" + "---|" * len(heading)]
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        cases.setdefault((row["network"], row["batch"], row["path"]), {})[row["runner"]] = row
    for (network, batch, path), case in cases.items():
        sparse, dense = case[SPARSE], [case[runner] for runner in runners]
        times = " | ".join(_short(row["ms_p50"]) for row in (*dense, sparse))
        speed_up = min(row["ms_p50"] for row in dense) / sparse["ms_p50"]
        memory = sparse["weight_bytes"] / dense[0]["weight_bytes"]
        lines.append(f"| {network} | {batch} | {path} | {times} | {speed_up:.2f}x | {memory:.2f} |")
    machine, first = results["machine"], rows[0]
    threads = f"{first['threads']} thread{'s' if first['threads'] > 1 else ''}"
    lines += [
        "",
        f"{machine['gpu'] or machine['cpu']}, {threads}, {first['dtype']}, torch {results['versions']['torch']}; "
        f"density {first['density']:.2g} a path, random masks. Medians of runs in turns, outputs verified before. "
        "*speed-up*: against the fastest dense runner of the line. *weights*: memory of both paths together against "
        f"one dense copy. Measured at commit `{results['commit']}` with `{results['command']}`: "
        f"[{name}](benchmarks/results/{name}).",
    ]
    return "\n".join(lines)


def _short(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def insert(readme: str, part: str, content: str) -> str:
    """README's text with what stands between the markers of one part replaced."""
    before, begin, rest = readme.partition(BEGIN.format(part))
    _, end, after = rest.partition(END.format(part))
    if not begin or not end:
        raise ValueError(f"README.md lacks the markers of {part!r}: put {BEGIN.format(part)!r} where it belongs")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def suites() -> str:
    """The tables of all result files, newest last."""
    files = sorted(file for file in RESULTS.glob("*.json") if not file.name.startswith("coverage-"))
    return "\n\n".join(render(json.loads(file.read_text(encoding="utf-8")), file.name) for file in files)


def demo() -> str:
    """What `smart demo` printed for seed 0."""
    return f"```\n{summary(json.loads((DEMO / 'seed0.json').read_text(encoding='utf-8')))}\n```"


def seeds() -> str:
    """The demo's accuracies for each seed, as a Markdown table."""
    lines = ["| seed | clean path | under PGD-20 | adversarial path | under PGD-20 |", "|---|---|---|---|---|"]
    for file in sorted(DEMO.glob("seed*.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        cells = [f"{100 * report['accuracy'][path][attack]:.1f} %" for path in PATHS for attack in ("clean", "pgd20")]
        lines.append(f"| {report['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines)


PARTS = {"results": suites, "demo": demo, "seeds": seeds}


def updated(readme: str) -> str:
    """README's text with every part as the result files have it."""
    for part, content in PARTS.items():
        readme = insert(readme, part, content())
    return readme


def coverage() -> str:
    """docs/coverage.md: networks x patterns, a table for each device that has a result file."""
    files = {device: sorted(RESULTS.glob(f"coverage-{device}-*.json"))[-1:] for device in ("cpu", "cuda")}
    parts = [COVERAGE_INTRODUCTION]
    for device, newest in files.items():
        if newest:
            parts.append(_coverage_table(json.loads(newest[0].read_text(encoding="utf-8")), newest[0].name))
        else:
            parts.append(f"## {DEVICES[device]}\n\nNot measured yet.")
    return "\n\n".join(parts) + "\n"


DEVICES = {"cpu": "CPU", "cuda": "GPU"}
COVERAGE_INTRODUCTION = """# What can be swapped, and what it gains

<!-- written by `make results` -->

Each line is one network, swapped for its batch size. *batch 1*, *batch 16*: how many times faster it is than the faster
of eager PyTorch and eager PyTorch with its batch norms folded; below 1 it lost. *memory*: weights of all its paths
together, against one dense copy of the same layers. *sparse layers*: of the layers with zeros, how many run on sparse
kernels at batch 16; the others are faster densely. *error*: the largest relative difference from the original's
output, over all paths."""


def _coverage_table(results: Mapping[str, Any], name: str) -> str:
    cases: dict[tuple[str, ...], dict[int, dict[str, Any]]] = {}
    for row in results["rows"]:
        case = cases.setdefault((row["network"], row["how"], row["pattern"]), {})
        case.setdefault(row["batch"], {})[row["runner"]] = row
    heading = ["network", "zeros", "pattern", "density", "batch 1", "batch 16", "memory", "sparse layers", "error"]
    lines = [f"| {' | '.join(heading)} |", "|" + "---|" * len(heading)]
    for case, batches in cases.items():
        ratios = []
        for runners in batches.values():
            dense = min(row["ms_p50"] for runner, row in runners.items() if runner != SPARSE)
            ratios.append(f"{dense / runners[SPARSE]['ms_p50']:.2f}x")
        last = list(batches.values())[-1]
        sparse, dense = last[SPARSE], next(row for runner, row in last.items() if runner != SPARSE)
        memory = sparse["weight_bytes"] / dense["weight_bytes"]
        error = max(row["max_rel_error"] for runners in batches.values() for row in runners.values())
        numbers = [f"{sparse['density']:.2f}", *ratios, f"{memory:.2f}"]
        cells = [*case, *numbers, f"{sparse['sparse_layers']} of {sparse['layers']}", f"{error:.0e}"]
        lines.append(f"| {' | '.join(cells)} |")
    machine, first = results["machine"], results["rows"][0]
    threads = f"{first['threads']} thread{'s' if first['threads'] > 1 else ''}"
    note = (
        f"{machine['gpu'] or machine['cpu']}, {threads}, {first['dtype']}, torch {results['versions']['torch']}. Masks "
        "are random; pruning drops the smallest weights. Medians of runs in turns, outputs verified before. "
        f"Measured at commit `{results['commit']}` with `{results['command']}`: [{name}](../benchmarks/results/{name})."
    )
    return "\n".join([f"## {DEVICES[first['device']]}", "", *lines, "", note])


def main() -> None:
    """Rewrites README.md and docs/coverage.md."""
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
    COVERAGE.write_text(coverage(), encoding="utf-8")


if __name__ == "__main__":
    main()
