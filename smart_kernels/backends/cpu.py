"""The CPU backend: C++ kernels that walk the non-zeros, compiled for AVX-512, AVX2 and any other CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from smart_kernels import native
from smart_kernels.backends.base import Affine, Backend, NoGradient, Run, Verdict
from smart_kernels.geometry import Geometry
from smart_kernels.packing.unstructured import MAX_TAPS, UnstructuredWeight, slab_channels

CYCLES_PER_US = 3.4e3  # as the kernels' cost model counts them, about: they rank, no more
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
        if not self.available():
            return None
        cycles = _cycles(geometry, input_shape, density)
        return CALL_US + cycles / CYCLES_PER_US / torch.get_num_threads()

    def gains_on_full(self, geometry: Geometry, input_shape: Sequence[int]) -> bool:
        # Winograd's algorithm needs no zeros, only a layer in which it is cheaper than products one by one.
        return _cycles(geometry, input_shape, 1.0) < _cycles(geometry, input_shape, 1.0, "direct")

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


def _cycles(geometry: Geometry, input_shape: Sequence[int], density: float, way: str = "") -> float:
    """Of one thread, by the kernels' own cost model; ``way`` may rule Winograd's algorithm out, as "direct"."""
    _, channels, r, s = geometry.weight_shape
    nonzeros = round(density * math.prod(geometry.weight_shape))
    isa = f"{native.cpu_isas()[0]} {way}".rstrip()
    slab = slab_channels(channels, r * s)
    return torch.ops.smart_kernels.cpu_cycles(list(input_shape), geometry.numbers, slab, nonzeros, isa)


def _is_reduced(x: Tensor, residual: Tensor | None) -> bool:
    return x.dtype != torch.float32 or (residual is not None and residual.dtype != torch.float32)
