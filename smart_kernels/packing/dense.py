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
            self.register_buffer(f"weight_{name}", torch.where(mask, weight.detach(), weight.new_zeros(())))
            self.register_buffer(f"mask_{name}", mask.clone())

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
        return getattr(self, f"mask_{self._own(path)}")

    def validate(self) -> None:
        for name, buffer in self.named_buffers():
            if tuple(buffer.shape) != tuple(self.shape):
                raise ValueError(f"{name} has shape {tuple(buffer.shape)}: {tuple(self.shape)} is needed")

    @property
    def nbytes(self) -> int:
        """Bytes of the weights; the masks, kept to tell apart a kept zero from a dropped weight, never run."""
        return sum(b.numel() * b.element_size() for name, b in self.named_buffers() if name.startswith("weight_"))
