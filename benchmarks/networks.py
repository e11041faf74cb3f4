"""Networks of the kinds people prune, in plain PyTorch: bottlenecks, VGG, depthwise blocks, a U-Net.

Each takes ``width``, the channels of its first stage, and ``depth``, the blocks of each stage, so that tests run small
ones and benchmarks realistic ones. Images are (N, 3, H, W). Batch norms get statistics as training would leave them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


def conv_norm(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act=nn.ReLU):
    """Convolution, batch norm, and an activation if there is one."""
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([act(inplace=True)] if act else []))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut (He et al. 2016, fig. 5 right)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(inputs, width, 1), conv_norm(width, width, 3, stride), conv_norm(width, 4 * width, 1, act=None)
        )
        same = stride == 1 and inputs == 4 * width
        self.shortcut = nn.Identity() if same else conv_norm(inputs, 4 * width, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def bottleneck(width: int = 64, depth: int = 3) -> nn.Module:
    """As ResNet-50, with a 3x3 stem for small images and four stages of ``depth`` blocks."""
    layers, channels = [conv_norm(3, width)], width
    for stage in range(4):
        for i in range(depth):
            layers.append(Bottleneck(channels, width << stage, 2 if stage and not i else 1))
            channels = 4 * (width << stage)
    return _classifier(layers, nn.Linear(channels, CLASSES))


def vgg(width: int = 64, depth: int = 2) -> nn.Module:
    """VGG with batch norms: stages of 3x3 convolutions and max pooling, two hidden fully connected layers."""
    layers, channels = [], 3
    for stage in range(4):
        for _ in range(depth):
            layers.append(conv_norm(channels, width << stage))
            channels = width << stage
        layers.append(nn.MaxPool2d(2))
    hidden = 8 * width
    head = [nn.Linear(channels, hidden), nn.ReLU(inplace=True), nn.Dropout()]
    head += [nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(hidden, CLASSES)]
    return _classifier(layers, *head)


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter by depthwise 3x3, project by 1x1 (Sandler et al. 2018); optionally squeeze and excite."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, expand: int, act: type[nn.Module], squeeze: bool
    ) -> None:
        super().__init__()
        hidden = inputs * expand
        self.expand = conv_norm(inputs, hidden, 1, act=act)
        self.filter = conv_norm(hidden, hidden, 3, stride, groups=hidden, act=act)
        self.gate = SqueezeExcite(hidden, max(1, inputs // 4)) if squeeze else nn.Identity()
        self.project = conv_norm(hidden, outputs, 1, act=None)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.gate(self.filter(self.expand(x))))
        return x + y if self.residual else y


class SqueezeExcite(nn.Module):
    """Scales channels by what a small network makes of their means (Hu et al. 2018)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))))


def _inverted(width: int, depth: int, act: type[nn.Module], squeeze: bool) -> nn.Module:
    layers, channels = [conv_norm(3, width, act=act)], width
    for stage in range(4):
        for i in range(depth):
            stride = 2 if stage and not i else 1
            layers.append(InvertedResidual(channels, width << stage, stride, 6 if stage else 2, act, squeeze))
            channels = width << stage
    layers.append(conv_norm(channels, 4 * channels, 1, act=act))
    return _classifier(layers, nn.Dropout(0.2), nn.Linear(4 * channels, CLASSES))


def mobilenet(width: int = 24, depth: int = 2) -> nn.Module:
    """As MobileNetV2: inverted residuals with depthwise convolutions and ReLU6."""
    return _inverted(width, depth, nn.ReLU6, squeeze=False)


def efficientnet(width: int = 24, depth: int = 2) -> nn.Module:
    """As EfficientNet: the same with SiLU and squeeze-and-excite."""
    return _inverted(width, depth, nn.SiLU, squeeze=True)


class UNet(nn.Module):
    """An encoder and a decoder with skips that concatenate; a map of classes (N, classes, H, W) comes out."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(*(conv_norm(inputs if not i else outputs, outputs) for i in range(depth)))

        self.enter, self.down = stage(3, width), stage(width, 2 * width)
        self.bottom = stage(2 * width, 4 * width)
        self.up_bottom = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.join_down, self.join_enter = stage(4 * width, 2 * width), stage(3 * width, width)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.enter(x)
        second = self.down(F.max_pool2d(first, 2))
        y = self.up_bottom(self.bottom(F.max_pool2d(second, 2)))
        y = self.join_down(torch.cat([y, second], dim=1))
        y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(self.join_enter(torch.cat([y, first], dim=1)))


def unet(width: int = 32, depth: int = 2) -> nn.Module:
    """A U-Net of two levels (Ronneberger et al. 2015), one upsampling learned, one bilinear."""
    return UNet(width, depth)


NETWORKS = {build.__name__: build for build in (bottleneck, vgg, mobilenet, efficientnet, unet)}


def make(name: str, width: int | None = None, depth: int | None = None, seed: int = 0) -> nn.Module:
    """A network of ``NETWORKS`` in eval mode; weights and statistics follow from the seed."""
    sizes = {key: value for key, value in (("width", width), ("depth", depth)) if value is not None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = NETWORKS[name](**sizes)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.8, 1.2)
                nn.init.normal_(module.bias, std=0.1)
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.8, 1.2)
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return net.eval()


def _classifier(layers: list[nn.Module], *head: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)
