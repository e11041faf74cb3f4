"""The Triton backend: tensor cores of NVIDIA GPUs on weights whose blocks are kept or dropped whole."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from smart_kernels.backends.base import Verdict
from smart_kernels.backends.gpu import GpuBackend, Launch
from smart_kernels.backends.gpu_costs import OWN, layer_us
from smart_kernels.backends.schedules import Schedule
from smart_kernels.geometry import Geometry
from smart_kernels.packing.block import FINEST, OUT_SIZES, BlockWeight, is_constant

MAX_TAPS = 64  # the kernel keeps a bit for each
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class TritonBackend(GpuBackend):
    name = "triton"
    format = "block"
    epilogue_dtype = None

    def available(self) -> Verdict:
        if importlib.util.find_spec("triton") is None:
            return Verdict(False, "Triton is not installed: `pip install triton`, or a CUDA build of torch, brings it")
        if torch.version.cuda is None or not torch.cuda.is_available():
            return Verdict(False, "the triton kernels need an NVIDIA GPU, and this torch sees none")
        return Verdict(True)

    def computes(self, geometry: Geometry, dtype: torch.dtype) -> Verdict:
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

    def accepts(self, packed: BlockWeight, geometry: Geometry) -> Verdict:
        if min(packed.block) >= FINEST:
            return Verdict(True)
        block = "x".join(map(str, packed.block))
        return Verdict(
            False, f"blocks of {block} channels are finer than the {FINEST}x{FINEST} the triton kernels take"
        )

    def launch(
        self, packed: BlockWeight, geometry: Geometry, path: str | float, with_affine: bool, schedule: Schedule | None
    ) -> Launch:
        # Importing them imports Triton, which takes seconds.
        from smart_kernels import triton_ops

        operator = triton_ops.sparse_conv2d_affine_triton if with_affine else triton_ops.sparse_conv2d_triton
        weight = (packed.path_values(path), packed.codes, packed.rows, packed.starts, packed.segments)
        how = (*packed.segment_range(path), packed.items_per_tile(path), schedule.numbers if schedule else [])
        return Launch(operator, (*weight, packed.rows_per_tile, geometry.numbers, *how))


def covered_by_tma(
    geometry: Geometry, values: Tensor, rows_per_tile: int, input_size: Sequence[int], samples: bool = False
) -> Verdict:
    """What :func:`smart_kernels.tma_ops.covers` says, or that this Triton has no such kernel."""
    try:
        from smart_kernels import tma_ops
    except ImportError as error:
        return Verdict(False, f"the Gluon of this Triton does not have what the kernel with TMA needs ({error})")
    return tma_ops.covers(geometry, values, rows_per_tile, input_size, samples)
