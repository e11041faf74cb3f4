"""The coverage suite: many kinds of networks in every pattern, pruned in every way, at a realistic and a small size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import prune

import smart
import smart_kernels
from benchmarks import networks
from smart.bench import SPARSE, benchmark
from smart.models import ResNet, WideResNet

# How a plain network gets its zeros. Two-path networks get masks by smart.convert.
TWO_PATHS, PRUNE, REMOVED, ZEROS = "two paths", "torch.nn.utils.prune", "prune.remove", "zeros in weights"
PATTERNS = {"unstructured": 0.2, "2:4": 0.5, "1:4": 0.25, "block:16x16": 0.2, "channel": 0.2}

# Our networks with few channels, as deep as the real ones.
SMALL: dict[str, Callable[[], nn.Module]] = {
    "tiny": lambda: ResNet((1, 1, 1), 10, 3, (8, 8, 12), (1, 1, 2)),
    "resnet18": lambda: ResNet((2, 2, 2, 2), 10, 3, (8, 8, 12, 16)),
    "resnet34": lambda: ResNet((3, 4, 6, 3), 10, 3, (8, 8, 12, 16)),
    "wrn_16_8": lambda: WideResNet(16, 1, 10, 3, 0.3),
    "wrn_40_2": lambda: WideResNet(40, 1, 10, 3, 0.3),
}


@dataclass(frozen=True)
class CoverageCase:
    """One network with zeros.

    Attributes:
        network: a name of ``smart.list_models()`` or of ``benchmarks.networks.NETWORKS``.
        how: it got its zeros: ``TWO_PATHS``, or a way to prune plain networks.
        pattern, density: of the zeros.
        size: side of its images.
    """

    network: str
    how: str = TWO_PATHS
    pattern: str = "unstructured"
    density: float = 0.2
    size: int = 32

    def __str__(self) -> str:
        return f"{self.network}, {self.how}, {self.pattern}"

    def model(self, small: bool = False) -> nn.Module:
        """The network, in eval mode; ``small`` for tests."""
        ours = self.network in SMALL
        if ours and not small:
            return smart.create_model(self.network, pattern=self.pattern, density=self.density).eval()
        net = SMALL[self.network]() if ours else networks.make(self.network, *((8, 1) if small else ()))
        if self.how == TWO_PATHS:
            # Small layers have no whole large blocks.
            pattern = "block:4x4" if small and self.pattern.startswith("block") else self.pattern
            return smart.convert(net, self.density, pattern, filter_fn=_not_the_stem).eval()
        return _pruned(net.eval(), self.how, 1 - self.density)


def _not_the_stem(module: nn.Module, name: str) -> bool:
    return module.in_channels > 3


def _pruned(net: nn.Module, how: str, amount: float) -> nn.Module:
    """Prunes the smallest weights of every layer but the first and the last, in one of the ways people do."""
    layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for layer in layers[1:-1]:
        if how == ZEROS:
            with torch.no_grad():
                threshold = layer.weight.abs().flatten().kthvalue(max(1, round(amount * layer.weight.numel()))).values
                layer.weight.mul_(layer.weight.abs() > threshold)
        else:
            prune.l1_unstructured(layer, "weight", amount)
            if how == REMOVED:
                prune.remove(layer, "weight")
    return net


CASES = [
    *(CoverageCase(name, TWO_PATHS, pattern, density) for name in SMALL for pattern, density in PATTERNS.items()),
    *(CoverageCase(name) for name in networks.NETWORKS),
    CoverageCase("bottleneck", PRUNE),
    CoverageCase("vgg", PRUNE),
    CoverageCase("vgg", REMOVED),
    CoverageCase("mobilenet", REMOVED),
    CoverageCase("efficientnet", ZEROS),
    CoverageCase("unet", ZEROS),
]


def measure(
    case: CoverageCase, batches: tuple[int, ...], peers: list[str], backend: str, budget_s: float, device: str
) -> list[dict[str, object]]:
    """Rows of one case on its first path, planned anew for each batch; all paths are verified before.

    Beside the usual fields a row has ``how``, and of our own network ``layers`` and ``sparse_layers``: how many layers
    hold zeros, and how many of these do not run densely.
    """
    model, rows = case.model().to(device), []
    for batch in batches:
        x = torch.rand(batch, 3, case.size, case.size, generator=torch.Generator().manual_seed(0)).to(device)
        sparse = smart_kernels.swap(model, x, backend=backend)
        errors = smart_kernels.verify(model, sparse, x)
        layers = [row["backend"] for row in sparse.report() if min(row["density"].values()) < 1]
        for row in benchmark(model, sparse, x, (batch,), sparse.paths[:1], peers, budget_s, case.network):
            row |= {"how": case.how, "pattern": case.pattern}
            if row["runner"] == SPARSE:
                row |= {"layers": len(layers), "sparse_layers": sum(b not in ("dense", "original") for b in layers)}
                row["max_rel_error"] = max(row["max_rel_error"], *errors.values())
            rows.append(row)
    return rows
