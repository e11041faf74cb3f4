"""The CUDA backend: sparse tensor cores of NVIDIA GPUs on any mask that mostly keeps two weights of each four."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from smart_kernels import native, two_four_ops
from smart_kernels.backends.base import Affine, Backend, Result, Run, SampleRun, Verdict, guarded, not_on
from smart_kernels.backends.gpu_costs import OWN, layer_us
from smart_kernels.geometry import Geometry
from smart_kernels.packing.fragments import GROUP, KEPT
from smart_kernels.packing.two_four import CHANNELS, TwoFourWeight

if TYPE_CHECKING:
    from smart_kernels.paths import Samples

DTYPES = (torch.float16, torch.bfloat16)
CAPABILITY = (8, 0)
# Groups of which more than two weights are kept. Random masks of 40 % have that many: half as many steps again, of half
# the cost of dense ones.
MAX_OVERFULL = 0.2


class CudaBackend(Backend):
    name = "cuda"
    format = "2:4"

    def available(self) -> Verdict:
        why = two_four_ops.missing() or native.cuda_missing()
        return Verdict(why is None, why or "")

    def supports(self, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Verdict:
        if device.type != "cuda":
            return not_on(device)
        if not (available := self.available()):
            return available
        if (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
            version = ".".join(map(str, capability))
            return Verdict(False, f"sparse tensor cores need compute capability 8.0, this GPU has {version}")
        return self.computes(geometry, dtype)

    def computes(self, geometry: Geometry, dtype: torch.dtype) -> Verdict:
        """Whether the kernels can run this convolution, wherever that may be."""
        if dtype not in DTYPES:
            name = str(dtype).removeprefix("torch.")
            return Verdict(False, f"sparse tensor cores take float16 and bfloat16, not {name}")
        if geometry.groups > 1:
            return Verdict(False, f"the cuda kernels take one group, not {geometry.groups}")
        channels = (geometry.weight_shape[1], geometry.weight_shape[0])
        if any(number % CHANNELS for number in channels):
            return Verdict(
                False,
                f"the cuda kernels copy {CHANNELS} channels at a time, which {channels[0]} input or {channels[1]} "
                "output channels do not divide into",
            )
        return Verdict(True)

    def suits(self, masks: Mapping[str, Tensor]) -> Verdict:
        share = max(overfull_share(mask) for mask in masks.values())
        if share <= MAX_OVERFULL:
            return Verdict(True)
        return Verdict(False, f"masks keep more than {KEPT} weights in {share:.0%} of groups of {GROUP} input channels")

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
        # Half of all slots are multiplied, at twice the rate; their values and two bits each are read.
        slots = max(density, 0.5)
        return layer_us(geometry, input_shape, device, dtype, OWN, arithmetic=slots, weights=slots + 1 / 16)

    def bind(
        self,
        packed: TwoFourWeight,
        geometry: Geometry,
        path: str | float,
        scale: Tensor | None,
        bias: Tensor | None,
        relu: bool,
        affine: Affine | None = None,
        tile: int = -1,
    ) -> Run:
        """As the base class says; ``tile`` is an index into ``two_four_ops.TILES``, to measure one."""
        call = _bind(packed, geometry, path, scale, bias, relu, affine, tile)
        return lambda x, residual: call(x, residual, None, None)

    def runs_samples(self, packed: TwoFourWeight) -> bool:
        return len(packed.paths) == 2

    def bind_samples(
        self,
        packed: TwoFourWeight,
        geometry: Geometry,
        scale: Tensor | None,
        bias: Tensor | None,
        relu: bool,
        affine: Affine | None = None,
        tile: int = -1,
    ) -> SampleRun:
        call = _bind(packed, geometry, packed.paths[1], scale, bias, relu, affine, tile)

        def run(x: Tensor, residual: Tensor | None, samples: Samples) -> Result:
            return call(x, residual, samples.order, samples.first)

        return run


def _bind(
    packed: TwoFourWeight,
    geometry: Geometry,
    path: str | float,
    scale: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    affine: Affine | None,
    tile: int,
) -> Callable[..., Result]:
    ops = torch.ops.smart_kernels
    op = (ops.sparse_conv2d_two_four if affine is None else ops.sparse_conv2d_affine_two_four).default
    scale, bias = (None if each is None else each.float() for each in (scale, bias))
    runs = packed.runs(path)
    if runs is not None and tile >= len(two_four_ops.TILES):
        tile = -1  # kernels of other generations read all columns
    last_arguments: tuple[object, ...] = (tile, runs)
    if affine is not None:
        last_arguments = (affine.scale.float(), affine.bias.float(), affine.relu, *last_arguments)
    operand, numbers = packed.operand(path), geometry.numbers

    def run(x: Tensor, residual: Tensor | None, order: Tensor | None, first: Tensor | None) -> Result:
        return op(x, *operand, numbers, scale, bias, residual, relu, order, first, *last_arguments)

    return guarded(run, packed)


def overfull_share(mask: Tensor) -> float:
    """The share of groups of four input channels of which a mask (K, C, R, S) keeps more than two."""
    padded = F.pad(mask, (0, 0, 0, 0, 0, -mask.shape[1] % GROUP))
    return float((padded.unflatten(1, (-1, GROUP)).sum(dim=2) > KEPT).float().mean())
