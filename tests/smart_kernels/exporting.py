"""What the tests of exported networks share besides fixtures."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch.nn.functional as F
from networks import DualNorm, MaskedConv
from torch import nn

import smart_kernels
from smart_kernels import native

BACKENDS = ["auto", "dense", *(["cpu"] if native.missing() is None else [])]
PATHS = ("clean", "adv")
TOLERANCE = 1e-5
PACKAGE = Path(smart_kernels.__file__).parent
needs_library = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


def in_fresh_process(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def payloads(file):
    """The stored tensors of a program, as bytes."""
    with zipfile.ZipFile(file) as archive:
        names = [n for n in archive.namelist() if "/data/" in n and not n.endswith((".json", "model.pt"))]
        return [archive.read(name) for name in names]


class Small(nn.Module):
    """What AOTInductor compiles in seconds."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = MaskedConv(1, 8, 3, padding=1), MaskedConv(8, 8, 3, padding=1)
        self.norm1, self.norm2 = DualNorm(8), DualNorm(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)) + x)
        return self.fc(x.mean((2, 3)))
