"""``SparseModel``: the network that ``swap`` and ``load`` return."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from smart_kernels import lowering, paths, planned_layers
from smart_kernels.backends.cpu import DTYPES
from smart_kernels.compact_nets import CompactNets
from smart_kernels.compaction import Compact
from smart_kernels.cuda_graphs import CudaGraphs
from smart_kernels.modules import SparseConv2d
from smart_kernels.packing import PackedWeight
from smart_kernels.planned_layers import convs_of, cut_dense, place, record_input_shapes, tell_compact
from smart_kernels.planner import AUTO, DENSE, Planner
from smart_kernels.protocol import reads_path
from smart_kernels.report import Report, Row
from smart_kernels.timing import interleave, percentile
from smart_kernels.timings import SHARED, Timings
from smart_kernels.ways import may_rewrite, ways_of

PROGRAM_BUDGET_S = 0.5
# Input shapes, times the compact networks of paths, that programs are kept for: some dozen KiB each for ResNet-18.
MAX_GRAPHS = 64


class SparseModel(nn.Module):
    """A network for inference whose path is chosen per call, with nothing to repack: ``y = sparse(x, path="adv")``.

    Later inputs may differ from the example it was planned for in batch and size; :meth:`replan` plans it for others.
    ``.to()``, ``.half()`` and their like plan the layers anew for their new device and dtype. Copies, ``state_dict``
    and ``load_state_dict`` work as ever, the latter for states of the same masks; values written into buffers by other
    ways may not be noticed. It has no training mode.

    On the CPU whole stretches of it run as one call (:mod:`smart_kernels.programs`), and where paths drop channels its
    activations carry only those that live (:mod:`smart_kernels.compaction`): each where that was measured to be faster.
    On an NVIDIA GPU :meth:`capture` makes batches one launch.

    Attributes:
        paths: names of its paths.
        runs_programs: whether stretches do.
        runs_compact: whether activations are compact.
        uncaptured: why the network is not one graph but was swapped module by module; None if it is a graph.
        stages: that its layers are divided into, each of which can run on a path of its own; 0 if there are none.
        channels: C of its inputs; None if unknown, as in files of older versions.
    """

    channels: int | None = None

    def __init__(
        self,
        net: nn.Module,
        paths: Sequence[str],
        rows: Sequence[Row],
        takes_path: bool,
        uncaptured: str | None = None,
        stages: int = 0,
    ) -> None:
        super().__init__()
        self.net = net
        self.paths = tuple(paths)
        self.uncaptured = uncaptured
        self.stages = stages
        self.runs_programs = False
        self.runs_compact = False
        self._rows = list(rows)
        self._takes_path = takes_path
        # Graphs with programs in them by input shape, made when first needed. In a dict, so that they are no part of
        # this module's state: they share the layers of `net`.
        self._graphs: dict[tuple[nn.Module, torch.Size], nn.Module] = {}
        self._compact = CompactNets()
        self._captured: CudaGraphs | None = None
        self.register_load_state_dict_pre_hook(_check_state)
        self.register_load_state_dict_post_hook(_forget_graphs)
        self.eval()

    def forward(self, x: Tensor, path: str | float | Tensor | Sequence[str | float] = paths.PATHS[0]) -> Any:
        """Runs a batch.

        Args:
            x: (N, C, H, W), as the original network takes it.
            path: a name in ``paths``, a lambda in [0, 1], an integer tensor (N,) that picks a path for each sample, or
                a sequence of names or lambdas, one for each stage.

        Returns:
            What the original returns.

        Raises:
            TypeError, ValueError: ``x`` or ``path`` is not as described.
        """
        self._check_input(x)
        if not isinstance(path, Tensor):
            path = paths.resolve(path, self.paths, self.stages)
        if (captured := self._captured) is not None and (key := captured.key(x, path)):
            return captured(x, path, key)
        return self._run_any(x, path)

    def _check_input(self, x: Tensor) -> None:
        # What the original checks is not in its graph, and a mean that is subtracted would make C channels of one.
        if not isinstance(x, Tensor):
            raise TypeError(f"input is a {type(x).__name__}: a tensor (N, C, H, W) is needed")
        known = self.channels is not None and not torch.jit.is_tracing()
        if known and (x.dim() != 4 or x.shape[1] != self.channels):
            raise ValueError(f"input has shape {tuple(x.shape)}: (N, {self.channels}, H, W) is needed")

    def _run_any(self, x: Tensor, path: paths.Path | Tensor) -> Any:
        if not isinstance(path, Tensor):
            return self._run(x, path)
        if self._runs_samples():
            return self._run(x, paths.Samples.of(path, x))
        return paths.run_per_sample(self._run, x, path, self.paths)

    def capture(self, example: Tensor, path: str | float | Tensor | Sequence[str | float] | None = None) -> SparseModel:
        """Runs batches of this shape as CUDA graphs from now on: each is one launch, where it was one a layer.

        Each path has a graph of its own, so that the choice costs nothing; the newest
        :data:`smart_kernels.cuda_graphs.MAX_GRAPHS` are kept. After :meth:`replan`, ``load_state_dict``, ``.to()`` and
        their like they are captured anew when called for. Batches of other shapes, and calls that follow gradients or
        run under autocast or torch.compile, run as before. Copies have no graphs.

        Args:
            example: a typical input, on the GPU.
            path: for which to do so: a name, a lambda, a sequence of these for the stages, or a tensor of paths for the
                samples, on the GPU, whose values later calls may choose anew; by default each name.

        Returns:
            This network.

        Raises:
            ValueError: the example is not on a GPU, or such calls cannot be captured.
        """
        if self._captured is None:
            self._captured = CudaGraphs(self._run_any, self._held)
        for each in self.paths if path is None else (path,):
            if isinstance(each, Tensor) and not self._runs_samples():
                raise ValueError("a batch whose samples have paths of their own is split here, so it cannot be a graph")
            chosen = each if isinstance(each, Tensor) else paths.resolve(each, self.paths, self.stages)
            self._captured.begin(example, chosen)
        return self

    def _held(self) -> list[Any]:
        """What captured graphs read and this network might drop."""
        return [*(dict(conv._bound) for _, conv in convs_of(self.net)), *self._compact]

    def _forget(self) -> None:
        """Drops graphs of either kind, and compact networks."""
        self._graphs.clear()
        self._compact.forget()
        if self._captured is not None:
            self._captured.forget()

    def _runs_samples(self) -> bool:
        """Whether all layers run each sample on its own path, so that the batch need not be split."""
        if self.uncaptured or not self._takes_path or len(self.paths) < 2:
            return False
        convs = [conv for _, conv in convs_of(self.net)]
        others = [module for module in self.net.modules() if not isinstance(module, SparseConv2d)]
        # Where all are dense there is no kernel whose launches could be saved.
        return (
            any(conv.backend != DENSE for conv in convs)
            and all(conv.runs_samples for conv in convs)
            and not any(reads_path(module) for module in others)
        )

    def _run(self, x: Tensor, path: paths.Path | paths.Samples) -> Any:
        net, name = self.net, path
        if not isinstance(path, paths.Samples) and (self.runs_compact or self.runs_programs) and may_rewrite(x):
            compact = self._compact.of(net, path, self.paths) if self.runs_compact else None
            if compact is not None:
                net, name = compact.net, compact.name
            if self.runs_programs and x.dtype in DTYPES:
                net = self._graph_for(net, x)
        # Layers that were left as they were read the path from here.
        with paths.running(path):
            return net(x, path=name) if self._takes_path else net(x)

    def _graph_for(self, net: nn.Module, x: Tensor) -> nn.Module:
        graph = self._graphs.get((net, x.shape))
        if graph is None:
            if len(self._graphs) >= MAX_GRAPHS:
                # The oldest; by way of a copy, as another thread may be at it too.
                self._graphs.pop(next(iter(tuple(self._graphs)), None), None)
            rewritten = lowering.rewrite(net, x)
            graph = self._graphs[net, x.shape] = net if rewritten is None else rewritten.graph
        return graph

    def choose_programs(self, example: Tensor, move: bool = True, planner: Planner | None = None) -> None:
        """Measures whether programs and compact activations are faster for such a batch, and if so uses them.

        Args:
            example: (N, C, H, W).
            move: whether layers with zeros that are faster elsewhere by themselves may move to the CPU kernels where
                the whole network is the faster for it.
            planner: of the layers between compact activations; without one activations stay as they are.
        """
        self.runs_programs = self.runs_compact = False
        self._forget()
        if self.uncaptured or not may_rewrite(example):
            return
        path = self.paths[-1]
        compact = None if planner is None else self._compact.choose(self.net, path, self.paths, planner)
        ways = ways_of(self.net, path, example, move)
        if compact is not None:
            ways += ways_of(compact.net, compact.name, example, move, compact)
        if len(ways) == 1:
            return
        with torch.inference_mode(), paths.running(path):
            seconds = interleave({way: way.call(example) for way in ways}, PROGRAM_BUDGET_S * (len(ways) - 1))
        fastest = min(ways, key=lambda way: percentile(seconds[way], 50))
        self.runs_programs = fastest.programs is not None
        if fastest.compact is None:
            self._compact.forget()
            planned_layers.move(self.net, fastest.programs.moves if fastest.programs else {}, self._rows)
        else:
            self._compact.plan |= dict.fromkeys(fastest.moved, lowering.BACKEND)
            self.use_compact()

    def use_compact(self) -> None:
        """Runs every path with compact activations from now on, where it drops channels enough, and says so in rows."""
        self._forget()
        self.runs_compact = True
        nets = self._compact_nets()
        cut_dense(self.net)
        tell_compact(self.net, nets, self._rows)

    def _compact_nets(self) -> list[Compact]:
        """Those of the named paths."""
        if not self.runs_compact:
            return []
        found = [self._compact.of(self.net, name, self.paths) for name in self.paths]
        return [each for each in found if each is not None]

    def report(self) -> Report:
        """A dict for each layer: name, pattern, weights, density, backend, why, bytes, dense_us, sparse_us."""
        return Report(row.as_dict() for row in self._rows)

    def replan(
        self,
        example: Tensor,
        backend: str = AUTO,
        *,
        strict: bool = False,
        measure: bool = True,
        timings: Timings = SHARED,
    ) -> Report:
        """Chooses each layer's backend anew, for another batch or image size, or on another machine.

        Args:
            example: a typical input.
            backend, strict, measure, timings: as for :func:`smart_kernels.swap`.

        Returns:
            The new report.
        """
        planner = Planner(backend, strict, measure, timings)
        self._check_input(example)
        # Programs and compact networks do not call these layers.
        ways = self.runs_programs, self.runs_compact
        self.runs_programs = self.runs_compact = False
        try:
            record_input_shapes(self.net, lambda: self._run_any(example, self.paths[0]))
        finally:
            self.runs_programs, self.runs_compact = ways
        self._plan([name for name, _ in convs_of(self.net)], planner)
        self.choose_way(example, planner)
        timings.save()
        return self.report()

    def choose_way(self, example: Tensor, planner: Planner) -> None:
        """Chooses how its layers, which the planner planned, run together; measured, if the planner measures."""
        self.runs_compact = False
        if planner.backend == DENSE or self.uncaptured:
            return
        if planner.measure:
            self.choose_programs(example, planner.backend == AUTO, replace(planner, strict=False))
        elif self._compact.choose(self.net, self.paths[-1], self.paths, replace(planner, strict=False)) is not None:
            self.use_compact()

    def train(self, mode: bool = True) -> SparseModel:
        """Stays in eval mode: the batch norms are folded, so there is nothing to train."""
        return super().train(False)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of all swapped layers, all paths together."""
        own = sum({id(conv.packed): conv.packed.nbytes for _, conv in convs_of(self.net)}.values())
        return own + sum(net.nbytes for net in self._compact_nets())

    @property
    def total_bytes(self) -> int:
        """Bytes of everything the network holds: convolutions, scales and biases, other layers."""
        tensors = {id(t): t for t in (*self.parameters(), *self.buffers())}
        for compact in self._compact_nets():
            tensors |= {id(t): t for t in (*compact.net.parameters(), *compact.net.buffers())}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def _plan(self, names: Sequence[str], planner: Planner) -> None:
        self._forget()
        planned_layers.plan(self.net, names, planner, self._rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseModel:
        """What .to(), .half(), .cuda() and their like call: a layer that lands elsewhere is planned for there."""
        before = {name: place(conv) for name, conv in convs_of(self.net)}
        super()._apply(fn, recurse)
        self._forget()
        moved = [name for name, conv in convs_of(self.net) if place(conv) != before[name]]
        moved = [name for name in moved if place(self.net.get_submodule(name))[0].type != "meta"]
        if moved:
            self._plan(moved, Planner())
            self.runs_programs = False
            if self.runs_compact:
                self._compact.plan = {}
                self.use_compact()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graphs": {}, "_captured": None, "_compact": copy.deepcopy(self._compact)}


def _check_state(model: SparseModel, state: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """Refuses a state whose packed weights do not fit or are corrupt before any of it is copied."""
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            keys = {key: f"{prefix}{name}.{key}" for key, _ in module.named_buffers()}
            try:
                module.check_state({key: state[full] for key, full in keys.items() if full in state})
            except ValueError as error:
                raise ValueError(
                    f"state of {name.removeprefix('net.').removesuffix('.packed')}: {error}; nothing was loaded"
                ) from error


def _forget_graphs(model: SparseModel, incompatible_keys: object) -> None:
    # What programs mixed for a lambda is of the old values, and so is what captured graphs read.
    model._forget()
