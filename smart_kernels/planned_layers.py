"""The layers of a swapped network: which backend each runs on, planned, moved, and said in its row of the report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import nn

from smart_kernels import lowering
from smart_kernels.backends import find
from smart_kernels.compaction import Compact
from smart_kernels.modules import SparseConv2d
from smart_kernels.packing import PackedWeight
from smart_kernels.planner import DENSE, Choice, Planner
from smart_kernels.report import Row


def convs_of(net: nn.Module) -> Iterator[tuple[str, SparseConv2d]]:
    """Swapped layers by name."""
    for name, module in net.named_modules():
        if isinstance(module, SparseConv2d):
            yield name, module


def place(conv: SparseConv2d) -> tuple[torch.device, torch.dtype]:
    """Where its weight is, and of which dtype."""
    values = next(conv.packed.buffers())
    return values.device, values.dtype


def plan(net: nn.Module, names: Collection[str], planner: Planner, rows: Sequence[Row]) -> None:
    """Plans some layers anew for their input shapes; layers of one weight share a plan."""
    by_name, done = {row.name: row for row in rows}, {}
    for name, conv in convs_of(net):
        if name not in names:
            continue
        if first := conv.packed not in done:
            weight, masks = conv.packed.unpack()
            shape = None if conv.input_shape is None else torch.Size(conv.input_shape)
            done[conv.packed] = planner.choose(weight, masks, conv.geometry, shape, name)
        choice = done[conv.packed]
        if name in by_name:
            _tell(by_name[name], choice, first)
        conv.use(choice.packed, choice.backend)


def _tell(row: Row, choice: Choice, first_use: bool) -> None:
    row.backend, row.why, row.bytes = choice.backend, choice.why, choice.packed.nbytes if first_use else 0
    row.dense_us, row.sparse_us = choice.dense_us, choice.sparse_us


def move(net: nn.Module, moves: Mapping[SparseConv2d, PackedWeight], rows: Sequence[Row]) -> None:
    """Runs layers on the CPU kernels, as parts of programs."""
    by_name = {row.name: row for row in rows}
    for name, conv in convs_of(net):
        if conv not in moves:
            continue
        conv.use(moves[conv], lowering.BACKEND)
        if (row := by_name.get(name)) is not None:
            row.backend, row.why = lowering.BACKEND, f"the whole network is faster so; alone: {row.why}"
            row.bytes = conv.packed.nbytes if row.bytes else 0


def cut_dense(net: nn.Module) -> None:
    """Layers that compact ones run instead of need no masked copies of the whole weight."""
    channels, cut = find("channels"), {}
    for _, conv in convs_of(net):
        if conv.backend != DENSE:
            continue
        if conv.packed not in cut:
            weight, masks = conv.packed.unpack()
            fits = channels.supports(conv.geometry, weight.dtype, weight.device) and channels.suits(masks)
            cut[conv.packed] = channels.pack(weight, masks) if fits else None
        if cut[conv.packed] is not None:
            conv.use(cut[conv.packed], channels.name)


def tell_compact(net: nn.Module, compact: Collection[Compact], rows: Sequence[Row]) -> None:
    """Says in the layers' rows what the compact networks of the paths make of them."""
    by_name, counted = {row.name: row for row in rows}, set()
    for name, conv in convs_of(net):
        if (row := by_name.get(name)) is None:
            continue
        row.bytes = 0 if conv.packed in counted else conv.packed.nbytes
        counted.add(conv.packed)
        layers = [(each, each.net.get_submodule(name)) for each in compact if name in each.channels]
        smaller = [(each, layer) for each, layer in layers if isinstance(layer, SparseConv2d)]
        if not smaller:
            continue
        row.bytes += sum(layer.packed.nbytes for _, layer in smaller)
        last, layer = smaller[-1]
        c, all_c, k, all_k = last.channels[name]
        row.backend = layer.backend
        row.why = f"activations are compact: {c} of {all_c} channels in, {k} of {all_k} out"


def record_input_shapes(net: nn.Module, run: Callable[[], object]) -> None:
    """Tells each layer that a run of the network reaches what its input's shape was there."""
    shapes: dict[SparseConv2d, torch.Size] = {}
    hooks = [
        conv.register_forward_pre_hook(lambda m, inputs: shapes.update({m: m.kernel_shape(inputs[0].shape, m.pad)}))
        for _, conv in convs_of(net)
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    for conv, shape in shapes.items():
        conv.input_shape = tuple(shape)
