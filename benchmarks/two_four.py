"""The 2:4 kernel by itself on the GPU at hand: ``python -m benchmarks.two_four``; in float32, the direct kernel.

For the layers of the three networks it runs every tile of the kernel, on small maps also with split-K, and of the
bitmap kernel where the masks suit it, each verified against the reference before it is timed, beside torch's
convolution with bias and ReLU. All run as CUDA graphs, in turns, on data that lies in the L2 cache if it fits. A
results file keeps the times.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
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
from benchmarks.tune import DTYPES, RESULTS, Times, graph_times
from smart import results
from smart.masks import check_density, random_masks
from smart_kernels import bitmap_ops, direct_ops, patterns, reference, two_four_ops
from smart_kernels.backends import find
from smart_kernels.backends.tensor_cores import Schedule
from smart_kernels.geometry import Geometry
from smart_kernels.packing import PackedWeight, TwoFourWeight
from smart_kernels.verify import TOLERANCE, VerificationError, relative_error

# Thread blocks that share the columns of a small tile, 64 pixels x 64 channels, while there are no more than two for
# each multiprocessor of an H200.
SPLITS = (2, 4, 8, 12, 16)
SMALL, MAX_THREAD_BLOCKS = 64, 264


@dataclass(frozen=True)
class Problem:
    """A layer on the device, ready to be measured; ``truth`` is what it has to compute, in float32."""

    packed: PackedWeight
    geometry: Geometry
    x: Tensor
    bias: Tensor
    truth: Tensor

    @property
    def backend(self) -> str:
        return backend_of(self.x.dtype)

    @property
    def tiles(self) -> tuple[str, ...]:
        return direct_ops.TILES if self.backend == "direct" else two_four_ops.TILES

    @property
    def tall(self) -> int | None:
        """Slabs that leave out the same runs of columns, where the weight does so."""
        return self.packed.tall if isinstance(self.packed, TwoFourWeight) else None

    def runnable(self) -> list[int]:
        """Tiles that run the weight."""
        return [i for i in range(len(self.tiles)) if self.tall is None or two_four_ops.TILE_SLABS[i] <= self.tall]

    def splits(self) -> list[int]:
        """Numbers of splits that may pay, beside none: where small tiles leave multiprocessors without work."""
        if not isinstance(self.packed, TwoFourWeight):
            return []
        tiles = -(-self.truth[:, 0].numel() // SMALL) * -(-self.truth.shape[1] // SMALL)
        return [n for n in SPLITS if n <= self.packed.blocks and tiles * n <= MAX_THREAD_BLOCKS]

    def calls(self) -> dict[str, Callable[[], Tensor]]:
        """The layer by each tile, by the smallest that runs it with splits, and as it is done by itself."""
        ways: dict[str, Any] = {self.tiles[tile]: self.schedule(tile) for tile in self.runnable()}
        split = "small" if "small" in ways else "narrow"
        ways |= {f"{split}_{n}": self.schedule(self.tiles.index(split), n) for n in self.splits()}
        return {f"{name}_us": self.call(schedule) for name, schedule in {**ways, "chosen": None}.items()}

    def schedule(self, tile: int, splits: int = 1) -> Any:
        """A tile in the terms of the backend."""
        return tile if self.backend == "direct" else Schedule(tile, splits)

    def call(self, schedule: Any) -> Callable[[], Tensor]:
        """Runs the layer in one way; None leaves that to the operator."""
        arguments = (self.packed, self.geometry, self.packed.paths[0], None, self.bias, True, None)
        return partial(find(self.backend).bind(*arguments, schedule=schedule), self.x, None)

    def hopper_calls(self) -> dict[str, Callable[[], Tensor]]:
        """The tiles of the wgmma backend, where that runs the layer, on small maps also with the splits it takes."""
        wgmma, arguments = (
            find("wgmma"),
            (self.packed, self.geometry, self.packed.paths[0], None, self.bias, True, None),
        )
        if self.backend != "cuda" or self.tall or not wgmma.supports(self.geometry, self.x.dtype, self.x.device):
            return {}
        ways = {}
        for tile, name in enumerate(two_four_ops.WGMMA_TILES, len(self.tiles)):
            ways[name] = Schedule(tile, splits=1)
            if self.splits():
                ways[f"{name} split"] = Schedule(tile)
        return {
            f"{name.replace(' ', '_')}_us": partial(wgmma.bind(*arguments, schedule=schedule), self.x, None)
            for name, schedule in ways.items()
        }

    def bitmap_calls(self) -> dict[str, Callable[[], Tensor]]:
        """The tiles of the bitmap backend, where the masks suit it, and what it takes by itself."""
        bitmap, (weight, masks) = find("bitmap"), self.packed.unpack()
        able = bitmap.supports(self.geometry, self.x.dtype, self.x.device) and bitmap.suits(masks)
        if self.backend != "cuda" or not able:
            return {}
        packed = bitmap.pack(weight, masks)
        arguments = (packed, self.geometry, packed.paths[0], None, self.bias, True, None)
        ways = {name: Schedule(tile, splits=1) for tile, name in enumerate(bitmap_ops.TILES)} | {"chosen": None}
        return {
            f"bitmap_{name}_us": partial(bitmap.bind(*arguments, schedule=schedule), self.x, None)
            for name, schedule in ways.items()
        }

    def dense(self) -> Callable[[], Tensor]:
        """torch's convolution, in one kernel with bias and ReLU where cuDNN has it."""
        weight = self.packed.dense(self.packed.paths[0]).contiguous(memory_format=torch.channels_last)
        g = self.geometry
        arguments = (self.x, weight, self.bias, g.stride, (g.padding[0], g.padding[2]), g.dilation, g.groups)
        if self.x.is_cuda:
            return partial(torch.ops.aten.cudnn_convolution_relu.default, *arguments)
        return lambda: F.conv2d(*arguments).relu_()


