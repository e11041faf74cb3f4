"""What a network could gain on a GPU: ``python -m benchmarks.roofline resnet34 --pattern block:64x16``.

Each fused layer has two floors: its arithmetic at the peak of what multiplies it, and the bytes it must read and write
at the bandwidth of the memory, each once. The larger one is its time at best; nothing here was measured. Peaks come
from the makers' data sheets (``smart_kernels/backends/gpus.json``), from the command line, or from what
``benchmarks.ground`` measured.

The expected time divides the floors by efficiencies and adds what it takes to start a kernel: assumptions, given on the
command line too. The bound is the ratio of the floors of all layers: what perfect kernels gain over perfect dense ones,
layer by layer, with activations that pass through the memory between layers. Kernels that reach less of the peak of
arithmetic than of the memory's, networks that fuse layers, and activations that stay in the L2 cache can beat it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import smart
import smart_kernels
from smart.text import align
from smart_kernels import compaction, patterns
from smart_kernels.backends import find
from smart_kernels.backends.gpu_costs import GPUS, Efficiency, Floors, Gpu
from smart_kernels.files import write_text
from smart_kernels.modules import SparseConv2d
from smart_kernels.patterns import NM, SLAB, VNM, Block, Channel, Pattern, Unstructured

DTYPES = {"float16": 2, "bfloat16": 2, "tf32": 4, "float32": 4}  # bytes
CODE_BYTES = 4  # of a kept block
Sides = tuple[float, float]  # of its input and output channels, the parts that a layer has left
IMAGES = {"wrn_40_2": (3, 96, 96)}  # of other networks 3x32x32


@dataclass(frozen=True)
class Layer:
    """A fused convolution of one image.

    Attributes:
        shape: of its weight, (K, C/groups, R, S).
        uses: how often each weight is used.
        reads: numbers of its input.
        writes: of its result.
        second: of the second result that it writes beside, in pre-activation networks.
        residual: of the residual it reads.
        masked: whether it has masks.
    """

    name: str
    shape: tuple[int, ...]
    uses: int
    reads: int
    writes: int
    second: int
    residual: int
    masked: bool

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    def holds(self, pattern: Pattern) -> bool:
        """Whether it has masks of this pattern."""
        return self.masked and pattern.misfit(self.shape) is None


def layers_of(network: str, image: Sequence[int]) -> list[Layer]:
    """The fused convolutions that a network of ``smart.list_models()`` is swapped into.

    Args:
        image: (C, H, W).
    """
    model = smart.create_model(network, in_channels=image[0], density=1.0, seed=0).eval()
    x = torch.zeros(1, *image)
    sparse = smart_kernels.swap(model, x, backend="dense")
    masked = {name for name, module in model.named_modules() if hasattr(module, "masks")}
    residuals = {node.target: len(node.args) > 2 and node.args[2] is not None for node in sparse.net.graph.nodes}
    layers: list[Layer] = []

    def note(conv: SparseConv2d, inputs: tuple[Any, ...], output: Any) -> None:
        first, second = output if isinstance(output, tuple) else (output, None)
        name = names[conv]
        layers.append(
            Layer(
                name,
                conv.geometry.weight_shape,
                uses=first[0, 0].numel(),
                reads=inputs[0].numel(),
                writes=first.numel(),
                second=0 if second is None else second.numel(),
                residual=first.numel() if residuals[name] else 0,
                masked=name in masked,
            )
        )

    names = {module: name for name, module in sparse.net.named_modules() if isinstance(module, SparseConv2d)}
    hooks = [conv.register_forward_hook(note) for conv in names]
    with torch.no_grad():
        sparse(x)
    for hook in hooks:
        hook.remove()
    return layers


def channels_of(network: str, image: Sequence[int], pattern: Channel, density: float) -> dict[str, Sides]:
    """The parts of its input and output channels that each layer has left, of random masks on the clean path.

    Activations are compact: tensors carry the channels that live and are needed, filled up as on a GPU
    (:mod:`smart_kernels.compaction`).
    """
    model = smart.create_model(network, in_channels=image[0], density=density, pattern=str(pattern), seed=0).eval()
    sparse = smart_kernels.swap(model, torch.zeros(1, *image), backend="dense", measure=False)
    dense = find("dense")
    compact = compaction.compact(
        sparse.net, "clean", "clean", lambda name, weight, masks, *_: (dense.pack(weight, masks), dense.name)
    )
    if compact is None:
        return {}

    def part(left: int, full: int) -> float:
        return min(-(-left // compaction.GROUP) * compaction.GROUP, full) / full

    return {name: (part(*channels[:2]), part(*channels[2:])) for name, channels in compact.channels.items()}


def floors(
    layer: Layer,
    pattern: Pattern,
    density: float,
    batch: int,
    itemsize: int,
    gpu: Gpu,
    efficiency: Efficiency,
    sides: Sides | None = None,
) -> Floors:
    """The floors of a layer; density 1 is the dense one, whatever the pattern.

    Activations of channel masks stay compact between layers.

    Args:
        sides: of channel masks, the parts of the input and output channels that are left; unless given the root of the
            density each.
    """
    density = density if layer.holds(pattern) or (sides and density < 1) else 1.0
    sparse = density < 1
    flops, peak = 2.0 * layer.weights * layer.uses * batch * density, gpu.tflops
    weight_bytes, (inputs, outputs) = layer.weights * itemsize * density, (1.0, 1.0)
    if sparse and isinstance(pattern, NM):
        # The sparse tensor core multiplies what is kept of 2:4 at twice the rate per weight of the whole.
        flops = 2.0 * layer.weights * layer.uses * batch * max(density, 0.5)
        weight_bytes = layer.weights * (max(density, 0.5) * itemsize + 1 / 8)
    if sparse and isinstance(pattern, VNM):
        # 2:4 within one slab of so many, and a list of those of each V output channels.
        flops = 2.0 * layer.weights * layer.uses * batch * 0.5 / pattern.choices
        weight_bytes = layer.weights * (0.5 * itemsize + 1 / 8 + CODE_BYTES / (pattern.v * SLAB)) / pattern.choices
    if sparse and isinstance(pattern, Block):
        weight_bytes += layer.weights * density / (pattern.out_channels * pattern.in_channels) * CODE_BYTES
    if sparse and isinstance(pattern, Channel):
        inputs, outputs = sides or (density**0.5, density**0.5)
        flops = 2.0 * layer.weights * layer.uses * batch * inputs * outputs
        weight_bytes = layer.weights * itemsize * inputs * outputs
    if sparse and isinstance(pattern, Unstructured):
        peak, weight_bytes = gpu.plain_tflops, layer.weights * (density * itemsize + 1 / 8)
    numbers = batch * (layer.reads * inputs + (layer.writes + layer.second + layer.residual) * outputs)
    return Floors.of(flops, peak, numbers * itemsize + weight_bytes, gpu, efficiency)


def compare(
    layers: Sequence[Layer],
    pattern: Pattern,
    density: float,
    batch: int,
    dtype: str,
    gpu: Gpu,
    efficiency: Efficiency | None = None,
    channels: Mapping[str, Sides] | None = None,
) -> dict[str, Any]:
    """Each layer dense and sparse, and the whole network: microseconds, ``bound`` and ``expected`` speed-up.

    Args:
        channels: of channel masks, as :func:`channels_of` finds them.
    """
    efficiency, rows = efficiency or Efficiency(), []
    for layer in layers:
        sides = (channels or {}).get(layer.name)
        dense, sparse = (
            floors(layer, pattern, each, batch, DTYPES[dtype], gpu, efficiency, sides) for each in (1.0, density)
        )
        rows.append(
            {
                "layer": layer.name,
                "masked": layer.holds(pattern),
                "dense_us": dense.us,
                **{name: value for name, value in asdict(sparse).items()},
                "limit": "arithmetic" if sparse.arithmetic_us >= sparse.memory_us else "memory",
                "bound": dense.us / sparse.us,
                "dense_expected_us": dense.expected_us,
            }
        )
    total = {key: sum(row[key] for row in rows) for key in ("dense_us", "dense_expected_us", "expected_us")}
    total["us"] = sum(max(row["arithmetic_us"], row["memory_us"]) for row in rows)
    return {
        "layers": rows,
        **total,
        "bound": total["dense_us"] / total["us"],
        "expected": total["dense_expected_us"] / total["expected_us"],
    }


def table(result: dict[str, Any]) -> str:
    """What :func:`compare` found, as text."""
    lines = [["layer", "dense us", "arithmetic us", "memory us", "limit", "expected us", "bound"]]
    for row in result["layers"]:
        numbers = [f"{row[key]:.2f}" for key in ("dense_us", "arithmetic_us", "memory_us")]
        name = row["layer"] + ("" if row["masked"] else " (dense)")
        lines.append([name, *numbers, row["limit"], f"{row['expected_us']:.2f}", f"{row['bound']:.2f}x"])
    numbers = [f"{result['dense_us']:.1f}", "", "", "", f"{result['expected_us']:.1f}", f"{result['bound']:.2f}x"]
    lines.append(["all", *numbers])
    note = (
        f"all layers: {result['dense_us']:.1f} us dense and {result['us']:.1f} us sparse at best: a bound of "
        f"{result['bound']:.2f}x; {result['expected']:.2f}x expected. Computed, not measured."
    )
    return f"{align(lines, left=1)}\n{note}"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table of one network."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("network", choices=smart.list_models())
    parser.add_argument("--pattern", default="block:64x16", help=patterns.SPELLINGS)
    parser.add_argument("--density", type=float, default=0.2, help="of the masked layers")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--image", type=int, nargs=3, metavar=("C", "H", "W"), help="default: as the suites have it")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--gpu", default="H200", help=f"of {GPUS.name}")
    parser.add_argument("--tflops", type=float, help="instead of the data sheet's peak")
    parser.add_argument("--bandwidth", type=float, metavar="TB/S", help="instead of the data sheet's")
    parser.add_argument("--ground", type=Path, metavar="FILE", help="results of benchmarks.ground to take both from")
    for name, value in asdict(Efficiency()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=value, help="assumed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it there, too")
    arguments = parser.parse_args(argv)
    try:
        pattern = patterns.parse(arguments.pattern)
        gpu = _gpu(arguments)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if arguments.batch < 1 or not 0 < arguments.density <= 1:
        parser.error("--batch must be at least 1, and --density above 0 and at most 1")
    image = arguments.image or IMAGES.get(arguments.network, (3, 32, 32))
    layers, channels = layers_of(arguments.network, image), None
    if isinstance(pattern, Channel) and arguments.density < 1:
        channels = channels_of(arguments.network, image, pattern, arguments.density)
    efficiency = Efficiency(arguments.arithmetic, arguments.memory, arguments.start_us)
    if min(efficiency.arithmetic, efficiency.memory) <= 0:
        parser.error("--arithmetic and --memory are shares of the peaks: give numbers above 0")
    result = compare(layers, pattern, arguments.density, arguments.batch, arguments.dtype, gpu, efficiency, channels)
    print(table(result))
    if arguments.json:
        given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        write_text(arguments.json, json.dumps({"arguments": given, "gpu": asdict(gpu), **result}, indent=1) + "\n")


def _gpu(arguments: argparse.Namespace) -> Gpu:
    gpu = Gpu.of(arguments.gpu, arguments.dtype)
    if arguments.ground:
        ground = json.loads(arguments.ground.read_text(encoding="utf-8")).get("ground", {})
        if not {"matmul_tflops", "copy_terabytes_per_s"} <= ground.keys():
            raise ValueError(f"{arguments.ground} is no results file of benchmarks.ground")
        gpu = replace(gpu, tflops=ground["matmul_tflops"], terabytes_per_s=ground["copy_terabytes_per_s"])
    if arguments.tflops is not None:
        gpu = replace(gpu, tflops=arguments.tflops)
    if arguments.bandwidth is not None:
        gpu = replace(gpu, terabytes_per_s=arguments.bandwidth)
    if min(gpu.tflops, gpu.terabytes_per_s) <= 0:
        raise ValueError("a peak that is not above 0 bounds nothing: give --tflops and --bandwidth as numbers above 0")
    return gpu


if __name__ == "__main__":
    main()
