"""The networks of compact activations that a swapped network runs as, one a path, made when first called for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from smart_kernels import backends, compaction
from smart_kernels.compaction import Compact
from smart_kernels.geometry import Geometry
from smart_kernels.packing import PackedWeight
from smart_kernels.paths import Path
from smart_kernels.planner import Planner

MAX_NETS = 8  # paths they are kept for: the named ones and a few lambdas


class CompactNets:
    """Makes them and keeps them.

    Attributes:
        plan: layer -> backend, as it was chosen on one path for all of them; layers it does not name run on what
            estimates say.
    """

    def __init__(self) -> None:
        self.plan: dict[str, str] = {}
        self._nets: dict[Path, Compact | None] = {}

    def of(self, net: fx.GraphModule, path: Path, names: Sequence[str]) -> Compact | None:
        """That of a resolved path of a swapped network; None if hardly any channel can be left out."""
        if path not in self._nets:
            if len(self._nets) >= MAX_NETS:
                self._nets = {path: each for path, each in self._nets.items() if path in names}
            self._nets[path] = self._make(net, path, names, self._as_planned)
        return self._nets[path]

    def choose(self, net: fx.GraphModule, path: Path, names: Sequence[str], planner: Planner) -> Compact | None:
        """As :meth:`of`, with each layer's backend chosen anew by a planner: later networks follow it."""
        self.forget()
        self.plan = {}

        def choose(
            name: str, weight: Tensor, masks: Mapping[str, Tensor], geometry: Geometry, shape: torch.Size | None
        ) -> tuple[PackedWeight, str]:
            choice = planner.choose(weight, masks, geometry, shape, name)
            self.plan[name] = choice.backend
            return choice.packed, choice.backend

        self._nets[path] = self._make(net, path, names, choose)
        return self._nets[path]

    def forget(self) -> None:
        """Drops the networks, as the weights they were made of changed; the plan stays."""
        self._nets = {}

    def __iter__(self) -> Iterator[Compact]:
        """Those there are."""
        return (each for each in self._nets.values() if each is not None)

    @staticmethod
    def _make(net: fx.GraphModule, path: Path, names: Sequence[str], choose: compaction.Choose) -> Compact | None:
        # What is made here is used in any mode later.
        with torch.inference_mode(False):
            return compaction.compact(net, path, path if isinstance(path, str) else names[0], choose)

    def _as_planned(
        self, name: str, weight: Tensor, masks: Mapping[str, Tensor], geometry: Geometry, shape: torch.Size | None
    ) -> tuple[PackedWeight, str]:
        planned = self.plan.get(name)
        backend = planned and backends.runnable(planned, geometry, masks, weight.dtype, weight.device)
        if backend:
            return backend.pack(weight, masks, geometry.groups), backend.name
        choice = Planner(measure=False).choose(weight, masks, geometry, shape, name)
        return choice.packed, choice.backend

    def __getstate__(self) -> dict[str, object]:
        return {"plan": dict(self.plan), "_nets": {}}
