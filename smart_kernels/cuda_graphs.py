"""CUDA graphs of whole networks: a batch is one launch, not one a layer.

Small batches on a GPU wait for launches, not for arithmetic. A graph is what one call launched, recorded for one path
and one shape of input: it reads the same memory at each replay, so inputs are copied in and results out. Nothing of a
replay waits on the host, and it runs on the stream of the call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from smart_kernels.paths import Path, Samples

MAX_GRAPHS = 16
WARM_UP = 2  # runs on another stream, as torch.cuda.graph asks for: kernels are compiled and chosen in them

PathKey = Path | type[Samples]
Wanted = tuple[PathKey, torch.Size]
Key = tuple[PathKey, torch.Size, torch.dtype, torch.device]


class Cuda:
    """What of CUDA it takes to capture and replay; tests put something else in its place."""

    def serves(self, x: Tensor) -> bool:
        """Whether a call with this input can be a graph of its own: not if it is part of one that is being captured."""
        return x.is_cuda and not torch.cuda.is_current_stream_capturing()

    def device(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.cuda.device(device)

    def pool(self) -> Any:
        """Memory that graphs share: they never run at once."""
        return torch.cuda.graph_pool_handle()

    def warm_up(self, call: Callable[[], Any]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(side)

    def capture(self, call: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
        """Records what a call launches; returns what replays it, and the result that replays write anew."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = call()
        return graph.replay, result

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def synchronize(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class _Graph:
    """One recorded call.

    Attributes:
        x: what it reads.
        choice: a path for each sample, which it reads too; None if all run on the path of its key.
        replay: launches it.
        result: what it writes.
        held: whatever else it reads and nobody else may hold on to.
    """

    x: Tensor
    choice: Tensor | None
    replay: Callable[[], None]
    result: Any
    held: Any


@dataclass
class _Shared:
    """What the graphs of one device have in common: memory, and an event after the last replay."""

    pool: Any
    done: Any


class CudaGraphs:
    """The graphs of one network, for the paths and shapes that :meth:`begin` was called with.

    Anything else runs as it would without: other shapes, inputs that gradients are followed of, calls under autocast,
    in torch.compile, or within another capture. Threads and streams may share it: replays follow each other.

    Args:
        run: the network: an input and a path, or a tensor of paths for the samples, to outputs of any nesting.
        holds: returns tensors that ``run`` keeps between calls, and might drop: graphs still read them.
    """

    def __init__(
        self, run: Callable[[Tensor, Path | Tensor], Any], holds: Callable[[], Any], cuda: Cuda | None = None
    ) -> None:
        self._run, self._holds = run, holds
        self._cuda = cuda or Cuda()
        self._wanted: dict[Wanted, None] = {}
        self._graphs: dict[Key, _Graph] = {}
        self._refused: dict[Key, str] = {}
        self._shared: dict[torch.device, _Shared] = {}
        self._lock = threading.RLock()

    def begin(self, x: Tensor, path: Path | Tensor) -> None:
        """Captures a call, as which all of its path and shape run from now on; the oldest such wish gives way to it.

        Raises:
            ValueError: it cannot be captured.
        """
        wanted = (Samples if isinstance(path, Tensor) else path, x.shape)
        with self._lock:
            self._wanted.pop(wanted, None)
            self._wanted[wanted] = None
            if (key := self.key(x, path)) is None:
                del self._wanted[wanted]
                raise ValueError(
                    f"no CUDA graph can be made of a call with an example on {x.device}: give a plain tensor on an "
                    "NVIDIA GPU, and paths of samples there too, outside autocast, torch.compile and other captures"
                )
            while len(self._wanted) > MAX_GRAPHS:
                self._drop(next(iter(self._wanted)))
            with torch.no_grad():
                self(x, path, key)
            if key in self._refused:
                del self._wanted[wanted]
                raise ValueError(f"the network cannot be captured as a CUDA graph: {self._refused.pop(key)}")

    def _drop(self, wanted: Wanted) -> None:
        del self._wanted[wanted]
        for key in [key for key in self._graphs if key[:2] == wanted]:
            self._cuda.synchronize(key[-1])  # it may be running
            del self._graphs[key]

    def forget(self) -> None:
        """Drops all graphs, as what they read was replaced; they are captured anew when next called for."""
        with self._lock:
            for device in self._shared:
                self._cuda.synchronize(device)
            for memory in (self._graphs, self._refused, self._shared):
                memory.clear()

    def key(self, x: Tensor, path: Path | Tensor) -> Key | None:
        """Which graph a call with a resolved path belongs to; None if to none."""
        if torch.compiler.is_compiling() or type(x) is not Tensor or not self._cuda.serves(x):
            return None
        if (x.requires_grad and torch.is_grad_enabled()) or torch.is_autocast_enabled(x.device.type):
            return None
        if isinstance(path, Tensor):
            if not _fits(path, x):
                return None
            path = Samples
        return (path, x.shape, x.dtype, x.device) if (path, x.shape) in self._wanted else None

    def __call__(self, x: Tensor, path: Path | Tensor, key: Key) -> Any:
        """Runs a call whose :meth:`key` is not None. What it returns is the caller's own."""
        if key in self._refused:
            return self._run(x, path)
        # What is made here is used in any mode later.
        inference = torch.is_inference_mode_enabled()
        with self._lock, self._cuda.device(x.device), torch.inference_mode(False), torch.no_grad():
            graph = self._graphs.get(key) or self._capture(x, path, key)
            if graph is not None:
                with torch.inference_mode(inference):
                    return self._replay(graph, x, path)
        return self._run(x, path)

    def _replay(self, graph: _Graph, x: Tensor, path: Path | Tensor) -> Any:
        done = self._shared[x.device].done
        done.wait()
        graph.x.copy_(x, non_blocking=True)
        if graph.choice is not None:
            graph.choice.copy_(path, non_blocking=True)
        graph.replay()
        result = tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, graph.result)
        done.record()
        return result

    def _capture(self, x: Tensor, path: Path | Tensor, key: Key) -> _Graph | None:
        if x.device not in self._shared:
            self._shared[x.device] = _Shared(self._cuda.pool(), self._cuda.event())
        shared = self._shared[x.device]
        mine = next((graph.x for other, graph in self._graphs.items() if other[1:] == key[1:]), None)
        if mine is None:
            layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
            mine = torch.empty_like(x, memory_format=layout)
        shared.done.wait()
        mine.copy_(x)
        choice = path.to(torch.long, copy=True) if isinstance(path, Tensor) else None

        def call() -> Any:
            return self._run(mine, path if choice is None else choice)

        with _benchmarked():
            call()  # on this stream, where what layers keep shall lie; errors of the input itself come out of it
            self._cuda.warm_up(call)
            try:
                replay, result = self._cuda.capture(call, shared.pool)
            except RuntimeError as error:
                self._refused[key] = (str(error).strip().splitlines() or [type(error).__name__])[0]
                return None
        graph = self._graphs[key] = _Graph(mine, choice, replay, result, self._holds())
        return graph


def repeated(call: Callable[[], Any], times: int, cuda: Cuda | None = None) -> Callable[[], None]:
    """A call of the current device, several times in a row, as one launch: what a launch costs is then no matter.

    Raises:
        RuntimeError: it cannot be captured.
    """
    cuda = cuda or Cuda()

    def calls() -> None:
        for _ in range(times):
            call()

    with torch.no_grad(), _benchmarked():
        call()
        cuda.warm_up(call)
        replay, _ = cuda.capture(calls, None)
    return replay


def _fits(choice: Tensor, x: Tensor) -> bool:
    """Whether a tensor of paths needs no look at its values by the host, and no message."""
    integers = not choice.is_floating_point() and not choice.is_complex()
    return choice.device == x.device and choice.dim() == 1 and len(choice) == len(x) and integers


@contextmanager
def _benchmarked() -> Iterator[None]:
    """Has cuDNN measure its algorithms for each new shape: a graph runs often, and its shapes are fixed."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
