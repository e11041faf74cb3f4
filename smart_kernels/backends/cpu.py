"""The CPU backend: C++ kernels that walk the non-zeros, compiled for AVX-512, AVX2 and any other CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from smart_kernels import native
from smart_kernels.backends.base import Backend, Verdict
from smart_kernels.geometry import Geometry
from smart_kernels.packing.unstructured import MAX_TAPS, UnstructuredWeight


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
        if dtype != torch.float32:
            return Verdict(False, f"the cpu kernels compute in float32, not in {str(dtype).removeprefix('torch.')}")
        taps = geometry.weight_shape[2] * geometry.weight_shape[3]
        if taps > MAX_TAPS:
            return Verdict(False, f"a kernel of {taps} taps has more than the {MAX_TAPS} that a code can name")
        return Verdict(True)

    def run(
        self,
        x: Tensor,
        packed: UnstructuredWeight,
        geometry: Geometry,
        path: str | float,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        relu: bool = False,
        isa: str = "",
    ) -> Tensor:
        """As the base class says; ``isa`` picks an instruction set by name, for tests."""
        first, last = packed.segment_range(path)
        return torch.ops.smart_kernels.sparse_conv2d_cpu.default(
            x,
            packed.path_values(path),
            packed.codes,
            packed.segments,
            geometry.numbers,
            packed.slab_channels,
            first,
            last,
            scale,
            bias,
            residual,
            relu,
            isa,
        )
