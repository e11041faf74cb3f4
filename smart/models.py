"""Networks for small images as plain PyTorch, and by name with two paths.

The definitions hold ordinary ``nn.Conv2d`` and ``nn.BatchNorm2d`` layers and know of no paths; :func:`smart.convert`
puts masks and dual batch norms into them, as it does into anyone's network. ``torch.fx`` can trace every forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smart.conversion import convert
from smart.layers import SmartNet
from smart.methods import read_plan


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, fig. 5 left); a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network with a 3x3 stem of stride 1, for images of 8 to 64 pixels.

    Args:
        blocks, widths, strides: basic blocks, channels and first stride of each stage.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        num_classes: int,
        in_channels: int,
        widths: Sequence[int] = (64, 128, 256, 512),
        strides: Sequence[int] = (1, 2, 2, 2),
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages = []
        channels = widths[0]
        for depth, width, stride in zip(blocks, widths, strides, strict=True):
            first = BasicBlock(channels, width, stride)
            stages.append(nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(depth - 1))))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.stages(x)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class PreActivationBlock(nn.Module):
    """A wide block (Zagoruyko and Komodakis 2016): norm and ReLU before each convolution, dropout between them.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input, without a norm.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        y = F.relu(self.bn2(self.conv1(activated)))
        return self.conv2(self.dropout(y)) + shortcut


class WideResNet(nn.Module):
    """WRN-``depth``-``widen``: three stages of 16, 32 and 64 times ``widen`` channels, (depth - 4) / 6 blocks each."""

    def __init__(self, depth: int, widen: int, num_classes: int, in_channels: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        stages = []
        channels = 16
        for width, stride in ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)):
            first = PreActivationBlock(channels, width, stride, dropout)
            others = (PreActivationBlock(width, width, 1, dropout) for _ in range((depth - 4) // 6 - 1))
            stages.append(nn.Sequential(first, *others))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.conv1(x))
        x = F.relu(self.bn(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


_RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": {"blocks": (2, 2, 2, 2)},
    "resnet34": {"blocks": (3, 4, 6, 3)},
    "tiny": {"blocks": (1, 1, 1), "widths": (32, 64, 128), "strides": (1, 1, 2)},
}
_WIDE_RESNETS: dict[str, dict[str, int]] = {
    "wrn_16_8": {"depth": 16, "widen": 8},
    "wrn_40_2": {"depth": 40, "widen": 2},
}


def list_models() -> list[str]:
    """The names that :func:`create_model` knows."""
    return sorted([*_RESNETS, *_WIDE_RESNETS])


def build(name: str, num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0) -> nn.Module:
    """A plain network, dense and with one path, freshly initialised from torch's global random state.

    Convolutions start from He's normal distribution over the fan-out.

    Raises:
        ValueError: an unknown name, a size below 1, dropout outside [0, 1) or in a network without dropout layers.
    """
    if name not in _RESNETS and name not in _WIDE_RESNETS:
        raise ValueError(f"unknown model {name!r}: accepted are {', '.join(list_models())}")
    for what, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{what} is {value!r}: give an integer of at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}: it must lie in [0, 1)")
    net: nn.Module
    if name in _RESNETS:
        if dropout:
            raise ValueError(
                f"dropout is {dropout}: {name} has no dropout layers, only {', '.join(_WIDE_RESNETS)} have"
            )
        net = ResNet(num_classes=num_classes, in_channels=in_channels, **_RESNETS[name])
    else:
        net = WideResNet(num_classes=num_classes, in_channels=in_channels, dropout=dropout, **_WIDE_RESNETS[name])
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def create_model(
    name: str,
    num_classes: int = 10,
    in_channels: int = 3,
    density: float | Mapping[str, float] | None = None,
    pattern: str = "unstructured",
    overlap: str | float = "independent",
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dropout: float = 0.0,
    allocation: str = "uniform",
    masked_layers: str | Sequence[str] = "all",
    dedicated_layers: str | Sequence[str] = "all",
    strict: bool = False,
    method: str = "smart",
) -> SmartNet:
    """A two-path network by name, with random masks; weights and masks follow from ``seed`` alone.

    Every convolution can be masked except the stem: it sees 1 to 3 image channels, so a filter of it at density 0.2
    would keep 2 to 5 weights and lose whole colours, while its weights are below 0.1 % of a ResNet's.

    Args:
        name: one of :func:`list_models`.
        density, pattern, overlap, mean, std, allocation, masked_layers, dedicated_layers, strict, method: as for
            :func:`smart.convert`. Names of layers are such as ``"stages.2.0.conv1"``.
        dropout: between the convolutions of a wide ResNet's blocks (the published training uses 0.3).

    Raises:
        ValueError: any argument outside what is accepted.
    """
    choices = {
        "density": density,
        "pattern": pattern,
        "overlap": overlap,
        "allocation": allocation,
        "masked_layers": masked_layers,
        "dedicated_layers": dedicated_layers,
    }
    plan = read_plan(method, choices).settings()
    spec = {
        "name": name,
        "method": method,
        "num_classes": num_classes,
        "in_channels": in_channels,
        **plan,
        "seed": seed,
        "mean": list(mean) if mean is not None else [0.0] * in_channels,
        "std": list(std) if std is not None else [1.0] * in_channels,
        "dropout": dropout,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build(name, num_classes, in_channels, dropout)
    for what in ("mean", "std"):
        if len(spec[what]) != in_channels:
            raise ValueError(
                f"{what} has {len(spec[what])} numbers: give one for each of the {in_channels} image channels"
            )
    model = convert(
        net,
        filter_fn=lambda _, layer: layer != "conv1",
        seed=seed,
        mean=spec["mean"],
        std=spec["std"],
        strict=strict,
        method=method,
        **plan,
    )
    model.spec = spec
    return model
