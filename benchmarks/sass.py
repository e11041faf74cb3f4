"""What nvcc made of the CUDA kernels in the compiled library: ``python -m benchmarks.sass``.

For each kernel and GPU generation: which instructions multiply, copy and load, registers and shared memory of a thread
block, and whether anything spills. It needs no GPU, and says nothing of how fast it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from smart_kernels import bitmap_ops, direct_ops, native, two_four_ops

# As SASS spells them: sparse tensor cores, copies into shared memory beside other work, matrices loaded from there;
# multiplications of float32, and their operands from shared memory, four or fewer at once; values of bitmaps from
# there, one by one; Hopper's own sparse tensor cores, and its copies of tensors and of bytes.
INSTRUCTIONS = {
    "HMMA.SP": r"\bHMMA\.SP",
    "HMMA": r"\bHMMA\.(?!SP)",
    "LDGSTS": r"\bLDGSTS",
    "LDSM": r"\bLDSM",
    "FFMA": r"\bFFMA\b",
    "LDS.128": r"\bLDS(\.U)?\.128",
    "LDS.U16": r"\bLDS\.U16",
    "HGMMA.SP": r"\bHGMMA\.SP",
    "UTMALDG": r"\bUTMALDG",
    "UBLKCP": r"\bUBLKCP",
}
# The tiles of csrc/cuda/two_four.h by their traits: slabs and pixels of a warp, rows and columns of warps.
TILES = {(2, 64, 2, 2): "large", (2, 32, 1, 4): "flat", (1, 32, 2, 2): "small", (1, 32, 1, 4): "narrow"}
# Those of csrc/cuda/wgmma.h: warpgroups that multiply, stages.
WGMMA_TILES = {(2, 3): "wgmma tall", (1, 2): "wgmma twin"}
# Those of csrc/cuda/bitmap.h: pixels of a warp, rows and columns of warps, stages.
BITMAP_TILES = {
    (128, 4, 1, 2): "bitmap large",
    (64, 4, 1, 2): "bitmap tall",
    (64, 2, 2, 2): "bitmap flat",
    (16, 2, 2, 4): "bitmap small",
    (64, 1, 2, 2): "bitmap narrow",
}
BITMAP_VALUES = 928  # of a slab and block at most, where masks keep 0.2 of 4096
# Those of csrc/cuda/direct.h: pixels of a lane, channels of a warp.
DIRECT_TILES = {(4, 8): "large", (2, 4): "medium", (1, 2): "small"}
# That of csrc/cuda/split_k.h, which adds what several thread blocks computed of a tile.
SUM, SUM_THREADS, SUM_BYTES = "sum of splits", 256, 8192
DTYPES = {"Half": "float16", "Brain": "bfloat16"}
DIRECT_CODES = 144  # of a slab of 16 channels and 3x3 taps


@dataclass(frozen=True)
class Kernel:
    """One kernel of one GPU generation.

    Attributes:
        name: "float16, large" and the like; "direct, large" of the direct kernel in float32.
        architecture: "sm_80" and the like.
        registers: of each thread.
        stack_bytes: of each thread; registers spill there.
        threads, shared_bytes: of a thread block.
        instructions: how many of each of ``INSTRUCTIONS`` there are.
        overwrites: instructions that write registers which products may still read; see :func:`overwrites`.
        step: all instructions of the innermost loop that has some of ``HMMA``; 0 where there is none.
    """

    name: str
    architecture: str
    registers: int
    stack_bytes: int
    threads: int
    shared_bytes: int
    instructions: Counter[str]
    overwrites: int = 0
    step: int = 0


def find_tool() -> str | None:
    """cuobjdump, of the CUDA toolkit or of Triton, which brings it along."""
    if found := shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump"):
        return found
    if (triton := importlib.util.find_spec("triton")) is None:
        return None
    tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(tool) if tool.exists() else None


def missing() -> str | None:
    """Why there is nothing to look at, in one sentence; None if there is."""
    if find_tool() is None:
        return "cuobjdump was not found: install the CUDA toolkit, or `pip install triton`"
    return two_four_ops.missing() or direct_ops.missing() or bitmap_ops.missing()


def read_kernels(library: Path = native.LIBRARY) -> list[Kernel]:
    """All kernels in the library.

    Raises:
        RuntimeError: there is nothing to look at; the message says why.
    """
    if why := missing():
        raise RuntimeError(why)
    resources, code, hazards, steps = {}, {}, {}, {}
    for architecture, name, text in _sections(_dump("-res-usage", library), r"Function (\S+):"):
        resources[architecture, name] = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups()
    for architecture, name, text in _sections(_dump("-sass", library), r"Function : (\S+)"):
        code[architecture, name] = Counter({each: len(re.findall(p, text)) for each, p in INSTRUCTIONS.items()})
        hazards[architecture, name] = len(overwrites(text))
        steps[architecture, name] = len(innermost_loop(text))
    return [
        Kernel(
            title,
            key[0],
            int(registers),
            int(stack) + int(local),
            *_block_of(title),
            instructions=code[key],
            overwrites=hazards[key],
            step=steps[key],
        )
        for key, (registers, stack, local) in resources.items()
        if (title := _title(key[1]))
    ]


def overwrites(text: str) -> list[str]:
    """Instructions, in the order of a function's code, that write weights of a product before it was waited for.

    ``HGMMA.SP`` reads its registers while other instructions run, until ``WARPGROUP.DEPBAR``. PTX leaves what happens
    then undefined, and the compiler does not see to it.
    """
    found, in_flight = [], set()
    for line in text.splitlines():
        if product := re.search(r"HGMMA\.SP\S* R\d+, R(\d+), gdesc\S+ R\d+, R(\d+)", line):
            first = int(product[1])
            in_flight |= {*range(first, first + 4), int(product[2])}
        elif "WARPGROUP.DEPBAR" in line:
            in_flight.clear()
        elif written := re.search(r"\*/\s+(?:@!?U?P\w+ )?([A-Z]\S*) (?:P\d, )?R(\d+)\b", line):
            words = 4 if ".128" in written[1] else 2 if re.search(r"\.64|\.WIDE", written[1]) else 1
            if in_flight & set(range(int(written[2]), int(written[2]) + words)):
                found.append(line.strip())
    return found


def innermost_loop(text: str) -> list[str]:
    """The instructions of a function's shortest loop that multiplies on tensor cores, ``HMMA``; none without one."""
    code = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/ +(@?[!A-Z].*?);", text)]
    loops = []
    for end, line in code:
        if (branch := re.search(r"\bBRA 0x([0-9a-f]+)", line)) and (begin := int(branch[1], 16)) < end:
            loop = [each for at, each in code if begin <= at <= end]
            if any(re.search(INSTRUCTIONS["HMMA"], each) for each in loop):
                loops.append(loop)
    return min(loops, key=len, default=[])


