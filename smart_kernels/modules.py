"""The modules a swapped network is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smart_kernels import paths
from smart_kernels.backends import find
from smart_kernels.geometry import Geometry
from smart_kernels.packing import PackedWeight


class PerPathTensors(nn.Module):
    """One tensor a path, as buffers; a lambda mixes the two. Paths given the very same tensor share it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach().contiguous())

    def forward(self, path: str | float) -> Tensor:
        if isinstance(path, str):
            return getattr(self, path)
        first, second = getattr(self, self.names[0]), getattr(self, self.names[-1])
        return first * (1 - path) + second * path

    def as_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.names}


class SparseConv2d(nn.Module):
    """A convolution of a packed weight and what follows it: scale, bias, residual, ReLU.

    Attributes:
        packed: the weight and its masks.
        geometry: stride, padding, dilation, groups.
        backend: the name of the backend that runs it.
        scale, bias: (K,) a path, or None; batch norm folded per path ends up here, so the values stay shared.
        relu: whether the result is rectified.
        pad: for a padding that is not of zeros, arguments of torch.nn.functional.pad.
    """

    def __init__(
        self,
        packed: PackedWeight,
        geometry: Geometry,
        backend: str,
        scale: Mapping[str, Tensor] | None = None,
        bias: Mapping[str, Tensor] | None = None,
        relu: bool = False,
        pad: tuple[Sequence[int], str] | None = None,
    ) -> None:
        super().__init__()
        self.packed = packed
        self.geometry = geometry
        self.backend = backend
        self.scale = None if scale is None else PerPathTensors(scale)
        self.bias = None if bias is None else PerPathTensors(bias)
        self.relu = relu
        self.pad = pad
        self._run: Callable[..., Tensor] = find(backend).run

    def forward(self, x: Tensor, path: str | float | None = None, residual: Tensor | None = None) -> Tensor:
        """(N, C, H, W) -> (N, K, P, Q) on a resolved path; None means the path of the call under way."""
        if path is None:
            path = paths.current()
        if self.pad is not None:
            x = F.pad(x, *self.pad)
        scale = None if self.scale is None else self.scale(path)
        bias = None if self.bias is None else self.bias(path)
        return self._run(x, self.packed, self.geometry, path, scale, bias, residual, self.relu)

    def extra_repr(self) -> str:
        g = self.geometry
        return f"stride={g.stride}, padding={g.padding}, groups={g.groups}, backend={self.backend!r}, relu={self.relu}"


class PathAffine(nn.Module):
    """A batch norm that follows no convolution: x * scale + bias per channel of each path, then perhaps ReLU."""

    def __init__(self, scale: Mapping[str, Tensor], bias: Mapping[str, Tensor], relu: bool = False) -> None:
        super().__init__()
        self.scale = PerPathTensors({name: value[:, None, None] for name, value in scale.items()})
        self.bias = PerPathTensors({name: value[:, None, None] for name, value in bias.items()})
        self.relu = relu

    def forward(self, x: Tensor, path: str | float | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if path is None:
            path = paths.current()
        y = torch.addcmul(self.bias(path), x, self.scale(path))
        return y.relu_() if self.relu else y

    def extra_repr(self) -> str:
        return f"relu={self.relu}"
