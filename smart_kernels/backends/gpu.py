"""What the backends of NVIDIA GPUs share: one operator runs a batch on one path, or each of its samples on its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from smart_kernels.backends.base import Affine, Backend, NoGradient, Result, Run, SampleRun, Verdict
from smart_kernels.geometry import Geometry
from smart_kernels.packing import PackedWeight

if TYPE_CHECKING:
    from smart_kernels.paths import Samples


class Launch(NamedTuple):
    """An operator, and those of its arguments that are the layer's.

    Attributes:
        operator: takes x, ``layer``, scale, bias, residual, relu, order, first, then, if it has a second result, scale,
            bias and relu of that one, and ``tuning``. ``order`` and ``first`` are those of
            :class:`smart_kernels.paths.Samples`, or None.
        layer: the weight and the geometry.
        tuning: how the operator is to run the layer, where that comes last.
    """

    operator: Callable[..., Result]
    layer: tuple[object, ...]
    tuning: tuple[object, ...] = ()


class Epilogue(NamedTuple):
    """What follows a convolution, as :meth:`GpuBackend.bind` takes it."""

    scale: Tensor | None
    bias: Tensor | None
    relu: bool
    affine: Affine | None


class GpuBackend(Backend):
    """A backend of one GPU kernel: what that computes, and how it is launched.

    Attributes:
        capability: the compute capability it needs; None if any does.
        epilogue_dtype: what the operator takes scales and biases in; None if it takes them as they are.
    """

    capability: ClassVar[tuple[int, int] | None] = (8, 0)
    epilogue_dtype: ClassVar[torch.dtype | None] = torch.float32

    @abstractmethod
    def computes(self, geometry: Geometry, dtype: torch.dtype) -> Verdict:
        """Whether the kernel can run this convolution, wherever that may be."""

    @abstractmethod
    def launch(
        self, packed: PackedWeight, geometry: Geometry, path: str | float, with_affine: bool, schedule: Any
    ) -> Launch:
        """The operator and the layer's arguments.

        Args:
            path: where samples have paths of their own, the second.
            with_affine: whether it has a second result.
            schedule: as :meth:`bind` takes it.
        """

    def own_schedule(self, packed: PackedWeight) -> Any:
        """The schedule of whole batches on one path, where none is given; None leaves it to the operator."""
        return None

    def supports(self, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Verdict:
        # In the same words for all of them, so that reports say them once.
        if device.type != "cuda":
            return Verdict(False, f"the GPU kernels run on NVIDIA GPUs, not on {device.type}")
        if not (available := self.available()):
            return available
        if self.capability and (capability := torch.cuda.get_device_capability(device)) < self.capability:
            needed, found = (".".join(map(str, each)) for each in (self.capability, capability))
            return Verdict(False, f"kernels on tensor cores need compute capability {needed}, this GPU has {found}")
        return self.computes(geometry, dtype)

    def bind(
        self,
        packed: PackedWeight,
        geometry: Geometry,
        path: str | float,
        scale: Tensor | None,
        bias: Tensor | None,
        relu: bool,
        affine: Affine | None = None,
        schedule: Any = None,
    ) -> Run:
        """As the base class says.

        Args:
            schedule: how to cut up the layer, in the backend's own terms, to measure that; None for
                :meth:`own_schedule`.
        """
        schedule = self.own_schedule(packed) if schedule is None else schedule
        call = self._bind(packed, geometry, path, Epilogue(scale, bias, relu, affine), schedule)
        return lambda x, residual: call(x, residual, None, None)

    def runs_samples(self, packed: PackedWeight) -> bool:
        return len(packed.paths) == 2

    def bind_samples(
        self,
        packed: PackedWeight,
        geometry: Geometry,
        scale: Tensor | None,
        bias: Tensor | None,
        relu: bool,
        affine: Affine | None = None,
        schedule: Any = None,
    ) -> SampleRun:
        call = self._bind(packed, geometry, packed.paths[1], Epilogue(scale, bias, relu, affine), schedule)

        def run(x: Tensor, residual: Tensor | None, samples: Samples) -> Result:
            return call(x, residual, samples.order, samples.first)

        return run

    def _bind(
        self, packed: PackedWeight, geometry: Geometry, path: str | float, epilogue: Epilogue, schedule: Any
    ) -> Callable[..., Result]:
        """A call of x, residual, order and first, which refuses a weight that was corrupted, and gradients."""
        if not (verdict := self.accepts(packed, geometry)):
            raise ValueError(f"{verdict.why}: run this weight on the dense backend")
        scale, bias, relu, affine = epilogue
        operator, layer, tuning = self.launch(packed, geometry, path, affine is not None, schedule)
        scale, bias = self._converted(scale), self._converted(bias)
        second = () if affine is None else (self._converted(affine.scale), self._converted(affine.bias), affine.relu)
        last_arguments = (*second, *tuning)

        def run(x: Tensor, residual: Tensor | None, order: Tensor | None, first: Tensor | None) -> Result:
            if packed.disabled:
                raise ValueError("corrupt data was loaded into this packed weight: load a good state, or pack it anew")
            if x.requires_grad and torch.is_grad_enabled():
                with torch.no_grad():
                    y = run(x, residual, order, first)
                return NoGradient.apply(x, y) if affine is None else tuple(NoGradient.apply(x, each) for each in y)
            return operator(x, *layer, scale, bias, residual, relu, order, first, *last_arguments)

        return run

    def _converted(self, per_channel: Tensor | None) -> Tensor | None:
        return (
            per_channel if per_channel is None or self.epilogue_dtype is None else per_channel.to(self.epilogue_dtype)
        )
