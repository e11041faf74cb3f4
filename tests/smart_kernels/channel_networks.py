"""Networks whose masks drop channels, in all the ways that activations can be compact."""

import torch
import torch.nn.functional as F
from networks import DualNorm, Masked, MaskedConv
from torch import nn

from smart_kernels import paths


class ChannelConv(MaskedConv):
    """Drops whole channels, on each path its own."""

    def __init__(self, *args, kept=0.5, **kwargs):
        super().__init__(*args, **kwargs)
        for name in paths.PATHS:
            k, c = self.weight.shape[:2]
            rows, columns = torch.rand(k) < kept, torch.rand(c) < max(kept, 2 / c)
            rows[torch.randint(k, ())], columns[torch.randint(c, ())] = True, True
            getattr(self, f"mask_{name}").copy_((rows[:, None] & columns)[:, :, None, None])


class Block(nn.Module):
    def __init__(self, inner, outer, stride=1):
        super().__init__()
        self.conv1, self.bn1 = ChannelConv(inner, outer, 3, stride, 1, bias=False), DualNorm(outer)
        self.conv2, self.bn2 = ChannelConv(outer, outer, 3, padding=1), DualNorm(outer)
        self.shortcut = nn.Sequential()
        if stride > 1 or inner != outer:
            self.shortcut = nn.Sequential(ChannelConv(inner, outer, 1, stride, bias=False), DualNorm(outer))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class PreActivation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bn1, self.conv1 = DualNorm(channels), ChannelConv(channels, channels, 3, padding=1, bias=False)
        self.bn2, self.conv2 = DualNorm(channels), ChannelConv(channels, channels, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(y))) + x


class Net(nn.Module):
    """A stem, a middle, and a classifier; ``forward`` reads paths by the protocol."""

    def __init__(self, *middle, channels=24, head=None):
        super().__init__()
        self.stem, self.bn = ChannelConv(3, 16, 3, padding=1), DualNorm(16)
        self.middle = nn.Sequential(*middle)
        self.head = head or nn.Linear(channels, 10)

    def forward(self, x, path="clean"):
        with paths.running(path if isinstance(path, float) else paths.resolve(path)):
            x = self.middle(F.relu(self.bn(self.stem(x))))
            return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class UnfusedSum(nn.Module):
    """Sums two values that others read too: the graph adds them itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b = ChannelConv(16, 16, 3, padding=1), ChannelConv(16, 16, 3, padding=1)
        self.bn_a, self.bn_b = DualNorm(16), DualNorm(16)
        self.c, self.d = ChannelConv(16, 24, 3, padding=1), ChannelConv(16, 24, 3, padding=1)

    def forward(self, x):
        a, b = self.bn_a(self.a(x)), self.bn_b(self.b(x))
        return self.c(a + b) + self.d(a) + self.d(b * 1.0)


class Concatenation(nn.Module):
    """What reads channels in ways unknown here gets all of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (ChannelConv(16, 8, 3, padding=1) for _ in range(3))

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return torch.cat([a, b, F.softmax(self.c(x), dim=1)], 1)


class Groups(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = ChannelConv(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.c = ChannelConv(16, 24, 1)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


class Pools(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = ChannelConv(16, 16, 3, padding=2, dilation=2), ChannelConv(16, 24, 3, padding=1)
        self.c, self.d = (ChannelConv(24, 24, 3, padding=1, padding_mode="reflect") for _ in range(2))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.a(x)), 3, 2, 1)
        x = F.avg_pool2d(self.b(x), 2)
        return F.avg_pool2d(self.d(F.relu(self.c(x))), 3, 1, 1)  # its zeros are averaged in


class OtherActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = ChannelConv(16, 24, 3, padding=1), ChannelConv(24, 24, 3, padding=1)

    def forward(self, x):
        return self.b(F.silu(self.a(x)))


class MaskedHead(Masked, nn.Linear):
    def __init__(self):
        super().__init__(24, 10)
        for name in paths.PATHS:
            self.register_buffer(f"mask_{name}", (torch.rand(24) < 0.5).expand(10, 24).contiguous())

    def forward(self, x):
        return F.linear(x, self.masked_weight, self.bias)


NETWORKS = {
    "residual": lambda: Net(Block(16, 16), Block(16, 24, 2), Block(24, 24)),
    "pre-activation": lambda: Net(PreActivation(16), PreActivation(16), Block(16, 24, 2)),
    "a sum of the graph's": lambda: Net(UnfusedSum()),
    "concatenation": lambda: Net(Concatenation(), Block(24, 24)),
    "groups": lambda: Net(Groups()),
    "pools": lambda: Net(Pools()),
    "another activation": lambda: Net(OtherActivation(), Block(24, 24)),
    "masked classifier": lambda: Net(Block(16, 24), head=MaskedHead()),
}
