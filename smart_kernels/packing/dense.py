"""The dense format: one masked copy of the weight a path, for backends that cannot skip zeros."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from smart_kernels.packing.base import PackedWeight, check_masked_weight


class DenseWeight(PackedWeight):
    """Masked copies ready to run; paths whose masks agree share one copy."""

    format = "dense"

    def __init__(self, weight: Tensor, masks: Mapping[str, Tensor]) -> None:
        check_masked_weight(weight, masks)
        super().__init__(tuple(weight.shape), tuple(masks))
        first, *rest = masks.values()
        self.shared = all(torch.equal(first, mask) for mask in rest)
        for name, mask in zip(self.paths[:1] if self.shared else self.paths, masks.values(), strict=False):
            masked = torch.where(mask, weight.detach(), weight.new_zeros(()))
            self.register_buffer(f"weight_{name}", masked)
            # Weights tell their mask, unless it keeps some that are zero.
            self.register_buffer(f"mask_{name}", None if torch.equal(masked != 0, mask) else mask.clone())

    def _own(self, path: str) -> str:
        if path not in self.paths:
            raise ValueError(f"unknown path {path!r}: this weight has {self.paths}")
        return self.paths[0] if self.shared else path

    def dense(self, path: str | float) -> Tensor:
        if isinstance(path, str):
            return getattr(self, f"weight_{self._own(path)}")
        first, second = (self.dense(name) for name in (self.paths[0], self.paths[-1]))
        # Where both keep the weight the coefficients sum to 1: written so that it then stays exact.
        return torch.where(first == second, first, first * (1 - path) + second * path)

    def mask(self, path: str) -> Tensor:
        mask = getattr(self, f"mask_{self._own(path)}")
        return self.dense(path) != 0 if mask is None else mask

    def validate(self) -> None:
        for name, buffer in self.named_buffers():
            if tuple(buffer.shape) != tuple(self.shape):
                raise ValueError(f"{name} has shape {tuple(buffer.shape)}: {tuple(self.shape)} is needed")
