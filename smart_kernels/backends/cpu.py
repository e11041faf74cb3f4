"""The CPU backend: C++ kernels that walk the non-zeros, compiled for AVX-512, AVX2 and any other CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from smart_kernels import native
from smart_kernels.backends.base import Affine, Backend, NoGradient, Run, Verdict
from smart_kernels.geometry import Geometry
from smart_kernels.packing.unstructured import MAX_TAPS, UnstructuredWeight

# One thread's multiplications and additions on non-zeros a microsecond, about, by instruction set: they rank, no more.
FLOPS_PER_US = {"avx512": 50e3, "avx2": 25e3, "plain": 6e3}
COPIED_FLOATS_PER_US = 1e3
CALL_US = 8.0
DTYPES = (torch.float32, torch.bfloat16)


class CpuBackend(Backend):
    name = "cpu"
    format = "unstructured"

    def available(self) -> Verdict:
        why = native.missing()
        return Verdict(why is None, why or "")

    def supports(self, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Verdict:
        if not (available := self.available()):
            return available
        if device.type != "cpu":
            return Verdict(False, f"the cpu kernels run on the CPU, not on {device.type}")
        if dtype not in DTYPES:
            return Verdict(False, f"the cpu kernels take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}")
        taps = geometry.weight_shape[2] * geometry.weight_shape[3]
        if taps > MAX_TAPS:
            return Verdict(False, f"a kernel of {taps} taps has more than the {MAX_TAPS} that a code can name")
        return Verdict(True)

    def estimate_us(
        self,
        geometry: Geometry,
        input_shape: Sequence[int],
        density: float,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> float | None:
        if not (isas := native.cpu_isas()):
            return None
        outputs = math.prod(geometry.output_shape(input_shape)) / geometry.weight_shape[0]
        flops = 2 * density * math.prod(geometry.weight_shape) * outputs
        # The input is copied once a tap column.
        copied = math.prod(input_shape) * geometry.weight_shape[3]
        us = flops / FLOPS_PER_US[isas[0]] + copied / COPIED_FLOATS_PER_US
        return CALL_US + us / torch.get_num_threads()

    def bind(
        self,
        packed: UnstructuredWeight,
        geometry: Geometry,
        path: str | float,
        scale: Tensor | None,
        bias: Tensor | None,
        relu: bool,
        affine: Affine | None = None,
        isa: str = "",
    ) -> Run:
        """As the base class says; ``isa`` picks an instruction set by name, for tests.

        The kernels compute in float32; bfloat16 is how weights are stored, and what a layer is given and gives back.
        """
        scale, bias = (None if each is None else each.float() for each in (scale, bias))
        if affine is not None:
            affine = Affine(affine.scale.float(), affine.bias.float(), affine.relu)
        # A small layer takes some ten microseconds: looking attributes up at each call would be a fair part of it.
        ops = torch.ops.smart_kernels
        op = (ops.sparse_conv2d_cpu if affine is None else ops.sparse_conv2d_affine_cpu).default
        last_arguments = (relu, isa) if affine is None else (relu, *affine, isa)
        values, codes, segments = packed.path_values(path), packed.codes, packed.segments
        numbers, slab_channels, (first, last) = geometry.numbers, packed.slab_channels, packed.segment_range(path)

        def run(x: Tensor, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
            if _is_reduced(x, residual) and torch.is_autocast_enabled("cpu"):
                return run_in_float32(x, residual)  # as torch casts the operands of its own convolutions
            if x.requires_grad and torch.is_grad_enabled():
                with torch.no_grad():
                    y = run(x, residual)
                return NoGradient.apply(x, y) if affine is None else tuple(NoGradient.apply(x, each) for each in y)
            return op(
                x, values, codes, segments, numbers, slab_channels, first, last, scale, bias, residual, *last_arguments
            )

        def run_in_float32(x: Tensor, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
            y = run(x.float(), None if residual is None else residual.float())
            return y.to(x.dtype) if affine is None else tuple(each.to(x.dtype) for each in y)

        return run if values.dtype == torch.float32 else run_in_float32


def _is_reduced(x: Tensor, residual: Tensor | None) -> bool:
    return x.dtype != torch.float32 or (residual is not None and residual.dtype != torch.float32)
