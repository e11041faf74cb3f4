"""Programs of the CPU kernels: many layers in one call.

Between the layers of a program there is no Python, no operator boundary and no allocation; values stay in the kernels'
own layouts, and image after image passes through several layers while it is in the caches (csrc/cpu/program.h).
:mod:`smart_kernels.lowering` finds the stretches of a network that become programs.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smart_kernels import native
from smart_kernels.modules import PathAffine, SparseConv2d
from smart_kernels.paths import Path, at_stage

MAX_BOUND = 8  # paths a program is kept ready for, as in modules.py
NONE = -1
CONVOLUTION, AFFINE, ADD, MAX_POOL, AVERAGE, ACTIVATION, PRODUCT = range(7)  # as csrc/cpu/program.h numbers them
RELU6, SILU, SIGMOID, HARDSWISH, HARDSIGMOID = range(5)  # as csrc/cpu/problem.h
NO_GEOMETRY = (0,) * 13


@dataclass
class Step:
    """What a program does with values, which are numbered in the order they are made, its inputs first.

    Attributes:
        kind: one of the numbers above.
        x, other: values read; ``other`` is added, or multiplied by, or NONE.
        y, second: values made; ``second`` is a convolution's second result, or NONE.
        module: of a convolution or a norm.
        relu: whether a sum is rectified.
        function: of an activation.
        geometry: as ``Geometry.numbers``, of a pooling.
    """

    kind: int
    x: int
    other: int
    y: int
    second: int = NONE
    module: nn.Module | None = None
    relu: bool = False
    function: int = 0
    geometry: Sequence[int] = NO_GEOMETRY


class Program(nn.Module):
    """Runs steps on the CPU kernels: ``program(path, *inputs)`` returns the tensors of its output values.

    Inputs and outputs are of one dtype, float32 or bfloat16; values inside are float32.

    Args:
        shapes: (N, C, H, W) of each input.
        steps: in their order.
        outputs: numbers of values.
        isa: the instruction set by name, for tests; by default the fastest of the machine.
    """

    def __init__(
        self, shapes: Sequence[torch.Size], steps: Sequence[Step], outputs: Sequence[int], isa: str = ""
    ) -> None:
        super().__init__()
        self.isa = isa
        self.shapes = tuple(shapes)
        self.steps = tuple(steps)
        self.outputs = tuple(outputs)
        self._handles: dict[Path, _Handle] = {}

    def forward(self, path: Path, *inputs: Tensor) -> list[Tensor]:
        handle = self._handles.get(path)
        if handle is None:
            if len(self._handles) >= MAX_BOUND:
                self._handles.clear()
            handle = self._handles[path] = self._create(path)
        if all(x.dtype == torch.float32 for x in inputs):
            return torch.ops.smart_kernels.program_run(handle.number, inputs)
        results = torch.ops.smart_kernels.program_run(handle.number, [x.float() for x in inputs])
        return [y.to(inputs[0].dtype) for y in results]

    def _create(self, path: Path) -> _Handle:
        tensors: list[Tensor] = []
        fields = [number for step in self.steps for number in _fields(step, path, tensors)]
        sizes = [size for shape in self.shapes for size in shape[1:]]
        create = torch.ops.smart_kernels.program_create
        return _Handle(create(tensors, sizes, fields, list(self.outputs), self.shapes[0][0], self.isa))


class _Handle:
    """Owns a program of the library."""

    def __init__(self, number: int) -> None:
        self.number = number
        # Not at the interpreter's exit, when torch may be gone before.
        weakref.finalize(self, native.free_program, number).atexit = False


def _fields(step: Step, path: Path, tensors: list[Tensor]) -> list[int]:
    """One step as csrc/program_ops.cpp reads it; its tensors are added to ``tensors``."""

    def put(tensor: Tensor | None) -> int:
        if tensor is None:
            return NONE
        tensors.append(tensor)
        return len(tensors) - 1

    def put_channels(tensor: Tensor | None) -> int:
        return put(None if tensor is None else tensor.flatten().float())

    values = [step.kind, step.x, step.other, step.y, step.second]
    module = step.module
    if isinstance(module, PathAffine):
        affine = [put_channels(tensor) for tensor in module.of(path)]
        return [*values, *[NONE] * 5, *affine, 0, 0, 0, 0, module.relu, *step.geometry]
    if not isinstance(module, SparseConv2d):
        how = step.function if step.kind == ACTIVATION else step.relu
        return [*values, *[NONE] * 7, 0, 0, 0, how, 0, *step.geometry]
    packed, second, own = module.packed, module.second, at_stage(path, module.stage)
    weight = [put(packed.path_values(own)), put(packed.codes), put(packed.segments)]
    scale, bias = (put_channels(None if each is None else each.of(own)) for each in (module.scale, module.bias))
    affine = [NONE, NONE] if second is None else [put_channels(tensor) for tensor in second.of(path)]
    numbers = [packed.slab_channels, *packed.segment_range(own), module.relu, second is not None and second.relu]
    return [*values, *weight, scale, bias, *affine, *numbers, *module.geometry.numbers]
