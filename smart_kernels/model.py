"""``SparseModel``: the network that ``swap`` and ``load`` return."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smart_kernels import paths
from smart_kernels.modules import SparseConv2d
from smart_kernels.report import Row


class SparseModel(nn.Module):
    """A network for inference whose path is chosen per call, with nothing to repack: ``y = sparse(x, path="adv")``.

    Attributes:
        paths: names of its paths.
        uncaptured: why the network is not one graph but was swapped module by module; None if it is a graph.
    """

    def __init__(
        self, net: nn.Module, paths: Sequence[str], rows: Sequence[Row], takes_path: bool, uncaptured: str | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self.paths = tuple(paths)
        self.uncaptured = uncaptured
        self._rows = list(rows)
        self._takes_path = takes_path
        self.eval()

    def forward(self, x: Tensor, path: str | float | Tensor = paths.PATHS[0]) -> Tensor:
        """Runs a batch.

        Args:
            x: (N, C, H, W), as the original network takes it.
            path: a name in ``paths``, a lambda in [0, 1], or an integer tensor (N,) that picks a path for each sample.
        """
        if isinstance(path, Tensor):
            return paths.run_per_sample(self._run, x, path, self.paths)
        return self._run(x, paths.resolve(path, self.paths))

    def _run(self, x: Tensor, path: str | float) -> Tensor:
        # Layers that were left as they were read the path from here.
        with paths.running(path):
            return self.net(x, path=path) if self._takes_path else self.net(x)

    def report(self) -> list[dict[str, object]]:
        """A dict for each convolution: name, pattern, weights, density, backend, why, bytes, dense_us, sparse_us."""
        return [row.as_dict() for row in self._rows]

    def train(self, mode: bool = True) -> SparseModel:
        """Stays in eval mode: the batch norms are folded, so there is nothing to train."""
        return super().train(False)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all convolution weights, all paths together."""
        packed = {id(m.packed): m.packed.nbytes for m in self.modules() if isinstance(m, SparseConv2d)}
        return sum(packed.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of everything the network holds: convolutions, scales and biases, other layers."""
        tensors = {id(t): t for t in (*self.parameters(), *self.buffers())}
        return sum(t.numel() * t.element_size() for t in tensors.values())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|; NaN if either holds one, infinity if their shapes differ."""
    if actual.shape != expected.shape:
        return math.inf
    difference = (actual.double() - expected.double()).abs().max()
    scale = expected.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float(difference / scale)
