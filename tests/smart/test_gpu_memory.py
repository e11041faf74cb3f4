"""Memory by the allocator's counts, which a counter plays here."""

import pytest
import torch
from torch import nn

from smart import gpu_memory
from smart.bench import _memory
from smart.peers import Ready

MEGABYTE = 2**20


class Counted(nn.Module):
    """Takes memory when it is copied, keeps some when it first runs, and some more while it runs, by its batch."""

    def __init__(self, allocator):
        super().__init__()
        self.allocator, self.ran = allocator, False

    def __deepcopy__(self, memo):
        self.allocator.take(5 * MEGABYTE)
        return Counted(self.allocator)

    def forward(self, x):
        if not self.ran:
            self.allocator.take(MEGABYTE)
        self.ran = True
        self.allocator.take(len(x) * MEGABYTE)
        self.allocator.give(len(x) * MEGABYTE)
        return x


class Allocator:
    def __init__(self):
        self.now = self.most = 100 * MEGABYTE

    def take(self, count):
        self.now += count
        self.most = max(self.most, self.now)

    def give(self, count):
        self.now -= count


@pytest.fixture
def allocator(monkeypatch):
    allocator = Allocator()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocator.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocator.most)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(allocator, "most", allocator.now))
    return allocator


def test_what_a_network_holds_and_takes(allocator):
    held, peak = gpu_memory.measure(Counted(allocator), [lambda net, x: net(x)], torch.zeros(3, 1))
    assert (held, peak) == (6 * MEGABYTE, 9 * MEGABYTE)


def test_what_a_call_takes(allocator):
    net = Counted(allocator)
    net(torch.zeros(1))
    assert gpu_memory.peak(lambda: net(torch.zeros(4, 1)), torch.device("cpu")) == 4 * MEGABYTE


def test_peaks_are_not_told_where_no_allocator_counts(allocator, monkeypatch):
    class OnGpu:
        is_cuda, device = True, torch.device("cpu")

        def __getitem__(self, rows):
            return torch.zeros(1, 1)

        def __len__(self):
            return 2

    class Sparse(Counted):
        def __deepcopy__(self, memo):
            self.allocator.take(2 * MEGABYTE)
            return Sparse(self.allocator)

        def forward(self, x, path):
            return super().forward(x)

    x, twin = OnGpu(), Counted(allocator)
    runners = {
        ("eager", "clean"): Ready(twin),
        ("cudnn", "clean"): Ready(lambda x: x, net=Counted(allocator)),
        ("max-autotune", "clean"): Ready(lambda x: x, counted=False),
        ("smart_kernels", "clean"): Ready(lambda x: x),
    }
    memory = _memory(runners, x, {"clean": twin}, Sparse(allocator))
    weights = 6 * MEGABYTE
    assert memory == {
        ("eager", "clean"): (weights, weights + 2 * MEGABYTE),
        ("cudnn", "clean"): (weights, weights + 2 * MEGABYTE),
        ("max-autotune", "clean"): (weights, None),
        ("smart_kernels", "clean"): (3 * MEGABYTE, 5 * MEGABYTE),
    }
