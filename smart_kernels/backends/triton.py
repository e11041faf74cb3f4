"""The Triton backend: tensor cores of NVIDIA GPUs on weights whose blocks are kept or dropped whole."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smart_kernels.backends.base import Affine, Backend, Result, Run, SampleRun, Verdict, guarded, not_on
from smart_kernels.backends.gpu_costs import OWN, layer_us
from smart_kernels.backends.schedules import Schedule
from smart_kernels.geometry import Geometry
from smart_kernels.packing.block import FINEST, OUT_SIZES, BlockWeight, is_constant

if TYPE_CHECKING:
    from smart_kernels.paths import Samples

MAX_TAPS = 64  # the kernel keeps a bit for each
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CAPABILITY = (8, 0)


class TritonBackend(Backend):
    name = "triton"
    format = "block"

    def available(self) -> Verdict:
        if importlib.util.find_spec("triton") is None:
            return Verdict(False, "Triton is not installed: `pip install triton`, or a CUDA build of torch, brings it")
        if torch.version.cuda is None or not torch.cuda.is_available():
            return Verdict(False, "the triton kernels need an NVIDIA GPU, and this torch sees none")
        return Verdict(True)

    def supports(self, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Verdict:
        if device.type != "cuda":
            return not_on(device)
        if not (available := self.available()):
            return available
        if (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
            return Verdict(
                False, f"the triton kernels need compute capability 8.0, this GPU has {'.'.join(map(str, capability))}"
            )
        return self.computes(geometry, dtype)

    def computes(self, geometry: Geometry, dtype: torch.dtype) -> Verdict:
        """Whether the kernels can run this convolution, wherever that may be."""
        if dtype not in DTYPES:
            name = str(dtype).removeprefix("torch.")
            return Verdict(False, f"the triton kernels compute in float16, bfloat16 and float32, not in {name}")
        k, _, r, s = geometry.weight_shape
        if r * s > MAX_TAPS:
            return Verdict(False, f"a kernel of {r}x{s} has more than the {MAX_TAPS} taps the triton kernels take")
        if geometry.groups > 1 and k // geometry.groups % OUT_SIZES[0]:
            return Verdict(
                False,
                f"{geometry.groups} groups of {k // geometry.groups} output channels do not divide into tiles of "
                f"{OUT_SIZES[0]} as the triton kernels need",
            )
        return Verdict(True)

    def suits(self, masks: Mapping[str, Tensor]) -> Verdict:
        if all(is_constant(mask, (FINEST, FINEST)) for mask in masks.values()):
            return Verdict(True)
        return Verdict(False, f"masks do not drop whole blocks of {FINEST}x{FINEST} channels")

    def estimate_us(
        self,
        geometry: Geometry,
        input_shape: Sequence[int],
        density: float,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> float | None:
        if device.type != "cuda":
            return None
        return layer_us(geometry, input_shape, device, dtype, OWN, arithmetic=density, weights=density)

    def accepts(self, packed: BlockWeight) -> Verdict:
        if min(packed.block) >= FINEST:
            return Verdict(True)
        block = "x".join(map(str, packed.block))
        return Verdict(
            False, f"blocks of {block} channels are finer than the {FINEST}x{FINEST} the triton kernels take"
        )

    def bind(
        self,
        packed: BlockWeight,
        geometry: Geometry,
        path: str | float,
        scale: Tensor | None,
        bias: Tensor | None,
        relu: bool,
        affine: Affine | None = None,
        schedule: Schedule | None = None,
    ) -> Run:
        """As the base class says; ``schedule`` is taken instead of the one kept for the layer, to measure it."""
        call = self._bind(packed, geometry, path, scale, bias, relu, affine, schedule)
        return lambda x, residual: call(x, residual, None, None)

    def runs_samples(self, packed: BlockWeight) -> bool:
        return len(packed.paths) == 2

    def bind_samples(
        self,
        packed: BlockWeight,
        geometry: Geometry,
        scale: Tensor | None,
        bias: Tensor | None,
        relu: bool,
        affine: Affine | None = None,
        schedule: Schedule | None = None,
    ) -> SampleRun:
        call = self._bind(packed, geometry, packed.paths[0], scale, bias, relu, affine, schedule)

        def run(x: Tensor, residual: Tensor | None, samples: Samples) -> Result:
            return call(x, residual, samples.order, samples.first)

        return run

    def _bind(
        self,
        packed: BlockWeight,
        geometry: Geometry,
        path: str | float,
        scale: Tensor | None,
        bias: Tensor | None,
        relu: bool,
        affine: Affine | None,
        schedule: Schedule | None,
    ) -> Callable[..., Result]:
        if not (verdict := self.accepts(packed)):
            raise ValueError(f"{verdict.why}: run this weight on the dense backend")
        # Importing them imports Triton, which takes seconds.
        from smart_kernels import triton_ops

        op = triton_ops.sparse_conv2d_triton if affine is None else triton_ops.sparse_conv2d_affine_triton
        last_arguments = () if affine is None else tuple(affine)
        weight = (packed.path_values(path), packed.codes, packed.rows, packed.starts, packed.segments)
        segments, items = packed.segment_range(path), packed.items_per_tile(path)
        layer = (
            *weight,
            packed.rows_per_tile,
            geometry.numbers,
            *segments,
            items,
            schedule.numbers if schedule else [],
        )

        def run(x: Tensor, residual: Tensor | None, order: Tensor | None, first: Tensor | None) -> Result:
            return op(x, *layer, scale, bias, residual, relu, order, first, *last_arguments)

        return guarded(run, packed)
