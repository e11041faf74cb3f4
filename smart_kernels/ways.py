"""The ways to run a swapped network on one path, to be measured against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from smart_kernels import cuda_graphs, lowering
from smart_kernels.backends.cpu import DTYPES
from smart_kernels.compaction import Compact
from smart_kernels.paths import Path


@dataclass(frozen=True, eq=False)
class Way:
    """One of them.

    Attributes:
        net: layer by layer.
        path: as the net takes it.
        programs: its stretches as programs; None if it runs layer by layer.
        compact: what the net is, if activations are compact.
    """

    net: fx.GraphModule
    path: Path
    programs: lowering.Rewritten | None
    compact: Compact | None

    def call(self, example: Tensor) -> Callable[[], object]:
        """Runs a batch; on a GPU as one launch, as networks can be captured, and launches from Python take long."""
        graph = self.net if self.programs is None else self.programs.graph
        run = partial(graph, example, path=self.path)
        if not example.is_cuda:
            return run
        try:
            return cuda_graphs.repeated(run, 1)
        except RuntimeError:
            return run

    @property
    def moved(self) -> set[str]:
        """Names of the layers that programs run on the CPU kernels and that run elsewhere by themselves."""
        moves = {} if self.programs is None else self.programs.moves
        return {name for name, module in self.net.named_modules() if module in moves}


def ways_of(net: fx.GraphModule, path: Path, example: Tensor, move: bool, compact: Compact | None = None) -> list[Way]:
    """A network layer by layer, with programs, and with layers moved into programs; the first always.

    Args:
        move: whether layers may move.
        compact: what the net is, if its activations are compact.
    """
    programs: list[lowering.Rewritten | None] = [None]
    if example.dtype in DTYPES:
        found = [lowering.rewrite(net, example, move=each) for each in ((False, True) if move else (False,))]
        programs += [each for each in found if each is not None]
    if len(programs) == 3 and not programs[2].moves:
        programs.pop()  # the same again
    return [Way(net, path, each, compact) for each in programs]


def may_rewrite(x: Tensor) -> bool:
    """Whether another form of the network may take this input: no gradients, and no part of a larger graph."""
    follows = x.requires_grad and torch.is_grad_enabled()
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._functorch.maybe_current_level()
    if follows or traced or x.is_meta or torch.is_autocast_enabled(x.device.type):
        return False
    return x.dim() == 4
