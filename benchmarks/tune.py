"""Finds the Triton kernels' schedules on the GPU at hand: ``python -m benchmarks.tune``.

For the layers of the three networks it measures candidates, each verified against the reference before it is timed, and
writes the fastest into ``smart_kernels/backends/schedules.json`` under the GPU's name, from where it is found by layers
that are alike. A results file keeps the time of each layer beside that of torch's own convolution with bias and ReLU.
Both run as CUDA graphs, in turns, on data that lies in the L2 cache if it fits. Layers that have a schedule are
measured with it and not tuned again.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks.cases import LAYERS, LayerCase
from smart import results
from smart_kernels import reference
from smart_kernels.backends import find, schedules
from smart_kernels.backends.schedules import Schedule
from smart_kernels.backends.triton import covered_by_tma
from smart_kernels.geometry import Geometry
from smart_kernels.packing import BlockWeight
from smart_kernels.timing import interleave, percentile
from smart_kernels.verify import TOLERANCE, VerificationError, relative_error

RESULTS = Path(__file__).with_name("results")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
REPEATS = 20  # calls in one graph: what it takes to start one is then no matter
FINALISTS = 3  # schedules of the first round that try splits and the L1 cache in the second
SPLITS = (1, 2, 4, 8, 16)
# float32 sums of a program that stay in each thread's registers: fewer leave threads idle, more spill.
SUMS = (8, 128)

Times = Callable[[Mapping[Any, Callable[[], object]]], dict[Any, float]]


@dataclass(frozen=True)
class Problem:
    """A layer on the device, ready to be measured."""

    packed: BlockWeight
    geometry: Geometry
    x: Tensor
    bias: Tensor
    truth: Tensor

    @property
    def shared_bytes(self) -> int:
        """What a program may take of the GPU's shared memory."""
        return torch.cuda.get_device_properties(self.x.device).shared_memory_per_block_optin

    @property
    def layer(self) -> str:
        """Its name in the file of schedules."""
        packed, pixels = self.packed, self.truth.numel() // self.truth.shape[1]
        items = packed.items_per_tile(packed.paths[0])
        return schedules.layer_name(self.geometry, self.x.dtype, packed.block, packed.tile, items, pixels)

    @property
    def covered_by_tma(self) -> bool:
        """Whether the kernel with TMA computes it on this device."""
        return covered_by_tma(self.geometry, self.packed.values, self.packed.rows_per_tile, self.x.shape[2:]).ok

    def call(self, schedule: Schedule | None) -> Callable[[], Tensor]:
        """Runs the layer by a schedule, or by the one kept for it."""
        arguments = (self.packed, self.geometry, self.packed.paths[0], None, self.bias, True, None)
        return partial(find("triton").bind(*arguments, schedule=schedule), self.x, None)

    def dense(self) -> Callable[[], Tensor]:
        """torch's convolution, in one kernel with bias and ReLU where cuDNN has it."""
        weight = self.packed.dense(self.packed.paths[0]).contiguous(memory_format=torch.channels_last)
        g = self.geometry
        padding = (g.padding[0], g.padding[2])
        if self.x.is_cuda:
            fused = torch.ops.aten.cudnn_convolution_relu.default
            return partial(fused, self.x, weight, self.bias, g.stride, padding, g.dilation, g.groups)
        return lambda: F.conv2d(self.x, weight, self.bias, g.stride, padding, g.dilation, g.groups).relu_()


