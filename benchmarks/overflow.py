"""How much of a mask exceeds 2:4, and what its steps and bytes come to: ``python -m benchmarks.overflow``.

Without arguments for random masks of several densities on a layer of ResNet-34; with checkpoints, for the masks that
training left in each: ``python -m benchmarks.overflow runs/mine/best.safetensors``. Steps and bytes are those of both
paths, against the steps of 2:4 alone and two dense copies in float16; bytes also those of the bitmap format. The last
column is the overflow if input channels were put in the order that a greedy search finds, which a network could fold
into the layer before.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from smart.checkpoint import load_checkpoint
from smart_kernels.packing import BitmapWeight, TwoFourWeight
from smart_kernels.packing.fragments import GROUP, KEPT

SHAPE = (128, 128, 3, 3)
DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5)
HEADER = "| masks | weights | kept | overflow of weights | of kept | steps | bytes | as bitmaps | overflow, reordered |"


def channel_order(masks: Mapping[str, Tensor]) -> Tensor:
    """An order of input channels (C,) whose groups of four overflow less: greedy, and the same each time.

    Channels are dealt out, the fullest first: each to the group in which it adds the least overflow, of equal ones to
    that with which it shares the fewest rows, of these to the first.
    """
    # A row is an output channel and tap of a path.
    rows = torch.cat([mask.permute(1, 0, 2, 3).flatten(1) for mask in masks.values()], dim=1).float()
    groups: list[list[int]] = [[] for _ in range(-(-len(rows) // GROUP))]
    held = rows.new_zeros(len(groups), rows.shape[1])
    for channel in rows.sum(dim=1).argsort(descending=True, stable=True).tolist():
        cost = (held >= KEPT).float() @ rows[channel] + (held > 0).float() @ rows[channel] / (rows.shape[1] + 1)
        full = [i for i, group in enumerate(groups) if len(group) == GROUP]
        cost[full] = float("inf")
        chosen = int(cost.argmin())
        groups[chosen].append(channel)
        held[chosen] += rows[channel]
    # A group that is not full, if the channels are no multiple of four, goes last: groups begin at multiples.
    return torch.tensor([channel for group in sorted(groups, key=len, reverse=True) for channel in group])


def overflow_of(masks: Mapping[str, Tensor]) -> int:
    """Weights of all paths that exceed two in their group of four input channels."""
    total = 0
    for mask in masks.values():
        for group in mask.split(GROUP, dim=1):
            total += int((group.sum(dim=1) - KEPT).clamp(min=0).sum())
    return total


def measure(layers: list[Mapping[str, Tensor]]) -> dict[str, float]:
    """Sums over layers, each given by the masks of its paths."""
    names = ("weights", "kept", "overflow", "steps", "regular", "bytes", "bitmap_bytes", "dense_bytes", "reordered")
    sums = dict.fromkeys(names, 0)
    for masks in layers:
        first = next(iter(masks.values()))
        weight = torch.ones(first.shape, dtype=torch.float16)
        packed = TwoFourWeight(weight, masks)
        sums["weights"] += first.numel() * len(masks)
        sums["kept"] += sum(int(mask.sum()) for mask in masks.values())
        sums["overflow"] += sum(packed.overflow(path) for path in masks)
        sums["regular"] += packed.slabs * packed.steps * len(masks)
        sums["steps"] += packed.slabs * packed.steps * len(masks) + sum(packed.extra_steps(path) for path in masks)
        sums["bytes"] += packed.nbytes
        sums["bitmap_bytes"] += BitmapWeight(weight, masks).nbytes
        sums["dense_bytes"] += 2 * first.numel() * len(masks)
        order = channel_order(masks)
        sums["reordered"] += overflow_of({path: mask[:, order] for path, mask in masks.items()})
    return sums


def line(name: str, sums: Mapping[str, float]) -> str:
    """One line of the table."""
    cells = (
        name,
        sums["weights"],
        f"{sums['kept'] / sums['weights']:.3f}",
        f"{sums['overflow'] / sums['weights']:.2%}",
        f"{sums['overflow'] / max(1, sums['kept']):.1%}",
        f"{sums['steps'] / sums['regular']:.2f}",
        f"{sums['bytes'] / sums['dense_bytes']:.3f}",
        f"{sums['bitmap_bytes'] / sums['dense_bytes']:.3f}",
        f"{sums['reordered'] / sums['weights']:.2%}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def random_masks(density: float, paths: int = 2, shape: tuple[int, ...] = SHAPE) -> dict[str, Tensor]:
    """Masks that keep each weight with the same chance."""
    generator = torch.Generator().manual_seed(0)
    return {f"path {i}": torch.rand(shape, generator=generator) < density for i in range(paths)}


def masks_of(model: nn.Module) -> list[Mapping[str, Tensor]]:
    """The masks of all convolutions that drop anything."""
    masks = [module.masks for module in model.modules() if isinstance(module, nn.Conv2d) and hasattr(module, "masks")]
    return [each for each in masks if not all(bool(mask.all()) for mask in each.values())]


def table(checkpoints: list[Path]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield HEADER
    yield "|---" * (HEADER.count("|") - 1) + "|"
    if not checkpoints:
        for density in DENSITIES:
            yield line(f"random, {density}", measure([random_masks(density)]))
    for file in checkpoints:
        yield line(file.parent.name, measure(masks_of(load_checkpoint(file)[0])))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="*", metavar="CHECKPOINT", help="of smart train")
    for text in table(parser.parse_args().checkpoints):
        print(text, flush=True)


if __name__ == "__main__":
    main()
