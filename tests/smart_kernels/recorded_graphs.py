"""What stands in for CUDA graphs where there is no GPU."""

import contextlib

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from smart_kernels import cuda_graphs


class Event:
    def __init__(self, log):
        self.log = log

    def wait(self):
        self.log.append("wait")

    def record(self):
        self.log.append("record")


class Recorder(cuda_graphs.Cuda):
    """Captures by remembering the call."""

    def __init__(self):
        self.log, self.captured, self.capturing, self.fails = [], 0, False, False

    def serves(self, x):
        return not self.capturing

    def device(self, device):
        return contextlib.nullcontext()

    def pool(self):
        self.log.append("pool")
        return object()

    def warm_up(self, call):
        self.log.append("warm up")
        call()

    def capture(self, call, pool):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
        assert torch.backends.cudnn.benchmark
        self.captured += 1
        self.capturing = True
        try:
            result = call()
        finally:
            self.capturing = False

        def replay():
            self.log.append("replay")
            self.capturing = True  # nothing decides anything while a graph runs
            with torch.inference_mode(False), torch.no_grad():
                fresh = tree_leaves(call())
                for old, new in zip(tree_leaves(result), fresh, strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)
            self.capturing = False

        return replay, result

    def event(self):
        return Event(self.log)

    def synchronize(self, device):
        self.log.append("synchronize")
