"""Which backend runs which layer, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smart_kernels import backends
from smart_kernels.geometry import Geometry
from smart_kernels.packing import PackedWeight
from smart_kernels.timing import interleave, percentile

TIMING_BUDGET_S = 0.02  # a layer
ALL = "auto"


@dataclass
class Choice:
    """The plan of one layer.

    Attributes:
        backend: the name of the backend chosen.
        packed: the weight, packed for it.
        why: one sentence.
        dense_us, sparse_us: measured medians in microseconds, or None where there was nothing to choose from.
    """

    backend: str
    packed: PackedWeight
    why: str
    dense_us: float | None = None
    sparse_us: float | None = None


@dataclass
class Planner:
    """Plans the layers of one network; layers alike in shape and density are measured once.

    Attributes:
        backend: ``"auto"`` measures and takes the fastest; any other name is taken wherever it is supported.
    """

    backend: str = ALL
    _measured: dict[object, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.backend != ALL:
            backends.find(self.backend)

    def choose(
        self, weight: Tensor, masks: Mapping[str, Tensor], geometry: Geometry, input_shape: torch.Size | None
    ) -> Choice:
        """Plans one convolution.

        Args:
            weight: (K, C/groups, R, S), on the device and in the dtype it will run in.
            masks: one or two paths' masks of it.
            input_shape: (N, C, H, W) of an example, or None where it is unknown and nothing can be measured.
        """
        asked = backends.BACKENDS if self.backend == ALL else (self.backend, "dense")
        verdicts = {name: backends.find(name).supports(geometry, weight.dtype, weight.device) for name in asked}
        packed = {name: backends.find(name).pack(weight, masks) for name, verdict in verdicts.items() if verdict}

        if self.backend in packed:
            return Choice(self.backend, packed[self.backend], "asked for")
        if list(packed) == ["dense"]:
            return Choice("dense", packed["dense"], "; ".join(v.why for v in verdicts.values() if not v))
        if all(bool(mask.all()) for mask in masks.values()):
            return Choice("dense", packed["dense"], "no path has zeros to skip")
        if input_shape is None:
            first = next(iter(packed))
            return Choice(first, packed[first], "not measured: the input's shape is unknown here")

        times = self._measure(packed, geometry, input_shape)
        fastest = min(times, key=times.__getitem__)
        sparse_us = min(us for name, us in times.items() if name != "dense")
        if fastest == "dense":
            why = f"dense is faster here, {times['dense']:.0f} us against {sparse_us:.0f} us"
        else:
            why = f"{times['dense'] / sparse_us:.2f}x faster than dense"
        return Choice(fastest, packed[fastest], why, times["dense"], sparse_us)

    def _measure(
        self, packed: Mapping[str, PackedWeight], geometry: Geometry, input_shape: torch.Size
    ) -> dict[str, float]:
        """Median microseconds of each backend on the path with the most non-zeros."""
        dense = packed["dense"]
        path = max(dense.paths, key=dense.nonzeros)
        key = (geometry, tuple(input_shape), round(dense.density(path), 2), tuple(packed))
        if key not in self._measured:
            values = next(dense.buffers())
            x = torch.randn(input_shape, device=values.device, dtype=torch.float32).to(values.dtype)
            scale = values.new_ones(geometry.weight_shape[0])

            def call(name: str) -> Callable[[], Tensor]:
                run = backends.find(name).bind(packed[name], geometry, path, scale, scale, True)
                return lambda: run(x, None)

            with torch.inference_mode():
                seconds = interleave({name: call(name) for name in packed}, TIMING_BUDGET_S)
            self._measured[key] = {name: percentile(samples, 50) * 1e6 for name, samples in seconds.items()}
        return self._measured[key]
