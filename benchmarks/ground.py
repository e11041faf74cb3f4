"""The ground that a GPU's other numbers stand on: ``python -m benchmarks.ground``, to be run there before others.

What starting a kernel takes within a CUDA graph, what a matrix product and a copy reach, and for each convolution of
the three networks the time of cuDNN's fused one, as a share of that matrix product, beside the block kernel at
densities 1.0 and 0.2 with the schedules there are. Outputs are verified before anything is timed.
``benchmarks.roofline --ground`` reads the results.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import tune
from benchmarks.cases import LAYERS, LayerCase
from smart import results
from smart_kernels.backends import find
from smart_kernels.cuda_graphs import repeated
from smart_kernels.timing import interleave, percentile
from smart_kernels.verify import TOLERANCE, VerificationError, relative_error

RESULTS = Path(__file__).with_name("results")
BLOCK = (64, 16)
DENSITIES = (1.0, 0.2)
EMPTY, PRODUCTS, COPIES = 1000, 10, 10  # in one graph
MATRIX, COPIED = 8192, 2**29  # rows and columns, and numbers: far more than caches hold


def machine_rates(dtype: torch.dtype, device: str, budget_s: float) -> dict[str, float]:
    """What the GPU does at best: ``empty_kernel_us``, ``matmul_tflops``, ``copy_terabytes_per_s``."""
    one = torch.zeros(1, device=device)
    square = torch.randn(MATRIX, MATRIX, device=device).to(dtype)
    source = torch.randn(COPIED, device=device, dtype=torch.float32).to(dtype)
    target, product = torch.empty_like(source), torch.empty_like(square)
    graphs = {
        "empty": repeated(lambda: one.add_(1), EMPTY),
        "product": repeated(lambda: torch.mm(square, square, out=product), PRODUCTS),
        "copy": repeated(lambda: target.copy_(source), COPIES),
    }
    seconds = {name: percentile(samples, 50) for name, samples in interleave(graphs, budget_s).items()}
    return {
        "empty_kernel_us": seconds["empty"] / EMPTY * 1e6,
        "matmul_tflops": 2 * MATRIX**3 * PRODUCTS / seconds["product"] / 1e12,
        "copy_terabytes_per_s": 2 * COPIED * source.element_size() * COPIES / seconds["copy"] / 1e12,
    }


def measure(
    case: LayerCase, dtype: torch.dtype, device: str, times: tune.Times, matmul_tflops: float
) -> dict[str, Any]:
    """The row of one layer: microseconds in turns, and cuDNN's share of the matrix product's rate.

    The block kernel's are None for layers with fewer input channels than a block.
    """
    problems = {
        density: tune.make_problem(replace(case, density=density), BLOCK, dtype, device) for density in DENSITIES
    }
    calls = {"cudnn": problems[1.0].dense()}
    if case.inputs >= BLOCK[1]:
        for density, problem in problems.items():
            tune.check(problem, None)
            calls[density] = problem.call(None)
    y, truth = calls["cudnn"](), problems[1.0].truth
    if not (error := relative_error(y, truth)) <= TOLERANCE[y.dtype]:
        raise VerificationError(f"{case}: cuDNN differs from the reference by {error:.2e}: not timed")
    us = times(calls)
    flops = 2 * case.inputs * case.outputs * case.taps**2 * case.multiplications_per_weight
    rate = flops / us["cudnn"] / 1e6
    return {
        "layer": _name(case),
        "batch": case.batch,
        "dtype": str(dtype).removeprefix("torch."),
        "cudnn_us": us["cudnn"],
        "cudnn_tflops": rate,
        "cudnn_of_matmul": rate / matmul_tflops,
        "block_us_density_1": us.get(1.0),
        "block_us_density_0.2": us.get(0.2),
    }


def _name(case: LayerCase) -> str:
    return str(case).partition("-batch")[0]


def cases(batches: Sequence[int]) -> list[LayerCase]:
    """Every distinct convolution of the three networks at each batch size."""
    shapes = dict.fromkeys(replace(case, batch=1, density=1.0) for case in LAYERS)
    return [replace(case, batch=batch) for batch, case in itertools.product(batches, shapes)]


def table(content: results.Results) -> str:
    """A results file as Markdown."""
    ground = content["ground"]
    lines = [
        f"empty kernel {ground['empty_kernel_us']:.2f} us, matrix product {ground['matmul_tflops']:.0f} TFLOP/s, copy "
        f"{ground['copy_terabytes_per_s']:.2f} TB/s",
        "",
        "| layer | batch | cuDNN us | of the matrix product | block, density 1.0 | block, density 0.2 |",
        "|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        blocks = [row["block_us_density_1"], row["block_us_density_0.2"]]
        cells = [row["layer"], str(row["batch"]), f"{row['cudnn_us']:.2f}", f"{row['cudnn_of_matmul']:.0%}"]
        cells += ["-" if us is None else f"{us:.2f} us, {row['cudnn_us'] / us:.2f}x" for us in blocks]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all of it and writes the results file as it goes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ground", description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 16, 1], metavar="N")
    parser.add_argument("--dtype", choices=tune.DTYPES, default="float16")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds to time one layer (default: 0.3)")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="after which no further layer is begun")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file, or folder to put one in")
    parser.add_argument("--append", action="store_true", help="go on with the file of today, or the one named")
    arguments = parser.parse_args(argv)
    if why := find("triton").available().why:
        parser.error(why)
    run(arguments, "cuda", partial(tune.graph_times, budget_s=arguments.budget), partial(parser.error))


def run(arguments: argparse.Namespace, device: str, times: tune.Times, error: Any) -> None:
    """What the command does, on a device and by a clock of the caller's."""
    dtype, file = tune.DTYPES[arguments.dtype], arguments.out
    if file.is_dir():
        file = file / f"ground-cuda-{datetime.now(timezone.utc):%Y-%m-%d}.json"
    command = "python -m benchmarks.ground" + "".join(f" {argument}" for argument in sys.argv[1:])
    content = results.results([], command)
    if arguments.append and file.exists():
        old = results.read(file)
        if why := results.mismatch(old, content):
            return error(f"--append: {file} is of another run: {why}")
        content = old
    begin, before = time.monotonic(), torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with torch.inference_mode():
            if "ground" not in content:
                content["ground"] = machine_rates(dtype, device, arguments.budget)
            done = {(row["layer"], row["batch"], row["dtype"]) for row in content["rows"]}
            left = [case for case in cases(arguments.batches) if (_name(case), case.batch, arguments.dtype) not in done]
            for case in tqdm(left, unit="layer", file=sys.stderr):
                if arguments.limit is not None and time.monotonic() - begin > arguments.limit:
                    break
                content["rows"].append(measure(case, dtype, device, times, content["ground"]["matmul_tflops"]))
                results.write(content, file)
    finally:
        torch.backends.cudnn.benchmark = before
    results.write(content, file)
    print(f"{table(content)}\n\nwritten: {file}")


if __name__ == "__main__":
    main()
