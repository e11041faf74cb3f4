"""Turns result files into the tables people read: ``python -m benchmarks.report`` (``make results``).

It rewrites the part of README.md between two markers, and nothing else; with up-to-date files it changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smart.bench import SPARSE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- results: written by `make results` -->", "<!-- end of results -->"


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


def insert(readme: str, tables: str) -> str:
    """README's text with the part between the markers replaced."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the markers {BEGIN!r} and {END!r}: put them where the tables belong")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def current_tables() -> str:
    """The tables of all result files, newest last."""
    files = sorted(RESULTS.glob("*.json"))
    return "\n\n".join(render(json.loads(file.read_text(encoding="utf-8")), file.name) for file in files)


def main() -> None:
    """Rewrites README.md."""
    text = README.read_text(encoding="utf-8")
    README.write_text(insert(text, current_tables()), encoding="utf-8")


if __name__ == "__main__":
    main()
