"""Networks for small images as plain PyTorch, and their conversion into two-path networks.

The definitions hold ordinary ``nn.Conv2d`` and ``nn.BatchNorm2d`` layers and know nothing of paths; :func:`convert`
puts masks and dual batch norms into them, as it does into anyone's network. ``torch.fx`` can trace every forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smart.layers import DualBatchNorm2d, SmartConv2d, SmartNet, smart_convs
from smart.masks import apply_random_masks, check_density, check_overlap
from smart_kernels import patterns


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
    density: float | Mapping[str, float] = 0.2,
    pattern: str = "unstructured",
    overlap: str | float = "independent",
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dropout: float = 0.0,
) -> SmartNet:
    """A two-path network by name, with random masks; weights and masks follow from ``seed`` alone.

    Every convolution is masked except the stem: it sees 1 to 3 image channels, so a filter of it at density 0.2 would
    keep 2 to 5 weights and lose whole colours, while its weights are below 0.1 % of a ResNet's.

    Args:
        name: one of :func:`list_models`.
        density, pattern, overlap, mean, std: as for :func:`convert`.
        dropout: between the convolutions of a wide ResNet's blocks (the published training uses 0.3).

    Raises:
        ValueError: any argument outside what is accepted.
    """
    spec = {
        "name": name,
        "num_classes": num_classes,
        "in_channels": in_channels,
        "density": check_density(density),
        "pattern": str(patterns.parse(pattern)),
        "overlap": overlap,
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
        net, spec["density"], pattern, overlap, lambda _, layer: layer != "conv1", seed, spec["mean"], spec["std"]
    )
    model.spec = spec
    return model


def convert(
    module: nn.Module,
    density: float | Mapping[str, float],
    pattern: str = "unstructured",
    overlap: str | float = "independent",
    filter_fn: Callable[[nn.Module, str], bool] = lambda module, name: True,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> SmartNet:
    """Puts two masks into the convolutions of a network and two batch norms in the place of each.

    ``module`` itself is not changed. Layers used in several places stay shared. Subclasses of ``nn.Conv2d`` and
    ``nn.BatchNorm2d`` compute something of their own and are left as they are.

    Args:
        module: any network whose forward takes one batch (N, C, H, W).
        density: the part of each masked layer's weights that lives, in (0, 1]; a number, or {"clean": d, "adv": d}.
        pattern: of the masks: ``"unstructured"``, N:M such as ``"2:4"``, ``"block:64x16"`` or ``"channel"``. Rewiring
            moves the masks of ``"unstructured"`` only; others stay as drawn.
        overlap: ``"independent"``, ``"disjoint"``, ``"shared"``, ``"nested"``, or the wanted
            |clean & adv| / min(|clean|, |adv|) as a number in [0, 1].
        filter_fn: called with each convolution and its name; False leaves it dense.
        seed: of the masks.
        mean, std: normalisation inside the network, one number per image channel; default: none. Without them the
            channel count is that of the first registered convolution.

    Raises:
        ValueError: no convolution to mask, or a density, pattern or overlap outside what is accepted.
        TypeError: ``module`` is not an ``nn.Module``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}: give an nn.Module")
    if smart_convs(module) or any(isinstance(layer, DualBatchNorm2d) for layer in module.modules()):
        raise ValueError(f"{type(module).__name__} has two paths already: convert a network that has one")
    densities = check_density(density)
    check_overlap(overlap, densities)
    parsed = patterns.parse(pattern)
    convs = {name: m for name, m in module.named_modules() if type(m) is nn.Conv2d}
    chosen = {name for name, conv in convs.items() if filter_fn(conv, name)}
    if not chosen:
        raise ValueError(
            f"{type(module).__name__} has {len(convs)} nn.Conv2d and filter_fn accepts none of them: "
            "give a plain network with convolutions, and a filter that returns True for some"
        )
    if mean is None or std is None:
        channels = len(mean or std or ()) or next(iter(convs.values())).in_channels
        mean = mean if mean is not None else [0.0] * channels
        std = std if std is not None else [1.0] * channels
    net = SmartNet(_replace_layers(copy.deepcopy(module), chosen), mean, std, pattern=str(parsed))
    apply_random_masks(smart_convs(net).values(), densities, overlap, seed, parsed)
    net.training = module.training
    return net


def _replace_layers(net: nn.Module, chosen: set[str]) -> nn.Module:
    """Swaps the convolutions named in ``chosen`` and all batch norms of ``net`` for the two-path layers, in place."""
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer in net.named_modules():
        if name in chosen:
            replacements[layer] = SmartConv2d.from_conv(layer)
        elif type(layer) is nn.BatchNorm2d:
            replacements[layer] = DualBatchNorm2d(layer)
    for parent in list(net.modules()):
        for key, child in parent._modules.items():
            if child in replacements:
                parent._modules[key] = replacements[child]
    return replacements.get(net, net)
