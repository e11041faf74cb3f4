"""The dense format: one masked copy of the weight a path, for backends that cannot skip zeros."""

from __future__ import annotations

from torch import Tensor

from smart_kernels.packing.per_path import PerPathWeight


class DenseWeight(PerPathWeight):
    """Masked copies ready to run; paths whose masks agree share one copy."""

    format = "dense"

    def _register(self, name: str, weight: Tensor, mask: Tensor) -> None:
        self._register_weight(name, weight, mask)

    def _dense(self, name: str) -> Tensor:
        return getattr(self, f"weight_{name}")

    def mask(self, path: str) -> Tensor:
        return self._mask(self._owner(path))

    def validate(self) -> None:
        for name, buffer in self.named_buffers():
            if tuple(buffer.shape) != tuple(self.shape):
                raise ValueError(f"{name} has shape {tuple(buffer.shape)}: {tuple(self.shape)} is needed")
