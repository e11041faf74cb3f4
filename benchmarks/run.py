"""Runs a suite of whole networks and writes its results: ``python -m benchmarks.run --suite cpu``.

The results file is written after every batch size of every network, so that a run that is stopped loses only what it
was at; ``--append`` goes on with it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import smart
import smart_kernels
from benchmarks import coverage
from benchmarks.cases import DEVICES, SUITES, NetworkCase
from benchmarks.coverage import CoverageCase
from smart import peers, plots, results
from smart.bench import SPARSE, benchmark
from smart.bench_tables import markdown, table
from smart_kernels.files import write_text

RESULTS = Path(__file__).with_name("results")
COVERAGE = "coverage"
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One network at one batch size."""

    case: NetworkCase | CoverageCase
    batch: int

    def __str__(self) -> str:
        return f"{self.case}, batch {self.batch}"

    def is_in(self, rows: Sequence[Row], names: Sequence[str], device: str) -> bool:
        """Whether rows hold it already, for all the named peers and for ours, at the present number of threads."""
        wanted = {"batch": self.batch, "network": self.case.network, "device": device}
        wanted["threads"] = torch.get_num_threads()
        if isinstance(self.case, CoverageCase):
            wanted |= {"how": self.case.how, "pattern": self.case.pattern}
        found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
        if isinstance(self.case, NetworkCase):
            # Where a pattern does not fit all layers, the network's density is not the one that was asked for.
            densities = [row.get("asked_density", row["density"]) for row in found]
            found = [
                row
                for row, density in zip(found, densities, strict=True)
                if abs(density - self.case.density) < 0.01
                and row.get("asked_pattern", "unstructured") == self.case.pattern
            ]
        return {*names, SPARSE} <= {row["runner"] for row in found}

    def measure(self, names: Sequence[str], backend: str, budget_s: float, device: str) -> list[Row]:
        """Its rows. The backend of each layer is chosen for this batch size, as a user would."""
        if isinstance(self.case, CoverageCase):
            return coverage.measure(self.case, (self.batch,), list(names), backend, budget_s, device)
        name, image = self.case.network, self.case.image
        how = {"density": self.case.density, "pattern": self.case.pattern}
        dtype = getattr(torch, self.case.dtype)
        model = smart.create_model(name, in_channels=image[0], seed=0, **how).to(device, dtype).eval()
        x = torch.rand(self.batch, *image, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        sparse = smart_kernels.swap(model, x, backend=self.case.backend or backend)
        rows = benchmark(model, sparse, x, (self.batch,), ("clean", "adv"), names, budget_s, name)
        if self.case.pattern == "unstructured":
            return rows
        return [{**row, **{f"asked_{key}": value for key, value in how.items()}} for row in rows]


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and runs the suite."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    command = f"python -m benchmarks.run {shlex.join(sys.argv[1:] if argv is None else argv)}"
    torch.set_num_threads(arguments.threads)
    # Taken now: what is committed meanwhile is not what runs.
    commit = results.commit()
    arguments.device = arguments.device or DEVICES.get(arguments.suite, "cpu")
    try:
        names, note = _peers(arguments)
        runs = _runs(arguments)
        # Rows to come, as far as they decide which versions count.
        new = results.results([{"runner": name} for name in names], command, commit)
        file, old = _results_file(arguments, new)
    except ValueError as error:
        parser.error(str(error))
    if note:
        print(note, file=sys.stderr)
    done = old["rows"] if old else []
    left = [run for run in runs if not run.is_in(done, names, arguments.device)]
    if len(left) < len(runs):
        print(f"{file} holds {len(runs) - len(left)} of {len(runs)} already", file=sys.stderr)
    rows: list[Row] = []
    content = old
    begin = time.monotonic()
    for done_now, run in enumerate(tqdm(left, unit="case", file=sys.stderr)):
        if arguments.limit is not None and time.monotonic() - begin > arguments.limit:
            tqdm.write(f"{len(left) - done_now} of {len(runs)} are left after {arguments.limit:g} s: --append goes on")
            break
        measured = run.measure(names, arguments.backend, arguments.budget, arguments.device)
        rows += measured
        content = results.results(rows, command, commit)
        content = results.merge(old, content) if old else content
        results.write(content, file)
        tqdm.write(f"\n{run}\n{table(measured)}")
    written = [file, *_draw(arguments, content)]
    print(f"written: {', '.join(map(str, written))}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--suite", choices=[*SUITES, COVERAGE], default="cpu", help="what to measure")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=(peers.ALL, *peers.PEERS),
        metavar="PEER",
        help=f"competitors: {', '.join(peers.PEERS)}, or all that are installed; default: all, but for coverage eager "
        "and fused, as compiling so many takes too long, and for gpu cudnn and max-autotune",
    )
    parser.add_argument("--device", help="of the coverage suite: cpu or cuda (default: the suite's)")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="after which no further case is begun")
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="cases whose name, as it is printed, contains this; 'batch 1,' is not batch 16",
    )
    parser.add_argument("--backend", default="auto", help="of swapped networks whose case names none")
    parser.add_argument("--threads", type=int, default=1, help="of every runner")
    parser.add_argument(
        "--budget", type=float, default=5.0, help="seconds for each batch size, both paths and all runners together"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file, or folder to put one in")
    parser.add_argument(
        "--append",
        action="store_true",
        help="go on with the results file, in a folder the newest of this suite, if it is of this machine, commit and "
        "versions: what it holds is not measured again",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the results as a table, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them as bars, too; needs matplotlib")
    return parser


def _peers(arguments: argparse.Namespace) -> tuple[list[str], str | None]:
    default = {COVERAGE: ["eager", "fused"], "gpu": ["cudnn", "max-autotune"]}.get(arguments.suite, [peers.ALL])
    return peers.select(arguments.peers or default, arguments.device)


def _runs(arguments: argparse.Namespace) -> list[Run]:
    """What is to be measured, in order.

    Raises:
        ValueError: nothing is, or the suite has no such output.
    """
    if arguments.suite == COVERAGE:
        if arguments.markdown or arguments.plot:
            raise ValueError("the coverage suite has its own table (`make results`): leave out --markdown and --plot")
        runs = [Run(case, batch) for case in coverage.CASES for batch in (1, 16)]
    else:
        if arguments.device != (own := DEVICES.get(arguments.suite, "cpu")):
            raise ValueError(
                f"suite {arguments.suite!r} is for {'CPUs' if own == 'cpu' else 'GPUs'}: leave out --device"
            )
        runs = [Run(case, batch) for case in SUITES[arguments.suite] for batch in case.batches]
    if arguments.plot and (why := plots.missing()):
        raise ValueError(why)
    chosen = [run for run in runs if arguments.only in f"{run},"]
    if not chosen:
        raise ValueError(f"no case's name contains {arguments.only!r}: the first is {str(runs[0])!r}")
    return chosen


def _results_file(arguments: argparse.Namespace, new: results.Results) -> tuple[Path, results.Results | None]:
    """The file to write, and what it holds that is to be kept.

    Raises:
        ValueError: a file was named that is of another machine, commit or version.
    """
    out, begin = arguments.out, f"{arguments.suite}-{arguments.device}"
    if out.is_dir():
        if arguments.append:
            for file in sorted(out.glob(f"{begin}-*.json"))[-1:]:
                if not results.mismatch(old := results.read(file), new):
                    return file, old
        return out / f"{begin}-{datetime.now(timezone.utc):%Y-%m-%d}.json", None
    if arguments.append and out.exists():
        old = results.read(out)
        if why := results.mismatch(old, new):
            raise ValueError(f"--append: {out} is of another run: {why}")
        return out, old
    return out, None


def _draw(arguments: argparse.Namespace, content: results.Results) -> list[Path]:
    """The other files that were asked for."""
    if arguments.markdown:
        write_text(arguments.markdown, markdown(content) + "\n")
    if arguments.plot:
        plots.plot_benchmark(arguments.plot, content)
    return [file for file in (arguments.markdown, arguments.plot) if file]


if __name__ == "__main__":
    main()
