"""What Triton's compiler makes of the kernels for GPUs that are not here: ``python -m benchmarks.aot``.

Each body is compiled to a binary for compute capability 8.0 (A100), 9.0 (H100, H200) and 10.0 (B200), with the default
schedules. The table says which instructions multiply, how many registers a thread and how much shared memory a program
takes, and whether anything spills. It says nothing of how fast it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from smart_kernels.backends import schedules
from smart_kernels.packing.block import MAX_ROWS

CAPABILITIES = (80, 90, 100)
POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
INSTRUCTIONS = {"tcgen05.mma": r"tcgen05\.mma", "wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync"}
COPIES = r"cp\.async\.c[ag]\.shared\.global [^;]*, 0x10|cp\.async\.bulk\.tensor"  # of 16 bytes, and of a box
INDICES = ("codes_ptr", "rows_ptr", "starts_ptr", "segments_ptr", "order_ptr", "first_ptr")
RESULTS = ("scale_ptr", "bias_ptr", "residual_ptr", "y_ptr")
SECOND = ("second_scale_ptr", "second_bias_ptr", "second_ptr")


@dataclass(frozen=True)
class Body:
    """One specialisation of a kernel.

    Attributes:
        dtype: of input, weight and result.
        block: output and input channels of a block.
        rows: of blocks in a tile.
        taps: height and width of the kernel.
        contiguous: input channels that are copied together.
        samples: whether each sample has its own path.
        second: whether there is a second result.
        split: whether several programs share a tile.
        precision: of products of float32.
        reduces: whether it is the kernel that adds up what the programs of a split tile found.
        tma: whether it is the kernel in Gluon, for compute capability 9.0.
        stride: of both height and width, which is a constant of that kernel alone.
    """

    dtype: str = "float16"
    block: tuple[int, int] = (64, 16)
    rows: int = 1
    taps: tuple[int, int] = (3, 3)
    contiguous: int = 16
    samples: bool = False
    second: bool = False
    split: bool = False
    precision: str = "tf32"
    reduces: bool = False
    tma: bool = False
    stride: int = 1

    def __str__(self) -> str:
        parts = [self.dtype]
        if not self.reduces:
            parts += [f"{self.taps[0]}x{self.taps[1]}", f"blocks {self.block[0]}x{self.block[1]}"]
        parts += [f"stride {self.stride}"] * (self.stride > 1)
        parts += [f"{self.rows} rows"] * (self.rows > 1) + [self.precision] * (self.dtype == "float32")
        parts += [f"{self.contiguous} channels together"] * (self.contiguous < 8)
        flags = {"samples": self.samples, "second": self.second, "split": self.split, "reduce": self.reduces}
        flags["TMA"] = self.tma
        return ", ".join([*parts, *(name for name, on in flags.items() if on)])

    @property
    def schedule(self) -> schedules.Schedule:
        """The default one for it, with TMA if it has that."""
        itemsize = 4 if self.dtype == "float32" else 2
        kind = schedules.kind_of(itemsize, self.contiguous, self.precision)
        schedule = replace(schedules.default(kind, self.block[0] * self.rows), tma=self.tma)
        return schedules.settle(schedule, self.block[1], 1, 1, 1)

    @property
    def capabilities(self) -> tuple[int, ...]:
        """What it is compiled for."""
        return (90,) if self.tma else CAPABILITIES


BODIES = (
    Body(),
    Body(second=True),
    Body(samples=True, second=True),
    Body(split=True),
    Body(taps=(1, 1)),
    Body(taps=(7, 7)),
    Body(block=(64, 32)),
    Body(block=(64, 64)),
    Body(block=(128, 16)),
    Body(block=(128, 64), samples=True, second=True),
    Body(block=(32, 16), rows=2),
    Body(block=(16, 16), rows=4, samples=True, second=True),
    Body(block=(32, 16)),
    Body(block=(16, 16)),
    Body(contiguous=1),
    Body(contiguous=1, taps=(7, 7), samples=True, second=True),
    Body("bfloat16"),
    Body("bfloat16", samples=True, second=True),
    Body("float32", contiguous=16),
    Body("float32", block=(128, 64), samples=True, second=True),
    Body("float32", precision="tf32x3", second=True),
    Body("float32", block=(16, 16), rows=4, precision="tf32x3", samples=True),
    Body(reduces=True),
    Body(reduces=True, samples=True, second=True),
    Body("float32", reduces=True, samples=True, second=True),
    Body(tma=True),
    Body(tma=True, second=True),
    Body(tma=True, split=True),
    Body(tma=True, taps=(1, 1), stride=2),
    Body(tma=True, taps=(7, 7), stride=2),
    Body(tma=True, block=(64, 32)),
    Body(tma=True, block=(64, 64), second=True),
    Body(tma=True, block=(128, 16)),
    Body(tma=True, block=(128, 64), second=True),
    Body("bfloat16", tma=True, second=True),
)


@dataclass(frozen=True)
class Compiled:
    """What became of a body.

    Attributes:
        instruction: the one that multiplies, a key of ``INSTRUCTIONS``; "none" if there is none.
        copies: instructions that copy 16 bytes, or by TMA a box, into shared memory while others run.
        registers: of each thread.
        shared_bytes: of each program.
        stack_bytes: of each thread; registers spill there.
    """

    instruction: str
    copies: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    ptx: str


def compile_body(body: Body, capability: int) -> Compiled:
    """Compiles for a GPU of this compute capability, which need not be here; needs Triton.

    Raises:
        RuntimeError: Triton interprets kernels in this process.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    source = _source(body)
    schedule = body.schedule
    options = {
        "num_warps": 4 if body.reduces else schedule.warps,
        "num_stages": schedule.stages,
        "enable_fp_fusion": True,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, stack = _resources(compiled.asm["cubin"])
    instruction = next((name for name, pattern in INSTRUCTIONS.items() if re.search(pattern, ptx)), "none")
    copies = len(re.findall(COPIES, ptx))
    return Compiled(instruction, copies, registers, compiled.metadata.shared, stack, ptx)


def _source(body: Body) -> Any:
    """What Triton compiles: a kernel with the types of its arguments, and the values of those that are constants."""
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime import JITFunction

    from smart_kernels.kernels import block, block_tma

    kernel = block.reduce if body.reduces else block_tma.convolve if body.tma else block.convolve
    if not isinstance(block.convolve, JITFunction):
        raise RuntimeError("Triton interprets kernels in this process: unset TRITON_INTERPRET to compile them")
    constants = _reduce_constants(body) if body.reduces else _convolve_constants(body)
    types = dict.fromkeys(("x_ptr", "values_ptr", *RESULTS, *SECOND), POINTERS[body.dtype])
    types |= {**dict.fromkeys(INDICES, "*i32"), "partial_ptr": "*fp32"}
    if body.tma:
        types |= _descriptors(body)
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in names if signature[name].startswith("*")]
    if body.contiguous == 16:
        aligned += [name for name in ("in_channels", "group_in", "out_channels", "group_out") if name in names]
    return (GluonASTSource if body.tma else ASTSource)(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )


