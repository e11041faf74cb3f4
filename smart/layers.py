"""The layers of a two-path network: one weight under two masks, two batch norms, and the network that picks."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from smart.lambdas import Lambdas
from smart_kernels import paths
from smart_kernels.paths import PATHS

_Conv = TypeVar("_Conv", bound=nn.Conv2d)
_held = threading.local()


@contextmanager
def held_weights() -> Iterator[None]:
    """In this thread, masked convolutions compute the weight of each path once until the block ends.

    For attacks, which run the same weights many times: these get no gradient, and none may change meanwhile.
    """
    outer = getattr(_held, "weights", None)
    _held.weights = {} if outer is None else outer
    try:
        yield
    finally:
        _held.weights = outer


class _MaskedWeight(torch.autograd.Function):
    """weight * mask, whose backward also adds the gradient of the *product* to the sinks.

    Autograd alone gives a masked position the gradient zero, which cannot rank candidates for regrowth; the gradient
    with respect to the effective weight is dense.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, sinks: tuple[tuple[Tensor, float], ...]) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.sinks = sinks
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        for sink, scale in ctx.sinks:
            sink.add_(grad.detach(), alpha=scale)
        return grad * mask, None, None


class SmartConv2d(nn.Conv2d):
    """A convolution with one weight theta (K, C/groups, R, S) and a binary mask of the same shape for each path.

    On a named path p the effective weight is theta * m_p; at a lambda l strictly between 0 and 1 it is
    theta * ((1 - l) * m_clean + l * m_adv). Arguments are those of :class:`torch.nn.Conv2d`; the masks start full.

    Attributes:
        stage: of the network, from 0, that the layer is in.
        shares_mask: whether the masks are one and the same on both paths, and are to stay so.
        gradient_sinks: filled by :class:`smart.Rewirer`: per path a tensor like the weight, to which each backward pass
            adds the gradient with respect to that path's effective weight. Empty: no such gradient is kept.
    """

    mask_clean: Tensor
    mask_adv: Tensor
    repeats = True  # whether it computes the same at each call, while its weights stay

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for path in PATHS:
            self.register_buffer(f"mask_{path}", torch.ones_like(self.weight, dtype=torch.bool))
        self.stage = 0
        self.shares_mask = False
        self.gradient_sinks: dict[str, Tensor] = {}

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> SmartConv2d:
        """A layer that computes what ``conv`` does, on the same parameter objects, with full masks."""
        smart = conv_like(conv, cls)
        for path in PATHS:
            setattr(smart, f"mask_{path}", torch.ones_like(conv.weight, dtype=torch.bool))
        return smart.train(conv.training)

    @property
    def masks(self) -> dict[str, Tensor]:
        """The mask of each path, bool (K, C/groups, R, S)."""
        return {"clean": self.mask_clean, "adv": self.mask_adv}

    def set_mask(self, path: str, mask: Tensor) -> None:
        """Copies ``mask``, bool and shaped like the weight, over the mask of ``path``.

        Raises:
            ValueError: an unknown path, or another shape.
            TypeError: ``mask`` is not bool.
        """
        if path not in PATHS:
            raise ValueError(f"unknown path {path!r}: a mask belongs to 'clean' or 'adv'")
        if mask.dtype != torch.bool:
            raise TypeError(f"the mask has dtype {mask.dtype}: give a bool tensor, such as mask != 0")
        if mask.shape != self.weight.shape:
            raise ValueError(
                f"the mask has shape {tuple(mask.shape)}: this layer's weight has {tuple(self.weight.shape)}"
            )
        self.masks[path].copy_(mask)

    def union(self) -> Tensor:
        """Positions alive in at least one path, bool (K, C/groups, R, S)."""
        return self.mask_clean | self.mask_adv

    def effective_weight(self, path: str | float) -> Tensor:
        """The weight (K, C/groups, R, S) that a resolved path convolves with."""
        if isinstance(path, str):
            mask, shares = self.masks[path], {path: 1.0}
        else:
            mask = (1 - path) * self.mask_clean.to(self.weight.dtype) + path * self.mask_adv.to(self.weight.dtype)
            # The mix is (1 - l) * theta * m_clean + l * theta * m_adv: each path's share of the gradient follows.
            shares = {"clean": 1 - path, "adv": path}
        theta = self._theta(path)
        if not self.gradient_sinks:
            return theta * mask
        sinks = tuple(
            (self.gradient_sinks[name], share) for name, share in shares.items() if name in self.gradient_sinks
        )
        return _MaskedWeight.apply(theta, mask, sinks)

    def _theta(self, path: str | float) -> Tensor:
        """The weight before masking, for layers that alter it on some path."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        path, held = paths.current(self.stage), getattr(_held, "weights", None)
        if held is None or not self.repeats:
            return self._conv_forward(x, self.effective_weight(path), self.bias)
        if (self, path) not in held:
            held[self, path] = self._constant_weight(path)
        return self._conv_forward(x, held[self, path], self.bias)

    @torch.no_grad()
    def _constant_weight(self, path: paths.OnePath) -> Tensor:
        """The effective weight without a history, in the precision that autocast would convolve in."""
        weight, kind = self.effective_weight(path), self.weight.device.type
        return weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else weight

    def __getstate__(self) -> dict[str, Any]:
        # A copy belongs to no Rewirer, so it has no gradients to collect.
        return {**self.__dict__, "gradient_sinks": {}}


def conv_like(conv: nn.Conv2d, kind: type[_Conv]) -> _Conv:
    """A convolution of another class with the hyper-parameters of ``conv``, on the same parameter objects.

    What else the class registers is on the meta device, for the caller to fill.
    """
    layer = kind(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        device="meta",
    )
    layer.weight, layer.bias = conv.weight, conv.bias
    return layer.train(conv.training)


class DualBatchNorm2d(nn.Module):
    """One complete batch norm (affine and running statistics) for each path; both start as copies of ``norm``.

    At a lambda l strictly between 0 and 1 the output is (1 - l) * clean(x) + l * adv(x).

    Args:
        shared: both paths have one and the same norm.
    """

    def __init__(self, norm: nn.BatchNorm2d, shared: bool = False) -> None:
        super().__init__()
        one = copy.deepcopy(norm)
        self.norms = nn.ModuleDict({path: one if shared else copy.deepcopy(norm) for path in PATHS})
        self.stage = 0
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        path = paths.current(self.stage)
        if isinstance(path, str):
            return self.norms[path](x)
        if self.norms["clean"] is self.norms["adv"]:
            return self.norms["clean"](x)
        return (1 - path) * self.norms["clean"](x) + path * self.norms["adv"](x)


class SmartNet(nn.Module):
    """A network with a clean and an adversarial expert path, called as ``model(x, path="clean")``.

    Args:
        net: the network of :class:`SmartConv2d` and :class:`DualBatchNorm2d` layers; its forward takes one tensor.
        mean, std: C numbers each, the normalisation (x - mean) / std applied before ``net``; C is the channel count
            that inputs are checked against.
        spec: the arguments of :func:`smart.create_model` that build such a network, or None for a converted one.
        pattern: that its masks obey.
        overlap: of its masks, as :func:`smart.convert` takes it.
        stages: into which its layers are divided; 0 if it has none.
        method: that it was made for, a word of :mod:`smart.methods`.
        lambda_for_each: whether it takes a path that holds a lambda for each image.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        spec: Mapping[str, Any] | None = None,
        pattern: str = "unstructured",
        overlap: str | float = "independent",
        stages: int = 0,
        method: str = "smart",
        lambda_for_each: bool = False,
    ) -> None:
        super().__init__()
        if len(mean) != len(std) or not len(mean) or not all(value > 0 for value in std):
            raise ValueError(
                f"mean {tuple(mean)} and std {tuple(std)}: give one number per image channel in each, std above 0"
            )
        self.net = net
        parameter = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))
        for name, values in (("mean", mean), ("std", std)):
            buffer = torch.tensor(values, device=parameter.device, dtype=parameter.dtype).reshape(1, -1, 1, 1)
            self.register_buffer(name, buffer)
        self.spec = dict(spec) if spec is not None else None
        self.pattern = pattern
        self.overlap = overlap
        self.stages = stages
        self.method = method
        self.lambda_for_each = lambda_for_each

    @property
    def in_channels(self) -> int:
        return self.mean.shape[1]

    def forward(self, x: Tensor, path: str | float | Tensor | Sequence[str | float] = "clean") -> Tensor:
        """Runs a batch on one path, or each of its samples or each stage of the network on its own.

        Args:
            x: (N, C, H, W), float in [0, 1].
            path: ``"clean"`` or ``"adv"``; a lambda in [0, 1]; an integer tensor (N,) of 0 (clean) and 1 (adv); or a
                sequence of names or lambdas, one for each stage.

        Returns:
            What ``net`` returns for the normalised batch: logits (N, classes) for a classifier.

        Raises:
            ValueError: wrong shape, channel count or device, an unknown path, a lambda outside [0, 1].
            TypeError: wrong dtype, or a path of another type.
        """
        # While torch.fx traces, x stands for any batch and has no shape to look at.
        if not isinstance(x, torch.fx.Proxy):
            self._check_input(x)
        if isinstance(path, Tensor):
            return paths.run_per_sample(self._run, x, path)
        if self.lambda_for_each and isinstance(path, Lambdas):
            return self._run(x, path.checked(x))
        return self._run(x, paths.resolve(path, stages=self.stages))

    def _run(self, x: Tensor, path: paths.Path) -> Tensor:
        with paths.running(path):
            return self.net((x - self.mean) / self.std)

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x is a {type(x).__name__}: give a float tensor (N, {self.in_channels}, H, W) in [0, 1]")
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x has shape {tuple(x.shape)}: this network takes (N, {self.in_channels}, H, W)")
        if not x.is_floating_point():
            raise TypeError(
                f"x has dtype {x.dtype}: this network takes floats in [0, 1], for bytes use x.float() / 255"
            )
        if torch.promote_types(x.dtype, self.mean.dtype) != self.mean.dtype:
            raise TypeError(f"x has dtype {x.dtype}: this network computes in {self.mean.dtype}, convert x to that")
        if x.device != self.mean.device:
            raise ValueError(f"x is on {x.device}: this network is on {self.mean.device}, move one of them with .to()")


def smart_convs(model: nn.Module) -> dict[str, SmartConv2d]:
    """The masked convolutions of ``model`` by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SmartConv2d)}
