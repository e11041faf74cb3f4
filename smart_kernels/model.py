"""``SparseModel``: the network that ``swap`` and ``load`` return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smart_kernels import lowering, paths
from smart_kernels.backends.cpu import DTYPES
from smart_kernels.cuda_graphs import CudaGraphs
from smart_kernels.modules import SparseConv2d
from smart_kernels.packing import PackedWeight
from smart_kernels.planner import AUTO, DENSE, Choice, Planner
from smart_kernels.protocol import reads_path
from smart_kernels.report import Report, Row
from smart_kernels.timing import interleave, percentile
from smart_kernels.timings import SHARED, Timings

PROGRAM_BUDGET_S = 0.5
MAX_GRAPHS = 4  # input shapes that programs are kept for


class SparseModel(nn.Module):
    """A network for inference whose path is chosen per call, with nothing to repack: ``y = sparse(x, path="adv")``.

    Later inputs may differ from the example it was planned for in batch and size; :meth:`replan` plans it for others.
    ``.to()``, ``.half()`` and their like plan the layers anew for their new device and dtype. Copies, ``state_dict``
    and ``load_state_dict`` work as ever, the latter for states of the same masks; values written into buffers by other
    ways may not be noticed. It has no training mode.

    On the CPU whole stretches of it run as one call (:mod:`smart_kernels.programs`) where that was measured to be
    faster. On an NVIDIA GPU :meth:`capture` makes batches one launch.

    Attributes:
        paths: names of its paths.
        runs_programs: whether they do.
        uncaptured: why the network is not one graph but was swapped module by module; None if it is a graph.
        stages: that its layers are divided into, each of which can run on a path of its own; 0 if there are none.
    """

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
        self._rows = list(rows)
        self._takes_path = takes_path
        # Graphs with programs in them by input shape, made when first needed. In a dict, so that they are no part of
        # this module's state: they share the layers of `net`.
        self._graphs: dict[torch.Size, nn.Module] = {}
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
        """
        if not isinstance(path, Tensor):
            path = paths.resolve(path, self.paths, self.stages)
        if (captured := self._captured) is not None and (key := captured.key(x, path)):
            return captured(x, path, key)
        return self._run_any(x, path)

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
            self._captured = CudaGraphs(self._run_any, lambda: [dict(conv._bound) for _, conv in self._convs()])
        for each in self.paths if path is None else (path,):
            if isinstance(each, Tensor) and not self._runs_samples():
                raise ValueError("a batch whose samples have paths of their own is split here, so it cannot be a graph")
            chosen = each if isinstance(each, Tensor) else paths.resolve(each, self.paths, self.stages)
            self._captured.begin(example, chosen)
        return self

    def _forget(self) -> None:
        """Drops graphs of either kind."""
        self._graphs.clear()
        if self._captured is not None:
            self._captured.forget()

    def _runs_samples(self) -> bool:
        """Whether all layers run each sample on its own path, so that the batch need not be split."""
        if self.uncaptured or not self._takes_path or len(self.paths) < 2:
            return False
        convs = [conv for _, conv in self._convs()]
        others = [module for module in self.net.modules() if not isinstance(module, SparseConv2d)]
        # Where all are dense there is no kernel whose launches could be saved.
        return (
            any(conv.backend != DENSE for conv in convs)
            and all(conv.runs_samples for conv in convs)
            and not any(reads_path(module) for module in others)
        )

    def _run(self, x: Tensor, path: paths.Path | paths.Samples) -> Any:
        # Layers that were left as they were read the path from here.
        with paths.running(path):
            programs = self.runs_programs and not isinstance(path, paths.Samples) and _may_run_programs(x)
            net = self._graph_for(x) if programs else self.net
            return net(x, path=path) if self._takes_path else net(x)

    def _graph_for(self, x: Tensor) -> nn.Module:
        graph = self._graphs.get(x.shape)
        if graph is None:
            if len(self._graphs) >= MAX_GRAPHS:
                self._graphs.clear()
            rewritten = lowering.rewrite(self.net, x)
            graph = self._graphs[x.shape] = self.net if rewritten is None else rewritten.graph
        return graph

    def choose_programs(self, example: Tensor, move: bool = True) -> None:
        """Measures whether programs are faster for such a batch, and if so uses them.

        Args:
            example: (N, C, H, W).
            move: whether layers with zeros that are faster elsewhere by themselves may move to the CPU kernels where
                the whole network is the faster for it.
        """
        self.runs_programs = False
        self._forget()
        if self.uncaptured or not _may_run_programs(example):
            return
        ways = [lowering.rewrite(self.net, example, move=each) for each in ((False, True) if move else (False,))]
        ways = [way for way in ways if way is not None]
        if len(ways) == 2 and not ways[1].moves:
            ways.pop()  # the same again
        calls = {net: partial(net, example, path=self.paths[-1]) for net in (self.net, *(way.graph for way in ways))}
        if len(calls) == 1:
            return
        with torch.inference_mode():
            seconds = interleave(calls, PROGRAM_BUDGET_S * len(ways))
        fastest = min(calls, key=lambda net: percentile(seconds[net], 50))
        for way in ways:
            if way.graph is fastest:
                self.runs_programs = True
                self._move(way.moves)

    def _move(self, moves: Mapping[SparseConv2d, PackedWeight]) -> None:
        """Runs layers on the CPU kernels, as parts of programs, and says so in their rows."""
        rows = {row.name: row for row in self._rows}
        for name, conv in self._convs():
            if conv not in moves:
                continue
            conv.use(moves[conv], lowering.BACKEND)
            if (row := rows.get(name)) is not None:
                row.backend, row.why = lowering.BACKEND, f"the whole network is faster so; alone: {row.why}"
                row.bytes = conv.packed.nbytes if row.bytes else 0

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
        shapes: dict[nn.Module, torch.Size] = {}
        hooks = [
            conv.register_forward_pre_hook(lambda m, inputs: shapes.update({m: m.kernel_shape(inputs[0].shape, m.pad)}))
            for _, conv in self._convs()
        ]
        runs_programs, self.runs_programs = self.runs_programs, False  # they call no layers, so no hooks
        try:
            with torch.no_grad():
                self._run_any(example, self.paths[0])
        finally:
            self.runs_programs = runs_programs
            for hook in hooks:
                hook.remove()
        for conv, shape in shapes.items():
            conv.input_shape = tuple(shape)
        self._plan([name for name, _ in self._convs()], planner)
        if measure and backend != DENSE:
            self.choose_programs(example, move=backend == AUTO)
        timings.save()
        return self.report()

    def train(self, mode: bool = True) -> SparseModel:
        """Stays in eval mode: the batch norms are folded, so there is nothing to train."""
        return super().train(False)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of all swapped layers, all paths together."""
        return sum({id(conv.packed): conv.packed.nbytes for _, conv in self._convs()}.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of everything the network holds: convolutions, scales and biases, other layers."""
        tensors = {id(t): t for t in (*self.parameters(), *self.buffers())}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def _convs(self) -> Iterator[tuple[str, SparseConv2d]]:
        for name, module in self.net.named_modules():
            if isinstance(module, SparseConv2d):
                yield name, module

    def _plan(self, names: Sequence[str], planner: Planner) -> None:
        """Plans some layers anew, and says so in their rows."""
        self._forget()
        rows, done = {row.name: row for row in self._rows}, {}
        for name, conv in self._convs():
            if name not in names:
                continue
            choice = done.get(conv.packed)
            if choice is None:
                weight, masks = conv.packed.unpack()
                shape = None if conv.input_shape is None else torch.Size(conv.input_shape)
                choice = done[conv.packed] = planner.choose(weight, masks, conv.geometry, shape, name)
                _tell(rows.get(name), choice, choice.packed.nbytes)
            else:
                _tell(rows.get(name), choice, 0)
            conv.use(choice.packed, choice.backend)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseModel:
        """What .to(), .half(), .cuda() and their like call: a layer that lands elsewhere is planned for there."""
        before = {name: _place(conv) for name, conv in self._convs()}
        super()._apply(fn, recurse)
        self._forget()
        moved = [name for name, conv in self._convs() if _place(conv) != before[name]]
        moved = [name for name in moved if next(self.net.get_submodule(name).packed.buffers()).device.type != "meta"]
        if moved:
            self._plan(moved, Planner())
            self.runs_programs = False
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graphs": {}, "_captured": None}


def _may_run_programs(x: Tensor) -> bool:
    """Whether a program may take this input: one dtype, no gradients, and no part of a larger graph."""
    follows = x.requires_grad and torch.is_grad_enabled()
    if follows or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return x.dim() == 4 and x.dtype in DTYPES


def _place(conv: SparseConv2d) -> tuple[torch.device, torch.dtype]:
    values = next(conv.packed.buffers())
    return values.device, values.dtype


def _tell(row: Row | None, choice: Choice, nbytes: int) -> None:
    if row is not None:
        row.backend, row.why, row.bytes = choice.backend, choice.why, nbytes
        row.dense_us, row.sparse_us = choice.dense_us, choice.sparse_us


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
