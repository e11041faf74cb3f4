"""Streams of channels as they are found in networks' graphs."""

import pytest
import torch
import torch.nn.functional as F
from networks import DualNorm, MaskedConv
from torch import nn

from smart_kernels.coupling import find_streams


class Residual(nn.Module):
    """Two writers of one sum; a depthwise convolution and a gate inside; a concatenation that two layers read."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.norm = MaskedConv(8, 16, 1), DualNorm(16)
        self.depthwise = MaskedConv(16, 16, 3, padding=1, groups=16)
        self.squeeze, self.expand = MaskedConv(16, 4, 1), MaskedConv(4, 16, 1)
        self.b = MaskedConv(16, 8, 1)
        self.grouped = MaskedConv(8, 12, 3, groups=2)
        self.side, self.joint = MaskedConv(8, 12, 3), MaskedConv(24, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.depthwise(F.silu(self.norm(self.a(x))))
        y = y * torch.sigmoid(self.expand(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        x = self.b(y) + x
        x = self.joint(torch.cat([self.grouped(x), self.side(x)], 1))
        return self.fc(x.mean((2, 3)))


def test_streams_of_one_network():
    found = {tuple(stream.writers): stream for stream in find_streams(Residual()) if stream.writers}
    read = {writers: stream.readers for writers, stream in found.items()}
    assert read == {
        ("a", "depthwise", "expand"): ["squeeze", "b"],  # through the gate, and pixel by pixel
        ("squeeze",): ["expand"],
        ("b",): ["a", "side"],  # the dense stem writes into it too
        ("grouped",): [],
        ("side",): [],
        ("joint",): [],
    }
    elsewhere = {writers[0] for writers, stream in found.items() if stream.read_elsewhere}
    assert elsewhere == {"b", "grouped", "side", "joint"}
    assert not any(stream.whole for stream in found.values())
    whole = {
        reader: stream.channels for stream in find_streams(Residual()) if stream.whole for reader in stream.readers
    }
    assert whole == {"depthwise": 1, "grouped": 4, "joint": 24}


class Preactivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = MaskedConv(3, 8, 3, padding=1), DualNorm(8), MaskedConv(8, 8, 3, padding=1)
        self.twice, self.idle = MaskedConv(8, 8, 1), MaskedConv(8, 4, 1)

    def forward(self, x):
        x = self.first(x)
        x = self.second(F.relu(self.norm(x))) + x
        return self.twice(F.relu(self.twice(x)))


def test_norms_before_convolutions_layers_used_twice_and_layers_not_used():
    streams = find_streams(Preactivation())
    sides = [(stream.writers, stream.readers) for stream in streams]
    # What the layer used twice writes it reads as well, and so all is one stream.
    assert (["first", "second", "twice"], ["second", "twice"]) in sides
    assert ([], ["first"]) in sides and (["idle"], []) in sides and ([], ["idle"]) in sides
    assert [stream.readers for stream in streams if stream.whole] == [["first"], ["idle"]]


def test_a_network_that_cannot_be_traced_is_refused():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(Exception, match="control flow"):
        find_streams(nn.Sequential(MaskedConv(3, 8, 3), Branches()))
