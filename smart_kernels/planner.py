"""Which backend runs which layer, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smart_kernels import backends, cuda_graphs
from smart_kernels.geometry import Geometry
from smart_kernels.packing import PackedWeight
from smart_kernels.timing import interleave, percentile
from smart_kernels.timings import SHARED, Timings, layer_key, mask_hash

TIMING_BUDGET_S = 0.02  # a layer
GRAPH_REPEATS = 20  # calls in one CUDA graph
AUTO = "auto"
DENSE = "dense"
# A backend that should take this many times longer than another is not measured: estimates are not off by so much.
HOPELESS = 8.0


class DenseFallbackError(ValueError):
    """A layer with zeros would run densely, and the caller had ruled that out with ``strict=True``."""


@dataclass
class Choice:
    """The plan of one layer.

    Attributes:
        backend: the name of the backend chosen.
        packed: the weight, packed for it.
        why: one sentence.
        dense_us, sparse_us: medians in microseconds, measured now or before; None where there was nothing to choose.
    """

    backend: str
    packed: PackedWeight
    why: str
    dense_us: float | None = None
    sparse_us: float | None = None


@dataclass
class Planner:
    """Plans the layers of one network.

    Attributes:
        backend: ``"auto"`` takes the fastest; any other name is taken wherever it is supported.
        strict: layers with zeros never run densely; where no sparse backend can, it is an error.
        measure: whether layers are timed; if not, estimates decide.
        timings: where times are looked up and kept.
    """

    backend: str = AUTO
    strict: bool = False
    measure: bool = True
    timings: Timings = field(default_factory=lambda: SHARED)

    def __post_init__(self) -> None:
        if not isinstance(self.timings, Timings):
            raise TypeError(f"timings is a {type(self.timings).__name__}: give smart_kernels.Timings(file)")
        if self.backend != AUTO:
            backends.find(self.backend)
        if self.strict and self.backend == DENSE:
            raise ValueError("backend='dense' runs every layer densely, which strict=True rules out: drop one of them")

    def choose(
        self,
        weight: Tensor,
        masks: Mapping[str, Tensor],
        geometry: Geometry,
        input_shape: torch.Size | None,
        name: str = "this layer",
    ) -> Choice:
        """Plans one convolution.

        Args:
            weight: (K, C/groups, R, S), on the device it shall run on.
            masks: path -> bool mask like the weight.
            input_shape: (N, C, H, W) of its typical input; None if unknown: then nothing can be timed or estimated.
            name: for error messages.

        Raises:
            DenseFallbackError: strict, and no sparse backend runs the layer.
            ValueError: the weight cannot be packed, as it holds NaN or infinity.
        """
        full = all(bool(mask.all()) for mask in masks.values())
        verdicts = {
            candidate: backend.supports(geometry, weight.dtype, weight.device)
            for candidate, backend in backends.BACKENDS.items()
        }
        able = [each for each, verdict in verdicts.items() if verdict and backends.find(each).suits(masks)]
        if self.strict and not full and able == [DENSE]:
            raise DenseFallbackError(f"{name}: {_refusals(verdicts)}")
        if self.backend != AUTO and self.backend in able:
            return Choice(self.backend, _pack(self.backend, weight, masks, geometry, name), "asked for")
        if full:
            able = [each for each in able if each == DENSE or _gains_on_full(each, geometry, input_shape)]
        if able == [DENSE]:
            why = "no path has zeros to skip" if full else _refusals(verdicts)
            return Choice(DENSE, _pack(DENSE, weight, masks, geometry, name), why)
        allowed = [each for each in able if full or not (self.strict and each == DENSE)]
        return self._fastest(able, allowed, weight, masks, geometry, input_shape, name)

    def _fastest(
        self,
        able: list[str],
        allowed: list[str],
        weight: Tensor,
        masks: Mapping[str, Tensor],
        geometry: Geometry,
        input_shape: torch.Size | None,
        name: str,
    ) -> Choice:
        """The fastest of those allowed; the others are for comparison."""
        if not _known(input_shape):
            why = "not measured: the input's shape is unknown here"
            return Choice(allowed[0], _pack(allowed[0], weight, masks, geometry, name), why)
        path = max(masks, key=lambda each: int(masks[each].sum()))
        estimates = self._estimate(able, geometry, input_shape, float(masks[path].float().mean()), weight)
        if self.measure:
            hopeful = [each for each in able if estimates[each] <= HOPELESS * min(estimates.values())]
            packed = {each: _pack(each, weight, masks, geometry, name) for each in {*hopeful, *allowed[:1]}}
            times = self._measure(packed, path, masks, geometry, input_shape)
        else:
            times, packed = estimates, {}
        chosen = min((each for each in times if each in allowed), key=times.__getitem__)
        dense_us, sparse_us = times.get(DENSE), min((us for each, us in times.items() if each != DENSE), default=None)
        why = _comparison(chosen, dense_us, sparse_us)
        if not self.measure:
            why, dense_us, sparse_us = f"{why} (estimated, not measured)", None, None
        return Choice(
            chosen, packed.get(chosen) or _pack(chosen, weight, masks, geometry, name), why, dense_us, sparse_us
        )

    def _estimate(
        self, able: list[str], geometry: Geometry, input_shape: torch.Size, density: float, weight: Tensor
    ) -> dict[str, float]:
        """Microseconds by the backends' cost models; in the order of preference where one of them has none."""
        problem = (geometry, input_shape, density, weight.device, weight.dtype)
        estimates = {each: backends.find(each).estimate_us(*problem) for each in able}
        if None in estimates.values():
            return {each: 1.0 + i / len(able) for i, each in enumerate(able)}
        return estimates

    def _measure(
        self,
        packed: Mapping[str, PackedWeight],
        path: str,
        masks: Mapping[str, Tensor],
        geometry: Geometry,
        input_shape: torch.Size,
    ) -> dict[str, float]:
        """Median microseconds of each backend on one path, the one with the most non-zeros."""
        values = next(next(iter(packed.values())).buffers())
        digest = mask_hash(masks)
        keys = {each: layer_key(each, geometry, input_shape, values.dtype, values.device, digest) for each in packed}
        known = {each: self.timings.get(key) for each, key in keys.items()}
        if None not in known.values():
            return known

        x = torch.randn(input_shape, device=values.device, dtype=torch.float32).to(values.dtype)
        scale = values.new_ones(geometry.weight_shape[0])
        # A GPU's layers are short beside what launching them from Python takes, and networks can run without that.
        repeats = GRAPH_REPEATS if x.is_cuda else 1
        x = x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x

        def call(each: str) -> Callable[[], object]:
            run = backends.find(each).bind(packed[each], geometry, path, scale, scale, True)
            return cuda_graphs.repeated(lambda: run(x, None), repeats) if x.is_cuda else lambda: run(x, None)

        # All of them again if one is missing: only times taken in turns can be compared.
        with torch.inference_mode(), torch.cuda.device_of(x):
            seconds = interleave({each: call(each) for each in packed}, TIMING_BUDGET_S)
        times = {each: percentile(samples, 50) / repeats * 1e6 for each, samples in seconds.items()}
        for each, us in times.items():
            self.timings.put(keys[each], us)
        return times


def _known(input_shape: torch.Size | None) -> bool:
    return input_shape is not None and all(input_shape)


def _gains_on_full(backend: str, geometry: Geometry, input_shape: torch.Size | None) -> bool:
    return _known(input_shape) and backends.find(backend).gains_on_full(geometry, input_shape)


def _comparison(chosen: str, dense_us: float | None, sparse_us: float | None) -> str:
    if dense_us is None or sparse_us is None:
        return f"the only one near the fastest by estimate, {dense_us or sparse_us:.0f} us"
    if chosen == DENSE:
        return f"dense is faster here, {dense_us:.0f} us against {sparse_us:.0f} us"
    return f"{dense_us / sparse_us:.2f}x faster than dense"


def _refusals(verdicts: Mapping[str, backends.Verdict]) -> str:
    return "; ".join(dict.fromkeys(verdict.why for verdict in verdicts.values() if not verdict))


def _pack(backend: str, weight: Tensor, masks: Mapping[str, Tensor], geometry: Geometry, name: str) -> PackedWeight:
    try:
        return backends.find(backend).pack(weight, masks, geometry.groups)
    except ValueError as error:
        raise ValueError(f"{name} cannot be packed: {error}") from error