def _dump(flag: str, library: Path) -> str:
    return subprocess.run([find_tool(), flag, str(library)], capture_output=True, text=True, check=True).stdout


def _sections(text: str, function: str) -> Iterator[tuple[str, str, str]]:
    """(architecture, mangled name, text) of each function of a dump."""
    for part in re.split(r"^Fatbin elf code:", text, flags=re.MULTILINE)[1:]:
        architecture = re.search(r"arch = (\S+)", part)[1]
        pieces = re.split(function, part)
        yield from ((architecture, *pair) for pair in zip(pieces[1::2], pieces[2::2], strict=True))


def _title(mangled: str) -> str | None:
    if found := re.search(r"add_splits\w*?(Half|Brain)E", mangled):
        return f"{DTYPES[found[1]]}, {SUM}"
    if found := re.search(r"DirectTraitsILi(\d+)ELi(\d+)E", mangled):
        return f"direct, {DIRECT_TILES[tuple(map(int, found.groups()))]}"
    for traits, numbers, tiles in (
        ("TwoFourTraits", 4, TILES),
        ("WgmmaTraits", 2, WGMMA_TILES),
        ("BitmapTraits", 4, BITMAP_TILES),
    ):
        if found := re.search(rf"{traits}I\w*?(Half|Brain)E" + r"Li(\d+)E" * numbers, mangled):
            return f"{DTYPES[found[1]]}, {tiles[tuple(map(int, found.groups()[1:]))]}"
    return None


def _block_of(title: str) -> tuple[int, int]:
    kind, tile = title.split(", ")
    if kind == "direct":
        return torch.ops.smart_kernels.direct_resources(direct_ops.TILES.index(tile), DIRECT_CODES)
    if tile == SUM:
        return SUM_THREADS, SUM_BYTES
    if tile in BITMAP_TILES.values():
        index = bitmap_ops.TILES.index(tile.removeprefix("bitmap "))
        return torch.ops.smart_kernels.bitmap_resources(index, BITMAP_VALUES)
    tiles = two_four_ops.TILES + two_four_ops.WGMMA_TILES
    return torch.ops.smart_kernels.two_four_resources(tiles.index(tile))


def table(kernels: list[Kernel]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield f"| kernel | GPU | threads | registers | shared KiB | stack bytes | {' | '.join(INSTRUCTIONS)} |"
    yield "|---" * (6 + len(INSTRUCTIONS)) + "|"
    for kernel in sorted(kernels, key=lambda each: (each.architecture, each.name)):
        shared = f"{kernel.shared_bytes / 1024:.0f}"
        cells = (kernel.name, kernel.architecture, kernel.threads, kernel.registers, shared, kernel.stack_bytes)
        yield f"| {' | '.join(map(str, (*cells, *(kernel.instructions[each] for each in INSTRUCTIONS))))} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if why := missing():
        parser.error(why)
    print("\n".join(table(read_kernels())))


if __name__ == "__main__":
    main()
