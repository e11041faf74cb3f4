"""The modules a swapped network is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smart_kernels import paths
from smart_kernels.backends import Affine, Run, SampleRun, find
from smart_kernels.geometry import Geometry
from smart_kernels.packing import PackedWeight
from smart_kernels.paths import Samples

MAX_BOUND = 8  # paths a convolution keeps ready to run: the named ones and a few lambdas


class PerPathTensors(nn.Module):
    """One tensor a path, as buffers; a lambda mixes the two."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach().contiguous())

    def of(self, path: str | float | Samples) -> Tensor:
        """The tensor of a resolved path; for paths of samples (N, ...), one tensor each."""
        if isinstance(path, Samples):
            return self.stacked()[path.choice]
        if isinstance(path, str):
            return getattr(self, path)
        first, second = getattr(self, self.names[0]), getattr(self, self.names[-1])
        return first * (1 - path) + second * path

    def stacked(self) -> Tensor:
        """Those of both paths, (2, ...)."""
        return torch.stack([getattr(self, name) for name in (self.names[0], self.names[-1])])

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
        second: a batch norm that reads the result beside others, as in pre-activation networks: the epilogue writes
            both, and the module returns (result, normed result).
        input_shape: of the input it was planned for, padding of ``pad`` included; None if unknown.
        stage: of the network, from 0, whose path it runs on; ``second`` has a stage of its own.
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
        second: PathAffine | None = None,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.packed = packed
        self.geometry = geometry
        self.backend = backend
        self.scale = None if scale is None else PerPathTensors(scale)
        self.bias = None if bias is None else PerPathTensors(bias)
        self.relu = relu
        self.pad = pad
        self.second = second
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self.stage = 0
        self._bound: dict[paths.Path | type[Samples], Run | SampleRun] = {}
        self.register_load_state_dict_post_hook(_forget_bound)

    def forward(
        self, x: Tensor, path: paths.Path | Samples | None = None, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(N, C, H, W) -> (N, K, P, Q) on a resolved path; None means the path of the call under way.

        Each sample may have its own if ``runs_samples`` says so.
        """
        if path is None:
            path = paths.current(self.stage)
        if self.pad is not None:
            x = F.pad(x, *self.pad)
        samples = (path,) if isinstance(path, Samples) else ()
        key = Samples if samples else path
        if torch.compiler.is_compiling():
            # A graph must see the buffers themselves: what a kept call holds would become constants, stored again.
            return self._bind(key)(x, residual, *samples)
        run = self._bound.get(key)
        if run is None:
            if len(self._bound) >= MAX_BOUND:
                self._bound.clear()
            run = self._bound[key] = self._bind(key)
        return run(x, residual, *samples)

    @property
    def runs_samples(self) -> bool:
        """Whether it runs batches of which each sample has its own path, in one launch."""
        return find(self.backend).runs_samples(self.packed)

    @staticmethod
    def kernel_shape(input_shape: torch.Size, pad: tuple[Sequence[int], str] | None) -> torch.Size:
        """The (N, C, H, W) that reaches the kernel for an input of this shape."""
        left, right, top, bottom = (0, 0, 0, 0) if pad is None else pad[0]
        n, c, h, w = input_shape
        return torch.Size((n, c, h + top + bottom, w + left + right))

    def use(self, packed: PackedWeight, backend: str) -> None:
        """Runs on another backend from now on, whose packed form of the same weight is given."""
        self.packed, self.backend = packed, backend
        self._bound.clear()

    def _bind(self, path: paths.Path | type[Samples]) -> Run | SampleRun:
        backend, values = find(self.backend), next(self.packed.buffers())
        if not (verdict := backend.supports(self.geometry, values.dtype, values.device)):
            raise RuntimeError(
                f"a layer planned for the {self.backend} backend was moved: {verdict.why}; "
                "move the whole swapped network, which is then planned anew, not parts of it"
            )

        def of(tensors: PerPathTensors, stage: int) -> Tensor:
            return tensors.stacked() if path is Samples else tensors.of(paths.at_stage(path, stage))

        scale = None if self.scale is None else of(self.scale, self.stage)
        bias = None if self.bias is None else of(self.bias, self.stage)
        affine = None
        if self.second is not None:
            # Its tensors end with (K, 1, 1).
            second = (of(each, self.second.stage) for each in (self.second.scale, self.second.bias))
            affine = Affine(*(each.flatten(-3) for each in second), self.second.relu)
        if path is Samples:
            return backend.bind_samples(self.packed, self.geometry, scale, bias, self.relu, affine)
        own = paths.at_stage(path, self.stage)
        return backend.bind(self.packed, self.geometry, own, scale, bias, self.relu, affine)

    def _apply(self, *args: Any, **kwargs: Any) -> SparseConv2d:
        # .to() and its like replace the buffers that bound calls hold.
        self._bound.clear()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": {}}

    def extra_repr(self) -> str:
        g = self.geometry
        return f"stride={g.stride}, padding={g.padding}, groups={g.groups}, backend={self.backend!r}, relu={self.relu}"


class SparseLinear(SparseConv2d):
    """A fully connected layer, run as the 1x1 convolution of one-pixel images that it is.

    Its packed weight is (out features, in features, 1, 1).
    """

    def forward(self, x: Tensor, path: paths.Path | None = None) -> Tensor:
        """(..., in features) -> (..., out features)."""
        features = self.geometry.weight_shape[0]
        return super().forward(x.reshape(-1, x.shape[-1], 1, 1), path).reshape(*x.shape[:-1], features)

    @property
    def runs_samples(self) -> bool:
        """No: what it takes for a sample is a row, of which a batch may have several for each."""
        return False

    @staticmethod
    def kernel_shape(input_shape: torch.Size, pad: tuple[Sequence[int], str] | None) -> torch.Size:
        """The (N, C, 1, 1) that reaches the kernel for an input of this shape."""
        return torch.Size((input_shape[:-1].numel(), input_shape[-1], 1, 1))


def _forget_bound(conv: SparseConv2d, incompatible_keys: object) -> None:
    # What was mixed for a lambda is of the old values, and so are all buffers after load_state_dict(assign=True).
    conv._bound.clear()


class PathAffine(nn.Module):
    """A batch norm that follows no convolution: x * scale + bias per channel of each path, then perhaps ReLU."""

    def __init__(self, scale: Mapping[str, Tensor], bias: Mapping[str, Tensor], relu: bool = False) -> None:
        super().__init__()
        self.scale = PerPathTensors({name: value[:, None, None] for name, value in scale.items()})
        self.bias = PerPathTensors({name: value[:, None, None] for name, value in bias.items()})
        self.relu = relu
        self.stage = 0

    def of(self, path: paths.Path | Samples) -> tuple[Tensor, Tensor]:
        """Scale and bias, (C, 1, 1) each, of what a resolved path means for the norm's stage."""
        own = paths.at_stage(path, self.stage)
        return self.scale.of(own), self.bias.of(own)

    def forward(self, x: Tensor, path: paths.Path | Samples | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        scale, bias = self.of(paths.current(self.stage) if path is None else path)
        y = torch.addcmul(bias, x, scale)
        return y.relu_() if self.relu else y

    def extra_repr(self) -> str:
        return f"relu={self.relu}"
