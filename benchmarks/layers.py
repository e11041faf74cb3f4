"""How near each convolution comes to what the core can do: ``python -m benchmarks.layers``.

The yardstick is a large dense matrix product in the same run, in turns with the layers: the rate of multiplications
that a program gets out of the core if nothing but them matters. Only products with non-zeros count, those on padding
included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.cases import LAYERS, LayerCase
from smart import results
from smart_kernels import native, reference
from smart_kernels.backends import find
from smart_kernels.geometry import Geometry
from smart_kernels.timing import interleave, percentile
from smart_kernels.verify import TOLERANCE, VerificationError, relative_error

RESULTS = Path(__file__).with_name("results")
MATRIX = 1024
BACKENDS = ("dense", "cpu")


def measure(case: LayerCase, budget_s: float) -> dict[str, Any]:
    """The row of one layer, outputs verified before: shapes, microseconds of both backends, rates in GFLOP/s."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(case.outputs, case.inputs, case.taps, case.taps, generator=generator)
    mask = torch.rand(weight.shape, generator=generator) < case.density
    geometry = Geometry.of(weight.shape, case.stride, padding=case.taps // 2)
    x = torch.randn(case.batch, case.inputs, case.size, case.size, generator=generator)
    square = torch.randn(MATRIX, MATRIX, generator=generator)
    calls: dict[str, Callable[[], object]] = {"matrix": partial(torch.mm, square, square)}
    with torch.inference_mode():
        truth = reference.sparse_conv2d(x, weight * mask, geometry)
        for name in BACKENDS:
            run = find(name).bind(find(name).pack(weight, {"clean": mask}), geometry, "clean", None, None, False)
            if not (error := relative_error(run(x, None), truth)) <= TOLERANCE[torch.float32]:
                raise VerificationError(f"{case}: {name} differs from the reference by {error:.2e}: not timed")
            calls[name] = partial(run, x, None)
        us = {name: percentile(samples, 50) * 1e6 for name, samples in interleave(calls, budget_s).items()}
    nonzeros = int(mask.sum())
    rate = 2 * nonzeros * case.multiplications_per_weight / us["cpu"] / 1e3
    yardstick = 2 * MATRIX**3 / us["matrix"] / 1e3
    return {
        "layer": str(case),
        "inputs": case.inputs,
        "outputs": case.outputs,
        "taps": case.taps,
        "stride": case.stride,
        "size": case.size,
        "batch": case.batch,
        "density": nonzeros / weight.numel(),
        "threads": torch.get_num_threads(),
        "dense_us": us["dense"],
        "sparse_us": us["cpu"],
        "gflops_on_nonzeros": rate,
        "matrix_product_gflops": yardstick,
    }


def markdown(content: results.Results, name: str) -> str:
    """A results file as a Markdown table."""
    heading = ["layer", "map", "batch", "density", "dense us", "sparse us", "speed-up", "GFLOP/s on non-zeros"]
    heading.append("of a matrix product")
    lines = [f"| {' | '.join(heading)} |", "|" + "---|" * len(heading)]
    for row in content["rows"]:
        layer = f"{row['taps']}x{row['taps']}, {row['inputs']} to {row['outputs']}"
        layer += f", stride {row['stride']}" if row["stride"] > 1 else ""
        cells = [
            layer,
            f"{row['size']}x{row['size']}",
            str(row["batch"]),
            f"{row['density']:.2f}",
            f"{row['dense_us']:.0f}",
            f"{row['sparse_us']:.0f}",
            f"{row['dense_us'] / row['sparse_us']:.2f}x",
            f"{row['gflops_on_nonzeros']:.0f}",
            f"{row['gflops_on_nonzeros'] / row['matrix_product_gflops']:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"{content['machine']['cpu']}, 1 thread, float32, torch {content['versions']['torch']}, medians in turns, "
        f"outputs verified before. Measured at commit `{content['commit']}` with `{content['command']}`: "
        f"[{name}](../benchmarks/results/{name}).",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures all layers and writes their results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each layer")
    parser.add_argument("--only", default="", metavar="TEXT", help="layers whose name contains this")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file, or folder to put one in")
    arguments = parser.parse_args()
    if why := native.missing():
        parser.error(why)
    torch.set_num_threads(1)
    cases = [case for case in dict.fromkeys(LAYERS) if arguments.only in str(case)]
    rows = [measure(case, arguments.budget) for case in tqdm(cases, unit="layer", file=sys.stderr)]
    if not rows:
        parser.error(f"no layer's name contains {arguments.only!r}: they are like {LAYERS[0]}")
    out = arguments.out
    file = out / f"layers-cpu-{datetime.now(timezone.utc):%Y-%m-%d}.json" if out.is_dir() else out
    command = "python -m benchmarks.layers" + "".join(f" {argument}" for argument in sys.argv[1:])
    results.write(results.results(rows, command), file)
    print(f"written: {file}")


if __name__ == "__main__":
    main()
