"""Runs a suite of whole networks and writes its results: ``python -m benchmarks.run --suite cpu``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import smart
import smart_kernels
from benchmarks import coverage
from benchmarks.cases import SUITES, NetworkCase
from smart.bench import benchmark, table, write_results
from smart.peers import PEERS

RESULTS = Path(__file__).with_name("results")


def measure(case: NetworkCase, peers: list[str], backend: str, budget_s: float) -> list[dict[str, object]]:
    """Rows of one network. The backend of each layer is chosen anew for each batch size, as a user would."""
    channels = case.image[0]
    model = smart.create_model(case.network, in_channels=channels, density=case.density, seed=0).eval()
    rows = []
    for batch in case.batches:
        x = torch.rand(batch, *case.image, generator=torch.Generator().manual_seed(0))
        sparse = smart_kernels.swap(model, x, backend=backend)
        rows += benchmark(model, sparse, x, (batch,), ("clean", "adv"), peers, budget_s, case.network)
    return rows


def _runs(arguments: argparse.Namespace) -> list[tuple[object, Callable[..., list[dict[str, object]]]]]:
    """Each case of a suite, and what measures it."""
    backend, budget_s = arguments.backend, arguments.budget
    if arguments.suite != "coverage":
        peers = arguments.peers or ["eager", "fused", "compile"]
        run = partial(measure, peers=peers, backend=backend, budget_s=budget_s)
        return [(case, run) for case in SUITES[arguments.suite]]
    run = partial(
        coverage.measure,
        batches=(1, 16),
        peers=arguments.peers or ["eager", "fused"],
        backend=backend,
        budget_s=budget_s,
        device=arguments.device,
    )
    return [(case, run) for case in coverage.CASES if arguments.only in str(case)]


def main() -> None:
    """Parses the command line and runs the suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--suite", choices=[*SUITES, "coverage"], default="cpu", help="what to measure")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=PEERS,
        help="competitors; default: all, but for coverage eager and fused, as compiling so many takes too long",
    )
    parser.add_argument("--device", default="cpu", help="of the coverage suite: cpu or cuda")
    parser.add_argument("--only", default="", help="of the coverage suite: cases whose name contains this")
    parser.add_argument("--backend", default="auto", help="of the swapped network")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument(
        "--budget", type=float, default=5.0, help="seconds for each batch size, both paths and all runners together"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file, or folder to put one in")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for case, run in tqdm(_runs(arguments), unit="network", file=sys.stderr):
        new = run(case)
        rows += new
        tqdm.write(f"{case}\n{table(new)}")
    command = f"python -m benchmarks.run {shlex.join(sys.argv[1:])}"
    print(f"written: {write_results(rows, arguments.out, arguments.suite, command)}")


if __name__ == "__main__":
    main()