def make_problem(case: LayerCase, block: tuple[int, int], dtype: torch.dtype, device: torch.device | str) -> Problem:
    """The layer of a case with random blocks, and what it has to compute, in float32."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.outputs, case.inputs, case.taps, case.taps)
    kept = (-(-case.outputs // block[0]), -(-case.inputs // block[1]), case.taps, case.taps)
    mask = torch.rand(kept, generator=generator) < case.density
    mask = mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: case.outputs, : case.inputs]
    weight = torch.randn(shape, generator=generator).to(device, dtype)
    geometry = Geometry.of(shape, case.stride, padding=case.taps // 2)
    x = torch.randn(case.batch, case.inputs, case.size, case.size, generator=generator).to(device, dtype)
    bias = torch.randn(case.outputs, generator=generator).to(device, dtype)
    packed = BlockWeight(weight, {"clean": mask.contiguous().to(device)})
    with torch.backends.cudnn.flags(allow_tf32=False):
        truth = reference.sparse_conv2d(x.float(), packed.dense("clean").float(), geometry, None, bias, None, True)
    return Problem(packed, geometry, x.contiguous(memory_format=torch.channels_last), bias, truth)


def candidates(tile: int, block_in: int, itemsize: int, shared_bytes: int, tma: bool = False) -> Iterator[Schedule]:
    """Schedules of a tile that its operands and sums fit into, unsplit where there are enough tiles.

    Args:
        tma: whether the kernel with TMA covers the layer: all of them by that kernel too.
    """
    sizes = itertools.product((32, 64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5))
    for pixels, channels, warps, stages in sizes:
        fits = (tile + pixels) * channels * itemsize * stages <= shared_bytes
        if channels >= block_in and fits and SUMS[0] <= tile * pixels // (32 * warps) <= SUMS[1]:
            yield Schedule(pixels, channels, warps, stages)
            if tma:
                yield Schedule(pixels, channels, warps, stages, tma=True)


def tune(problem: Problem, times: Times, tma: bool = True) -> Schedule:
    """The fastest schedule of all candidates.

    Args:
        times: calls by name -> microseconds by name.
        tma: whether the kernel with TMA is one, where it covers the layer.

    Raises:
        VerificationError: one of them computes something else.
        ValueError: none of them runs.
    """
    packed = problem.packed
    tma = tma and problem.covered_by_tma
    first = candidates(packed.tile, packed.block[1], problem.x.element_size(), problem.shared_bytes, tma)
    best = _rank(problem, list(first), times)
    second = [
        replace(schedule, splits=splits, through_l1=through_l1)
        for schedule in best[:FINALISTS]
        for splits in SPLITS
        for through_l1 in ((False,) if schedule.tma else (False, True))
    ]
    return _rank(problem, second, times)[0]


def _rank(problem: Problem, schedules_: list[Schedule], times: Times) -> list[Schedule]:
    calls = {schedule: problem.call(schedule) for schedule in schedules_ if check(problem, schedule)}
    if not calls:
        raise ValueError(f"none of {len(schedules_)} schedules runs {problem.layer} on this GPU")
    us = times(calls)
    return sorted(us, key=us.__getitem__)


def check(problem: Problem, schedule: Schedule | None) -> bool:
    """Whether a schedule runs here; some take more registers or shared memory than there are.

    Raises:
        VerificationError: it runs, and computes something else.
    """
    try:
        y = problem.call(schedule)()
    except Exception as error:
        if type(error).__name__ != "OutOfResources":
            raise
        return False
    if not (error := relative_error(y, problem.truth)) <= TOLERANCE[y.dtype]:
        raise VerificationError(f"{problem.layer} by {schedule} differs from the reference by {error:.2e}: not timed")
    return True


def graph_times(calls: Mapping[Any, Callable[[], object]], budget_s: float) -> dict[Any, float]:
    """Median microseconds of calls captured as CUDA graphs, in turns."""
    graphs = {}
    for name, call in calls.items():
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for _ in range(REPEATS):
                call()
    seconds = interleave({name: graph.replay for name, graph in graphs.items()}, budget_s)
    return {name: percentile(samples, 50) / REPEATS * 1e6 for name, samples in seconds.items()}


def row(case: LayerCase, problem: Problem, times: Times) -> dict[str, Any]:
    """What is kept of a layer: the time by its schedule, and that of the dense convolution, of verified outputs."""
    check(problem, None)
    us = times({"triton": problem.call(None), "dense": problem.dense()})
    nonzeros = problem.packed.nonzeros("clean")
    return {
        "layer": str(case),
        "block": "x".join(map(str, problem.packed.block)),
        "dtype": str(problem.x.dtype).removeprefix("torch."),
        "batch": case.batch,
        "density": nonzeros / problem.truth.shape[1] / case.inputs / case.taps**2,
        "triton_us": us["triton"],
        "dense_us": us["dense"],
        "tflops_on_nonzeros": 2 * nonzeros * case.multiplications_per_weight / us["triton"] / 1e6,
    }


def main() -> None:
    """Tunes and measures all layers, and writes both files as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 256], metavar="N")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.2, 1.0], metavar="D")
    parser.add_argument("--block", type=int, nargs=2, default=[64, 16], metavar=("OUT", "IN"))
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--only", default="", metavar="TEXT", help="layers whose name contains this")
    parser.add_argument("--without-tma", action="store_true", help="leaves out the kernel in Gluon for Hopper")
    parser.add_argument("--again", action="store_true", help="tunes layers that have a schedule too")
    parser.add_argument("--budget", type=float, default=0.2, help="seconds to time the candidates of one round")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file, or folder to put one in")
    arguments = parser.parse_args()
    if why := find("triton").available().why:
        parser.error(why)
    gpu = torch.cuda.get_device_name()
    times = partial(graph_times, budget_s=arguments.budget)
    shapes = dict.fromkeys(replace(case, batch=1) for case in LAYERS if case.inputs >= arguments.block[1])
    cases = [
        replace(case, batch=batch, density=density)
        for case, batch, density in itertools.product(shapes, arguments.batches, arguments.densities)
    ]
    cases = [case for case in cases if arguments.only in str(case)]
    if not cases:
        parser.error(f"no layer's name contains {arguments.only!r}: they are like {LAYERS[0]}")
    file = arguments.out
    if file.is_dir():
        file = file / f"layers-cuda-{datetime.now(timezone.utc):%Y-%m-%d}.json"
    rows = []
    torch.backends.cudnn.benchmark = True
    with torch.inference_mode():
        for case in tqdm(cases, unit="layer", file=sys.stderr):
            problem = make_problem(case, tuple(arguments.block), DTYPES[arguments.dtype], "cuda")
            _, measured = schedules.read(schedules.FILE)
            if arguments.again or problem.layer not in measured.get(gpu, {}):
                schedules.write(schedules.FILE, gpu, {problem.layer: tune(problem, times, not arguments.without_tma)})
            rows.append(row(case, problem, times))
            command = "python -m benchmarks.tune" + "".join(f" {argument}" for argument in sys.argv[1:])
            results.write(results.results(rows, command), file)
    print(f"written: {schedules.FILE} and {file}")


if __name__ == "__main__":
    main()
