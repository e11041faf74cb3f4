"""What the formats share that hold tensors of each path's own, ready to run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from smart_kernels.packing.base import PackedWeight, check_masked_weight


class PerPathWeight(PackedWeight):
    """A packed weight of which each path has its own tensors; paths whose masks agree share them."""

    def __init__(self, weight: Tensor, masks: Mapping[str, Tensor]) -> None:
        check_masked_weight(weight, masks)
        super().__init__(tuple(weight.shape), tuple(masks))
        first, *rest = masks.values()
        self.shared = all(torch.equal(first, mask) for mask in rest)
        for name in self.owners:
            self._register(name, weight.detach(), masks[name])

    @property
    def owners(self) -> tuple[str, ...]:
        """The paths whose tensors there are."""
        return self.paths[:1] if self.shared else self.paths

    @abstractmethod
    def _register(self, name: str, weight: Tensor, mask: Tensor) -> None:
        """Registers the buffers of one path."""

    @abstractmethod
    def _dense(self, name: str) -> Tensor:
        """The masked weight (K, C/groups, R, S) of one of the ``owners``."""

    def _register_weight(self, name: str, weight: Tensor, mask: Tensor) -> None:
        """Registers a weight with zeros where the mask drops it, and the mask unless the weight tells it."""
        masked = torch.where(mask, weight, weight.new_zeros(()))
        self.register_buffer(f"weight_{name}", masked)
        self.register_buffer(f"mask_{name}", None if torch.equal(masked != 0, mask) else mask.clone())

    def _mask(self, name: str) -> Tensor:
        mask = getattr(self, f"mask_{name}")
        return getattr(self, f"weight_{name}") != 0 if mask is None else mask

    def _owner(self, path: str) -> str:
        if path not in self.paths:
            raise ValueError(f"unknown path {path!r}: this weight has {self.paths}")
        return self.paths[0] if self.shared else path

    def dense(self, path: str | float) -> Tensor:
        if isinstance(path, str):
            return self._dense(self._owner(path))
        first, second = (self.dense(name) for name in (self.paths[0], self.paths[-1]))
        # Where both keep the weight the coefficients sum to 1: written so that it then stays exact.
        return torch.where(first == second, first, first * (1 - path) + second * path)
