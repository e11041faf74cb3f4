"""What conditions a network on lambda in the methods SMART is compared with: FiLM after norms, noise on weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smart.lambdas import LAMBDAS, Lambdas
from smart.layers import DualBatchNorm2d, SmartConv2d, conv_like
from smart_kernels import paths
from smart_kernels.paths import PATHS, OnePath

CODE_LENGTH = 128  # of a lambda, as published


class SwitchedBatchNorm2d(DualBatchNorm2d):
    """Two batch norms: the clean one norms at lambda 0, the adversarial one at any other (Wang et al. 2020)."""

    mixes = False  # for smart_kernels: between its paths it is not a mix of both

    def forward(self, x: Tensor) -> Tensor:
        path = paths.current(self.stage)
        if isinstance(path, Lambdas) and 0 < path.clean < len(x):
            clean, adv = x[: path.clean], x[path.clean :]
            return torch.cat([self.norms["clean"](clean), self.norms["adv"](adv)])
        clean = path.clean > 0 if isinstance(path, Lambdas) else path == PATHS[0]
        return self.norms["clean" if clean else "adv"](x)


class LambdaCode(nn.Module):
    """The code (128,) of each lambda: rows of a random orthogonal matrix, as OAT's published code draws them.

    Between two of ``LAMBDAS`` the codes are mixed linearly: a choice of ours, as OAT has no others.
    """

    codes: Tensor

    def __init__(self) -> None:
        super().__init__()
        orthogonal, _ = torch.linalg.qr(torch.randn(CODE_LENGTH, CODE_LENGTH))
        self.register_buffer("codes", orthogonal[: len(LAMBDAS)].clone())

    def forward(self, at: float | Tensor) -> Tensor:
        """A lambda, or (N,) of them -> (1, 128) or (N, 128)."""
        if not isinstance(at, Tensor):
            # In numbers of Python: nothing is sent to the device.
            place = sum(at >= knot for knot in LAMBDAS[1:-1])
            left, right = LAMBDAS[place : place + 2]
            return torch.lerp(self.codes[place], self.codes[place + 1], (at - left) / (right - left))[None]
        knots = torch.tensor(LAMBDAS, device=at.device)
        right = torch.searchsorted(knots, at).clamp(1, len(LAMBDAS) - 1)
        share = (at - knots[right - 1]) / (knots[right] - knots[right - 1])
        return torch.lerp(self.codes[right - 1], self.codes[right], share[:, None].to(self.codes.dtype))


class Film(nn.Module):
    """x * scale + shift by channel, both computed from the code of lambda by two linear layers (Perez et al. 2018).

    Widths and activations are those of OAT's published code.
    """

    # For smart_kernels: what this computes depends on the path of the call.
    reads_path = True

    def __init__(self, channels: int, code: LambdaCode) -> None:
        super().__init__()
        self.code = code
        self.mlp = nn.Sequential(
            nn.Linear(CODE_LENGTH, 2 * channels), nn.LeakyReLU(), nn.Linear(2 * channels, 2 * channels)
        )
        self.stage = 0

    def affine(self, path: OnePath | Lambdas) -> tuple[Tensor, Tensor]:
        """Scale and shift, (N, C) each; N is 1 where the whole batch has one lambda."""
        code = self.code(path.values if isinstance(path, Lambdas) else _lambda(path))
        scale, shift = F.leaky_relu(self.mlp(code)).chunk(2, dim=1)
        return scale, shift

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.affine(paths.current(self.stage))
        return x * scale[:, :, None, None] + shift[:, :, None, None]


class FilmNorm(nn.Module):
    """Two batch norms and FiLM after them, in the place of one batch norm."""

    def __init__(self, norm: nn.BatchNorm2d, code: LambdaCode) -> None:
        super().__init__()
        self.norm = SwitchedBatchNorm2d(norm)
        self.film = Film(norm.num_features, code)
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.film(self.norm(x))

    @torch.no_grad()
    def folded(self, path: str) -> nn.BatchNorm2d:
        """The one batch norm that does the same on a named path in eval mode."""
        own = self.norm.norms[path]
        scale, shift = (part[0] for part in self.film.affine(path))
        norm = nn.BatchNorm2d(own.num_features, own.eps, own.momentum, device=scale.device, dtype=scale.dtype)
        norm.load_state_dict(own.state_dict(), strict=own.affine)
        norm.weight.mul_(scale)
        norm.bias.mul_(scale).add_(shift)
        return norm.train(own.training)


ALPHA = 0.25  # that the noise of each layer starts with
_UNSWAPPABLE = (
    "it adds noise to its weights, drawn anew at each call: there are no weights to pack, run the network as it is"
)


class NoisyConv2d(nn.Conv2d):
    """A convolution with theta + lambda * alpha * eta, where eta is drawn anew at each call (FLOAT).

    eta ~ N(0, std(theta)^2), and alpha is learned. At lambda 0, the clean path, there is no noise.
    """

    unswappable = _UNSWAPPABLE

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> NoisyConv2d:
        """Such a layer on the parameter objects of ``conv``."""
        noisy = conv_like(conv, cls)
        noisy.alpha = _new_alpha(conv)
        noisy.stage = 0
        return noisy

    def forward(self, x: Tensor) -> Tensor:
        noisy = with_noise(self.weight, self.alpha, _lambda(paths.current(self.stage)))
        return self._conv_forward(x, noisy, self.bias)


class NoisySmartConv2d(SmartConv2d):
    """A masked convolution whose live weights have the noise of :class:`NoisyConv2d` (FLOATS).

    The deviation is that of the live weights: a reconstruction.
    """

    unswappable = _UNSWAPPABLE
    repeats = False

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> NoisySmartConv2d:
        """Such a layer on the parameter objects of ``conv``, with full masks."""
        noisy = super().from_conv(conv)
        noisy.alpha = _new_alpha(conv)
        return noisy

    def _theta(self, path: OnePath) -> Tensor:
        return with_noise(self.weight, self.alpha, _lambda(path), self.union())


def _new_alpha(conv: nn.Conv2d) -> nn.Parameter:
    return nn.Parameter(conv.weight.detach().new_full((), ALPHA))


def with_noise(theta: Tensor, alpha: Tensor, at: float, live: Tensor | None = None) -> Tensor:
    """theta + at * alpha * eta, where eta ~ N(0, std^2) and std is the deviation of theta.

    Gradients reach theta and alpha; std and eta count as constants. eta follows torch's global random state.

    Args:
        live: mask of the weights whose deviation it is; default: all.
    """
    if at == 0:
        return theta
    return theta + at * alpha * (_deviation(theta.detach(), live) * torch.randn_like(theta))


def _deviation(theta: Tensor, live: Tensor | None) -> Tensor:
    if live is None:
        return theta.std(correction=0)
    # Sums over all weights: picking the live ones would make a GPU wait to learn how many there are.
    count = live.sum()
    centred = (theta - (theta * live).sum() / count) * live
    return (centred.square().sum() / count).sqrt()


def conditioned_norms(net: nn.Module, names: Iterable[str], stages: Iterable[str]) -> set[str]:
    """The norms among ``names`` that OAT has FiLM after: all but those of shortcuts, and those after the last stage.

    As in its published networks; the parameters of ResNet-34 then number 33.36 M, as published.
    """
    stages = list(stages)
    order = [name for name, _ in net.named_modules()]
    inside = [i for i, name in enumerate(order) if any(name.startswith(f"{stage}.") for stage in stages)]
    last = max(inside, default=len(order))
    shortcuts = {"shortcut", "downsample"}
    return {name for name in names if not shortcuts & set(name.split(".")) and order.index(name) <= last}


def _lambda(path: OnePath) -> float:
    return float(PATHS.index(path)) if isinstance(path, str) else path