def _descriptors(body: Body) -> dict[str, str]:
    """The types of the tensors that TMA reads, of a map of 32x32 pixels."""
    from smart_kernels import tma_ops

    schedule, (block_out, block_in) = body.schedule, body.block
    images, rows, columns = tma_ops.box_of(schedule.pixels, 1, 32, 32)
    step = schedule.channels // block_in
    boxes = {"x_desc": [images, rows, 1, columns, block_in], "values_desc": [step * block_out, block_in]}
    number = POINTERS[body.dtype].removeprefix("*")
    return {name: f"tensordesc<{number}{box},{tma_ops.layout(block_in, len(box))!r}>" for name, box in boxes.items()}


def _convolve_constants(body: Body) -> dict[str, object]:
    """Of both kernels, each of which has some of them."""
    schedule = body.schedule
    absent = ["rows_ptr", "starts_ptr"] * (body.rows == 1) + ["order_ptr", "first_ptr"] * (not body.samples)
    absent += [*RESULTS, *SECOND] if body.split else ["partial_ptr"]
    absent += SECOND * (not body.second)
    return dict.fromkeys(absent) | {
        "R": body.taps[0],
        "S": body.taps[1],
        "BLOCK_OUT": body.block[0],
        "BLOCK_IN": body.block[1],
        "ROWS": body.rows,
        "MAX_ROWS": MAX_ROWS,
        "CONTIGUOUS": body.contiguous,
        "RELU": True,
        "SECOND_RELU": True,
        "PRECISION": body.precision,
        "WIDEN": False,
        "CACHE": ".ca" if schedule.through_l1 else "",
        "BLOCK_N": schedule.pixels,
        "BLOCK_K": schedule.channels,
        "TAPS": body.taps[0] * body.taps[1],
        "STRIDE_H": body.stride,
        "STRIDE_W": body.stride,
        "STAGES": schedule.stages,
        "WARPS": schedule.warps,
    }


def _reduce_constants(body: Body) -> dict[str, object]:
    from smart_kernels.triton_ops import REDUCED

    absent = ["order_ptr", "first_ptr"] * (not body.samples) + [*SECOND] * (not body.second)
    sizes = dict(zip(("BLOCK_N", "BLOCK_M"), REDUCED, strict=True))
    return dict.fromkeys(absent) | {"RELU": True, "SECOND_RELU": True} | sizes


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of each thread, read from the binary by the tool that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


def table(only: str = "") -> Iterator[str]:
    """Lines of a Markdown table of all bodies whose name contains ``only``."""
    yield "| body | compute capability | multiplies with | copies | registers | shared KiB | stack bytes |"
    yield "|---|---|---|---|---|---|---|"
    bodies = [body for body in BODIES if only in str(body)]
    for body in tqdm(bodies, unit="body", file=sys.stderr):
        for capability in body.capabilities:
            made = compile_body(body, capability)
            cells = (body, capability / 10, made.instruction, made.copies, made.registers)
            cells = (*cells, f"{made.shared_bytes / 1024:.0f}", made.stack_bytes)
            yield f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="bodies whose name contains this")
    arguments = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        parser.error("Triton is not installed: pip install triton")
    for line in table(arguments.only):
        print(line, flush=True)


if __name__ == "__main__":
    main()
