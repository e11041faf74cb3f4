"""How the Triton kernels cut up a layer: measured where a GPU's name is known, by rule of thumb elsewhere.

``schedules.json`` holds both as data::

    {"version": 1,
     "default": {"2 bytes": {"64": {...}, ...}, ...},  by :func:`kind_of`, then by output channels of a tile
     "gpus": {"NVIDIA H200": {"<layer>": {...}}}}      by name of the GPU, then by :func:`layer_name`

``python -m benchmarks.tune`` writes the second part.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path

import torch

from smart_kernels.geometry import Geometry

FILE = Path(__file__).with_name("schedules.json")
VERSION = 1
MAX_SPLITS = 16
MANY_PIXELS = 2**20
PROCESSORS = 132  # of a GPU that cannot be asked: an H100's
# A program should have so many steps at least, or it is over before its pipeline is full.
MIN_STEPS = 4
_TMA_ALLOWED: ContextVar[bool] = ContextVar("tma_allowed", default=True)


@dataclass(frozen=True)
class Schedule:
    """How one layer is computed.

    Attributes:
        pixels: output pixels of a tile.
        channels: input channels of one step of the product; items of more channels make longer and fewer ones.
        warps: of 32 threads that compute a tile.
        stages: steps whose operands are in shared memory, or on their way there, at a time.
        splits: programs that share the steps of a tile, and whose sums a second kernel adds up; 0 for as many as it
            takes to have work for each multiprocessor.
        through_l1: whether the input is read through the L1 cache, where other taps of it may still lie, or around it.
        tma: whether the kernel in Gluon runs it, whose operands TMA copies: compute capability 9.0 only.
    """

    pixels: int
    channels: int
    warps: int
    stages: int
    splits: int = 0
    through_l1: bool = False
    tma: bool = False

    def __post_init__(self) -> None:
        powers = (self.pixels, self.channels, self.warps)
        if any(number < 1 or number & (number - 1) for number in powers) or self.pixels < 16 or self.channels < 16:
            raise ValueError(f"{self}: pixels, channels and warps are powers of two, pixels and channels at least 16")
        if self.stages < 1 or not 0 <= self.splits <= MAX_SPLITS or self.warps > 32:
            raise ValueError(f"{self}: at least 1 stage, at most 32 warps and {MAX_SPLITS} splits are needed")
        if self.tma and (self.stages < 2 or self.warps not in (4, 8) or self.pixels > 256 or self.through_l1):
            raise ValueError(
                f"{self}: with TMA, at least 2 stages, 4 or 8 warps and at most 256 pixels; L1 has no part"
            )

    @property
    def numbers(self) -> list[int]:
        """All of it as the one list that custom operators take."""
        return [int(value) for value in astuple(self)]

    @classmethod
    def of_numbers(cls, numbers: Sequence[int]) -> Schedule:
        """The inverse of ``numbers``."""
        *counts, through_l1, tma = numbers
        return cls(*counts, bool(through_l1), bool(tma))


def layer_name(
    geometry: Geometry, dtype: torch.dtype, block: tuple[int, int], tile: int, items: int, pixels: int
) -> str:
    """What layers share a measured schedule: the same convolution and blocks, about as many items a tile and pixels.

    Args:
        items: of an average tile.
        pixels: outputs per channel, of all images together.
    """
    k, c, r, s = geometry.weight_shape
    parts = (
        str(dtype).removeprefix("torch."),
        f"{r}x{s}",
        f"{c} to {k}",
        f"groups {geometry.groups}",
        f"stride {geometry.stride[0]}x{geometry.stride[1]}",
        f"blocks {block[0]}x{block[1]} in {tile}",
        f"items 2^{max(items, 1).bit_length()}",
        f"pixels 2^{max(pixels, 1).bit_length()}",
    )
    return ", ".join(parts)


def find(gpu: str, layer: str, kind: str, tile: int) -> Schedule:
    """The schedule measured for a layer on a GPU, or else the default.

    Args:
        gpu: its name, as torch.cuda.get_device_name gives it.
        layer: what :func:`layer_name` gives.
        kind: what :func:`kind_of` gives.
        tile: output channels of a tile.
    """
    _, measured = read(FILE)
    return measured.get(gpu, {}).get(layer) or default(kind, tile)


def default(kind: str, tile: int) -> Schedule:
    """The schedule of layers that nothing was measured of; arguments as for :func:`find`."""
    defaults, _ = read(FILE)
    return defaults[kind][f"{tile}"]


def tma_allowed() -> bool:
    """Whether schedules with TMA may be taken."""
    return _TMA_ALLOWED.get()


@contextmanager
def without_tma() -> Iterator[None]:
    """What is traced meanwhile holds no kernel in Gluon: it is an operator in Python, and some programs run without."""
    token = _TMA_ALLOWED.set(False)
    try:
        yield
    finally:
        _TMA_ALLOWED.reset(token)


def kind_of(itemsize: int, contiguous: int, precision: str) -> str:
    """Which of the defaults a layer takes.

    Args:
        itemsize: bytes of a number.
        contiguous: input channels that can be copied together.
        precision: of products of float32.
    """
    if contiguous * itemsize < 16:
        return "scattered"  # the addresses of inputs that are read number by number take many registers
    if itemsize == 4 and precision == "tf32x3":
        return "precise"  # so do the parts that numbers are split into
    return f"{itemsize} bytes"


def settle(schedule: Schedule, block_in: int, tiles: int, items: int, processors: int) -> Schedule:
    """Fits a schedule to a layer: whole items a step, no more shared memory than it asks for, and ``splits`` decided.

    Args:
        block_in: input channels of an item.
        tiles: programs there are without splitting; small maps have fewer than the GPU has processors.
        items: of an average tile.
        processors: multiprocessors of the GPU.
    """
    pixels, channels, stages = schedule.pixels, schedule.channels, schedule.stages
    if block_in > channels:
        channels, stages = block_in, max(2, stages * channels // block_in)
        if channels * stages > schedule.channels * schedule.stages:
            pixels = max(16, pixels // 2)
    steps = -(-items * block_in // channels)
    splits = schedule.splits or max(1, min(processors // max(tiles, 1), steps // MIN_STEPS, MAX_SPLITS))
    return replace(schedule, pixels=pixels, channels=channels, stages=stages, splits=splits)


@functools.cache
def read(file: Path) -> tuple[dict[str, dict[str, Schedule]], dict[str, dict[str, Schedule]]]:
    """The defaults and what was measured, both as the file nests them.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}: {VERSION} is needed")
        return tuple(
            {outer: {inner: _schedule(entry) for inner, entry in entries.items()} for outer, entries in part.items()}
            for part in (content["default"], content["gpus"])
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not hold schedules ({error}): restore it, or tune anew") from error


def write(file: Path, gpu: str, measured: dict[str, Schedule]) -> None:
    """Puts what was measured on a GPU into the file, beside what it holds already."""
    content = json.loads(file.read_text(encoding="utf-8"))
    entries = content["gpus"].setdefault(gpu, {})
    entries.update({layer: asdict(schedule) for layer, schedule in measured.items()})
    content["gpus"][gpu] = dict(sorted(entries.items()))
    file.write_text(_text(content), encoding="utf-8")
    read.cache_clear()


def _schedule(entry: dict[str, object]) -> Schedule:
    types = {field.name: bool if isinstance(field.default, bool) else int for field in fields(Schedule)}
    if not isinstance(entry, dict) or entry.keys() != types.keys():
        raise ValueError(f"{entry}: {sorted(types)} are needed")
    if any(type(entry[name]) is not kind for name, kind in types.items()):
        raise ValueError(f"{entry}: integers are needed, and true or false for through_l1 and tma")
    return Schedule(**entry)


def _text(content: dict[str, object]) -> str:
    """JSON with a line for each schedule."""
    lines = [f'{{"version": {content["version"]}']
    for part in ("default", "gpus"):
        outer = [
            f"  {json.dumps(name)}: {{\n"
            + ",\n".join(f"   {json.dumps(inner)}: {json.dumps(entry)}" for inner, entry in entries.items())
            + "}"
            for name, entries in content[part].items()
        ]
        lines.append(f'"{part}": {{' + ("\n" + ",\n".join(outer) if outer else "") + "}")
    return ",\n ".join(lines) + "}\n"
