"""Benchmark rows as text and as Markdown: each sparse path beside the dense peers of the same network and batch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from smart.bench import SPARSE
from smart.text import align

Row = Mapping[str, Any]


@dataclass
class Case:
    """What was measured in turns.

    Attributes:
        sparse: path -> our row.
        dense: peer -> its row, of whichever path it ran.
    """

    sparse: dict[str, Row] = field(default_factory=dict)
    dense: dict[str, Row] = field(default_factory=dict)

    @property
    def first(self) -> Row:
        """Any row, for what all have in common."""
        return next(iter((*self.sparse.values(), *self.dense.values())))

    @property
    def fastest_dense(self) -> Row | None:
        """The fastest of the peers that compute in our dtype, None if there is none."""
        alike = [row for row in self.dense.values() if row["dtype"] == self._dtype]
        return min(alike, key=lambda row: row["ms_p50"], default=None)

    @property
    def _dtype(self) -> str:
        ours = next(iter(self.sparse.values()), None)
        return ours["dtype"] if ours else self.first["dtype"]

    def speed_up(self, row: Row) -> float | None:
        """How many times faster a runner is than the fastest dense peer, None without one."""
        return self.fastest_dense["ms_p50"] / row["ms_p50"] if self.fastest_dense else None


def cases(rows: Sequence[Row]) -> list[Case]:
    """Rows of one network, pattern, batch, device, thread count and density (of the first path) together, sorted.

    Networks stay in the order of their first rows.
    """
    found: dict[tuple[Any, ...], Case] = {}
    latest: dict[tuple[Any, ...], tuple[str, Case]] = {}  # the path whose density tells cases apart, and the last case
    for row in rows:
        key = (row["network"], row["pattern"], row["batch"], row["device"], row["threads"])
        first, case = latest.get(key, (row["path"], None))
        if row["path"] == first:
            # A random mask misses its density by less than a hundredth.
            case = found.setdefault((*key, round(row["density"], 2)), Case())
            latest[key] = first, case
        if row["runner"] == SPARSE:
            case.sparse[row["path"]] = row
        else:
            case.dense.setdefault(row["runner"], row)
    networks = list(dict.fromkeys(case.first["network"] for case in found.values()))
    return sorted(found.values(), key=lambda case: _place(case.first, networks))


def _place(row: Row, networks: Sequence[str]) -> tuple[Any, ...]:
    density = round(row["density"], 2)
    return networks.index(row["network"]), row["pattern"], row["device"], row["threads"], density, row["batch"]


def table(rows: Sequence[Row]) -> str:
    """Rows as text, a line for each runner; "speed-up" is against the fastest dense peer of the same dtype."""
    lines = [
        ["network", "density", "batch", "runner", "path", "ms p20", "p50", "p80", "images/s", "speed-up"],
    ]
    for case in cases(rows):
        for row in (*case.dense.values(), *case.sparse.values()):
            ours = row["runner"] == SPARSE
            ratio = case.speed_up(row)
            lines.append(
                [
                    row["network"],
                    f"{row['density']:.2f}",
                    str(row["batch"]),
                    row["runner"],
                    row["path"] if ours else "",
                    *(f"{row[percentile]:.3f}" for percentile in ("ms_p20", "ms_p50", "ms_p80")),
                    f"{row['images_per_s']:.1f}",
                    f"{ratio:.2f}x" if ratio else "-",
                ]
            )
    return align(lines)


def markdown(results: Mapping[str, Any], source: str = "") -> str:
    """A results file as a Markdown table, a line for each case, with what is needed to read it below.

    Args:
        results: as in a results file (:mod:`smart.results`).
        source: what to say about where the file is.
    """
    rows = results["rows"]
    found = cases(rows)
    peers = list(dict.fromkeys(name for case in found for name in case.dense))
    paths = list(dict.fromkeys(path for case in found for path in case.sparse))
    threads = len({row["threads"] for row in rows}) > 1
    patterns = len({row["pattern"] for row in rows}) > 1
    heading = ["network", *(["pattern"] if patterns else []), "density", "batch", *(["threads"] if threads else [])]
    heading += [f"{name} ms" for name in peers]
    heading += [*(f"sparse {path} ms" for path in paths), "speed-up", "weights"]
    lines = [f"| {' | '.join(heading)} |", "|" + "---|" * len(heading)]
    for case in found:
        first, best = case.first, case.fastest_dense
        cells = [first["network"], *([first["pattern"]] if patterns else [])]
        cells += [f"{first['density']:.2g}", str(first["batch"])]
        cells += [str(first["threads"])] if threads else []
        for name in peers:
            cell = _ms(case.dense.get(name))
            cells.append(f"**{cell}**" if best and name == best["runner"] else cell)
        cells += [_ms(case.sparse.get(path)) for path in paths]
        cells += [_ratios(case, paths), _memory(case)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _note(results, source)])


def _ms(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{row['ms_p50']:.0f}" if row["ms_p50"] >= 100 else f"{row['ms_p50']:.3g}"


def _ratios(case: Case, paths: Sequence[str]) -> str:
    ratios = [case.speed_up(case.sparse[path]) for path in paths if path in case.sparse]
    return " / ".join(f"{ratio:.2f}x" for ratio in ratios if ratio) or "-"


def _memory(case: Case) -> str:
    """Weights of all our paths against one dense copy in the same dtype."""
    if not case.sparse or case.fastest_dense is None:
        return "-"
    return f"{next(iter(case.sparse.values()))['weight_bytes'] / case.fastest_dense['weight_bytes']:.2f}"


def commands_text(joined: str) -> str:
    """What was run, as text; the parts of a suite, one command each, as one."""
    commands = joined.split("; ")
    whole = {re.sub(r" --only (?:'[^']*'|\S+)", "", command) for command in commands}
    if len(commands) > 1 and len(whole) == 1:
        return f"`{whole.pop()}`, in {len(commands)} parts (`--only`)"
    return f"`{joined}`"


def _note(results: Mapping[str, Any], source: str) -> str:
    rows, machine, versions = results["rows"], results["machine"], results["versions"]
    dtypes = sorted({row["dtype"] for row in rows if row["runner"] == SPARSE}) or ["float32"]
    counts = sorted({row["threads"] for row in rows})
    threads = f"{counts[0]} thread{'s' if counts[0] > 1 else ''}, " if len(counts) == 1 else ""
    packages = [name for name in versions if name not in ("python", "smart", "smart_kernels")]
    used = ", ".join(f"{name} {versions[name]}" for name in packages)
    measured = f"Measured at commit `{results['commit']}` with {commands_text(results['command'])}"
    return (
        f"{machine['gpu'] or machine['cpu']}, {threads}{'/'.join(dtypes)}; {used}. Medians in milliseconds of runs in "
        "turns, outputs verified before. Bold: the fastest dense runner of the line in our precision. *speed-up*: of "
        "each sparse path against it. *weights*: memory of all paths together against one dense copy. "
        f"{measured}{source}."
    )
