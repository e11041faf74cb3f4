"""Networks for the tests, built on the protocols alone (``.masks``, ``.norms``): nothing of the smart package."""

import torch
import torch.nn.functional as F
from torch import nn

from smart_kernels import paths


class Masked:
    """A layer with a weight, and masks of both paths in buffers ``mask_clean`` and ``mask_adv``."""

    @property
    def masks(self):
        return {name: getattr(self, f"mask_{name}") for name in paths.PATHS}

    @property
    def masked_weight(self):
        """That of the path under way."""
        path = paths.current()
        if isinstance(path, str):
            return self.weight * self.masks[path]
        return self.weight * (self.mask_clean * (1 - path) + self.mask_adv * path)


class MaskedConv(Masked, nn.Conv2d):
    def __init__(self, *args, density=0.2, **kwargs):
        super().__init__(*args, **kwargs)
        for name in paths.PATHS:
            self.register_buffer(f"mask_{name}", torch.rand_like(self.weight) < density)

    def forward(self, x):
        return self._conv_forward(x, self.masked_weight, self.bias)


class DualNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(channels) for name in paths.PATHS})
        for norm in self.norms.values():
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.data.normal_()
            norm.bias.data.normal_()

    def forward(self, x):
        path = paths.current()
        if isinstance(path, str):
            return self.norms[path](x)
        return self.norms["clean"](x) * (1 - path) + self.norms["adv"](x) * path


class BasicBlock(nn.Module):
    def __init__(self, inner, outer, stride):
        super().__init__()
        self.conv1 = MaskedConv(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = DualNorm(outer)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = MaskedConv(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = DualNorm(outer)
        self.shortcut = nn.Sequential()
        if stride > 1 or inner != outer:
            self.shortcut = nn.Sequential(MaskedConv(inner, outer, 1, stride, bias=False), DualNorm(outer))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        return F.relu(y)


class PreActivation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bn1, self.bn2 = DualNorm(channels), DualNorm(channels)
        self.conv1 = MaskedConv(channels, channels, 3, padding=1, padding_mode="reflect")
        self.conv2 = MaskedConv(channels, channels, 3, padding="same", groups=2)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        y = self.conv1(torch.relu(self.bn1(x)))
        return x + self.conv2(self.dropout(torch.relu(self.bn2(y))))


class TwoPaths(nn.Module):
    """Residual blocks of both kinds; ``control_flow`` makes it impossible to capture as a graph."""

    def __init__(self, control_flow=False):
        super().__init__()
        self.control_flow = control_flow
        self.stem = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.bn = DualNorm(16)
        self.layers = nn.Sequential(BasicBlock(16, 16, 1), BasicBlock(16, 24, 2), PreActivation(24))
        self.classifier = nn.Linear(24, 10)

    def forward(self, x, path="clean"):
        with paths.running(path if isinstance(path, float) else paths.resolve(path)):
            x = F.relu(self.bn(self.stem(x)))
            if self.control_flow and x.sum() > -1:
                x = x * 1.5
            x = F.adaptive_avg_pool2d(self.layers(x), 1)
            return self.classifier(torch.flatten(x, 1))


class ManyOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = MaskedConv(1, 4, 3), MaskedConv(4, 2, 3)

    def forward(self, x):
        a = self.a(x)
        return {"features": a, "maps": (self.b(a), a.mean((2, 3)))}


def sparsify(model, density=0.2):
    """Drops weights of any network's layers at random."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d, nn.Conv1d)):
                module.weight.mul_(torch.rand(module.weight.shape) < density)
    return model.eval()


def why(sparse, name):
    """What the report says of a layer."""
    return next(row["why"] for row in sparse.report() if row["name"] == name)
