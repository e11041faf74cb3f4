"""Turns result files into the tables people read: ``python -m benchmarks.report`` (``make results``).

It rewrites what stands between the markers of README.md, docs/cpu.md and docs/designing-masks.md, docs/coverage.md, and
the pictures of the CPU suite and the studies in docs/images; with up-to-date files it changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import layers
from benchmarks.studies import dial as study_dial
from benchmarks.studies import plots as study_plots
from benchmarks.studies import strong
from benchmarks.studies import tables as study_tables
from benchmarks.studies.cases import STUDIES
from smart import plots
from smart.bench import SPARSE
from smart.bench_tables import markdown
from smart.demo import summary
from smart.results import read
from smart_kernels.paths import PATHS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
COVERAGE = ROOT / "docs" / "coverage.md"
KERNELS = ROOT / "docs" / "cpu.md"
MASKS = ROOT / "docs" / "designing-masks.md"
IMAGES = ROOT / "docs" / "images"
PICTURE = IMAGES / "cpu.png"
DEMO = RESULTS / "demo"  # reports of `smart demo`, one a seed
BEGIN, END = "<!-- {}: written by `make results` -->", "<!-- end of {} -->"


def insert(page: str, part: str, content: str) -> str:
    """A page's text with what stands between the markers of one part replaced."""
    before, begin, rest = page.partition(BEGIN.format(part))
    _, end, after = rest.partition(END.format(part))
    if not begin or not end:
        raise ValueError(f"the page lacks the markers of {part!r}: put {BEGIN.format(part)!r} where it belongs")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def suite() -> str:
    """The table of the newest results of the CPU suite."""
    file = newest("cpu-cpu")
    return markdown(read(file), f": [{file.name}](benchmarks/results/{file.name})")


def newest(begin: str) -> Path:
    """The results file of the latest date; ``begin`` is its suite and device."""
    return sorted(RESULTS.glob(f"{begin}-*.json"))[-1]


def layer_rates() -> str:
    """The table of the newest results of single layers."""
    file = newest("layers-cpu")
    return layers.markdown(read(file), file.name)


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


def studies_file(kind: str = "") -> Path:
    """The newest results of the studies; of a kind of them that has a folder of its own.

    Kinds are ``"attacks"`` by stronger attacks, ``"dial"`` at all positions, and ``"channels"``, run by itself.
    """
    return max((RESULTS / "studies" / kind).glob("*.json"), key=lambda file: file.stem[-len("2000-01-01") :])


def study(name: str) -> str:
    """The table of one study."""
    return study_tables.markdown(read(studies_file()), name)


def studies_note() -> str:
    """What all studies have in common, and where they come from."""
    return study_tables.note(read(studies_file()), _link(studies_file()))


def attacks() -> str:
    """The table of stronger attacks on the methods, and where it comes from."""
    file = studies_file("attacks")
    content = read(file)
    return f"{strong.markdown(content, 'methods')} {study_tables.measured_at(content, _link(file))}"


def dial() -> str:
    """The table of the dials' positions, and where it comes from."""
    file = studies_file("dial")
    content = read(file)
    return f"{study_dial.markdown(content)}\n\n{study_tables.measured_at(content, _link(file))}"


def channels() -> str:
    """The table of the study of channels, and where it comes from."""
    file = studies_file("channels")
    content = read(file)
    return f"{study_tables.markdown(content, 'channels')}\n\n{study_tables.measured_at(content, _link(file))}"


def _link(file: Path) -> str:
    return f"[{file.name}](../{file.relative_to(ROOT)})"


APART = ("dial", "channels")  # studies whose results are in files of their own
# Page -> the parts it has, and what writes each.
PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    README: {"results": suite, "demo": demo, "seeds": seeds},
    KERNELS: {"layers": layer_rates},
    MASKS: {
        "studies": studies_note,
        **{name: partial(study, name) for name in STUDIES if name not in APART},
        "attacks": attacks,
        "dial": dial,
        "channels": channels,
    },
}
# Pictures of the studies, the kind of results that each shows, and what draws it.
CHOICES = [name for name in STUDIES if name not in ("methods", *APART)]
STUDY_PICTURES: dict[str, tuple[str, Callable[..., None]]] = {
    "methods.png": ("", partial(study_plots.plot_trade_off, study="methods")),
    "choices.png": ("", partial(study_plots.plot_choices, studies=CHOICES)),
    "dial.png": ("dial", study_plots.plot_dial),
}


def updated(page: Path) -> str:
    """A page's text with every part as the result files have it."""
    text = page.read_text(encoding="utf-8")
    for part, content in PAGES[page].items():
        text = insert(text, part, content())
    return text


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


def draw() -> None:
    """Draws the newest results of the CPU suite, unless the picture shows them already."""
    _draw_anew(PICTURE, newest("cpu-cpu"), plots.plot_benchmark)


def draw_studies() -> None:
    """Draws the newest results of the studies, unless the pictures show them already."""
    for name, (kind, plot) in STUDY_PICTURES.items():
        _draw_anew(IMAGES / name, studies_file(kind), plot)


def _draw_anew(picture: Path, file: Path, plot: Callable[..., None]) -> None:
    if not picture.exists() or not is_of(picture, file):
        plot(picture, read(file), comment=_digest(file))


def is_of(picture: Path, file: Path) -> bool:
    """Whether a picture was drawn from a results file as it is now: it says so itself.

    Two versions of matplotlib draw the same numbers differently, so that pictures cannot be compared.
    """
    return _digest(file).encode() in picture.read_bytes()


def _digest(file: Path) -> str:
    return f"sha256 of its results: {hashlib.sha256(file.read_bytes()).hexdigest()}"


def main() -> None:
    """Rewrites the pages and the pictures."""
    for page in PAGES:
        page.write_text(updated(page), encoding="utf-8")
    COVERAGE.write_text(coverage(), encoding="utf-8")
    if why := plots.missing():
        print(f"pictures are left as they are: {why}")
    else:
        draw()
        draw_studies()


if __name__ == "__main__":
    main()