def backend_of(dtype: torch.dtype) -> str:
    """The backend whose kernel runs this type."""
    return "direct" if dtype == torch.float32 else "cuda"


def random_mask(shape: tuple[int, ...], pattern: str, density: float, generator: torch.Generator) -> Tensor:
    """A mask that obeys the pattern; unstructured ones keep ``density`` of the weights."""
    parsed = patterns.parse(pattern)
    if isinstance(parsed, patterns.NM):
        k, c, r, s = shape
        scores = torch.rand((k, c // parsed.m, parsed.m, r, s), generator=generator)
        return (scores.argsort(dim=2) < parsed.n).reshape(shape)
    if isinstance(parsed, patterns.VNM):
        return random_masks(shape, check_density(None, parsed), "shared", generator, parsed)["clean"]
    if not isinstance(parsed, patterns.Unstructured):
        raise ValueError(f"pattern {pattern!r}: accepted are 'unstructured', N:M and V:N:M")
    return torch.rand(shape, generator=generator) < density


def make_problem(case: LayerCase, pattern: str, dtype: torch.dtype, device: torch.device | str) -> Problem:
    """The layer of a case with a random mask."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.outputs, case.inputs // case.groups, case.taps, case.taps)
    mask = random_mask(shape, pattern, case.density, generator)
    weight = torch.randn(shape, generator=generator).to(device, dtype)
    geometry = Geometry.of(shape, case.stride, padding=case.taps // 2, groups=case.groups)
    x = torch.randn(case.batch, case.inputs, case.size, case.size, generator=generator).to(device, dtype)
    bias = torch.randn(case.outputs, generator=generator).to(device, dtype)
    packed = find(backend_of(dtype)).pack(weight, {"clean": mask.to(device)}, case.groups)
    with torch.backends.cudnn.flags(allow_tf32=False):
        truth = reference.sparse_conv2d(
            x.float(), packed.dense("clean").float(), geometry, None, bias.float(), None, True
        )
    return Problem(packed, geometry, x.contiguous(memory_format=torch.channels_last), bias, truth)


def runs(case: LayerCase, pattern: str) -> bool:
    """Whether the kernels run the layer: the first ones of networks, of three input channels, in unstructured masks."""
    if case.inputs % 8:
        return pattern == "unstructured" and case.groups == 1
    return case.inputs % (4 * case.groups) == 0 and case.outputs % case.groups == 0


def row(case: LayerCase, pattern: str, problem: Problem, times: Times) -> dict[str, Any]:
    """What is kept of a layer: the time in each way and in the one chosen, and that of the dense convolution.

    Raises:
        VerificationError: a tile computes something else than the reference; nothing was timed then.
    """
    calls = problem.calls() | problem.hopper_calls() | problem.bitmap_calls()
    for name, call in calls.items():
        y = call()
        if not (error := relative_error(y, problem.truth)) <= TOLERANCE[y.dtype]:
            raise VerificationError(f"{case} by {name.removesuffix('_us')} differs by {error:.2e}: nothing was timed")
    packed = problem.packed
    steps = {}
    if isinstance(packed, TwoFourWeight):
        steps["steps"] = 1 + packed.extra_steps("clean") / (packed.slabs * packed.steps)
    return {
        "layer": str(case),
        "pattern": pattern,
        "dtype": str(problem.x.dtype).removeprefix("torch."),
        "batch": case.batch,
        "density": packed.density("clean"),
        **steps,
        "weight_bytes": packed.nbytes,
        **times({**calls, "dense_us": problem.dense()}),
    }


def main() -> None:
    """Measures all layers, and writes the file as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 256], metavar="N")
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4", "1:4"], metavar="PATTERN")
    parser.add_argument("--density", type=float, default=0.2, help="of unstructured masks")
    parser.add_argument("--groups", type=int, default=1, help="of each layer whose channels these divide")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--only", default="", metavar="TEXT", help="layers whose name contains this")
    parser.add_argument("--budget", type=float, default=0.2, help="seconds for the times of one layer")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file, or folder to put one in")
    arguments = parser.parse_args()
    dtype = DTYPES[arguments.dtype]
    backend = backend_of(dtype)
    if why := find(backend).available().why:
        parser.error(why)
    alike = {"batch": 1, "density": arguments.density, "groups": arguments.groups}
    shapes = dict.fromkeys(replace(case, **alike) for case in LAYERS)
    cases = [
        (replace(case, batch=batch), pattern)
        for case, batch, pattern in itertools.product(shapes, arguments.batches, arguments.patterns)
        if runs(case, pattern)
    ]
    cases = [(case, pattern) for case, pattern in cases if arguments.only in str(case)]
    if not cases:
        parser.error(f"no layer's name contains {arguments.only!r}: they are like {LAYERS[0]}")
    file = arguments.out
    if file.is_dir():
        file = (
            file / f"{'direct' if backend == 'direct' else 'two-four'}-cuda-{datetime.now(timezone.utc):%Y-%m-%d}.json"
        )
    times = partial(graph_times, budget_s=arguments.budget)
    command = "python -m benchmarks.two_four" + "".join(f" {argument}" for argument in sys.argv[1:])
    rows = []
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # dense in float32 is to be exact, too
    with torch.inference_mode():
        for case, pattern in tqdm(cases, unit="layer", file=sys.stderr):
            problem = make_problem(case, pattern, dtype, "cuda")
            rows.append(row(case, pattern, problem, times))
            results.write(results.results(rows, command), file)
    print(f"written: {file}")


if __name__ == "__main__":
    main()
