"""States that a network is put into for a while, and taken out of as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from smart.layers import DualBatchNorm2d


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts every module into eval mode until the block ends, then gives each its own ``training`` flag back."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms of the two paths do not update their running statistics until the block ends.

    In training mode they still norm by those of the batch.
    """
    duals = [module for module in model.modules() if isinstance(module, DualBatchNorm2d)]
    flags = [(norm, norm.track_running_stats) for dual in duals for norm in dual.norms.values()]
    for norm, _ in flags:
        # To torch's own norms in training mode, one without running statistics is one that does not touch them.
        norm.track_running_stats = norm.track_running_stats and not norm.training
    try:
        yield
    finally:
        for norm, tracks in flags:
            norm.track_running_stats = tracks
