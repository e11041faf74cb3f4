"""Latency and memory of swapped networks beside dense ones, measured in turns, outputs verified first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smart import gpu_memory
from smart import peers as dense_peers
from smart.peers import PEERS, Ready
from smart.twin import dense_twin_of
from smart_kernels.model import SparseModel
from smart_kernels.timing import interleave, percentile
from smart_kernels.verify import TOLERANCE, VerificationError, relative_error

SPARSE = "smart_kernels"  # the runner's name of our own rows
Runner = tuple[str, str]  # its name and the path it runs


def benchmark(
    model: nn.Module,
    sparse: SparseModel,
    example: Tensor,
    batches: Sequence[int] = (1, 16),
    paths: Sequence[str] = ("clean", "adv"),
    peers: Sequence[str] = ("eager",),
    budget_s: float = 2.0,
    network: str = "",
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> list[dict[str, Any]]:
    """Times the paths of a swapped network against dense peers.

    The peers run the first path only: where its zeros lie makes no difference to a dense network's time.

    Args:
        model: the network with its masks or zeros; the peers run its dense twin (:mod:`smart.twin`).
        sparse: what ``smart_kernels.swap`` made of ``model``.
        example: (N, C, H, W), whose images are repeated up to the batch sizes.
        peers: names in ``PEERS``, or ``"all"`` for those installed (:func:`smart.peers.select`).
        budget_s: seconds for each batch size, all paths and runners together, in turns; before it starts peers take
            the time they need to get ready.
        network: the name that goes into the rows.
        progress: wraps the list of batch sizes, as tqdm does.

    Returns:
        One row for each batch and runner, ours for each path: network, pattern, density, batch, dtype (in which the
        runner computes), device, threads, path, runner, backend, ms_p20, ms_p50, ms_p80, images_per_s, weight_bytes,
        peak_bytes (None where there is no count), max_rel_error (against the dense twin).

    Raises:
        ValueError: an unknown peer or path, a peer that cannot run here or on such images, or a batch below 1.
        RuntimeError: a peer cannot take this network.
        VerificationError: a runner's output differs from the dense twin's by more than its dtype allows.
    """
    names = _check(batches, paths, peers, sparse, example)
    twins = {path: dense_twin_of(model, path) for path in paths}
    case = {"network": network, "pattern": _pattern(model, sparse)}
    rows: list[dict[str, Any]] = []
    for batch in progress(batches) if progress else batches:
        x = example.repeat(-(-batch // len(example)), 1, 1, 1)[:batch].contiguous()
        runners = {(name, paths[0]): dense_peers.make(name, twins[paths[0]], x) for name in names}
        mode = _capture(sparse, x, paths)
        runners |= {(SPARSE, path): Ready(partial(sparse, path=path), mode) for path in paths}
        rows += _time_batch(runners, x, twins, sparse, budget_s, case)
    return rows


def _time_batch(
    runners: dict[Runner, Ready],
    x: Tensor,
    twins: dict[str, nn.Module],
    sparse: SparseModel,
    budget_s: float,
    case: Mapping[str, str],
) -> list[dict[str, Any]]:
    calls = {runner: partial(ready.call, x) for runner, ready in runners.items()}
    with torch.inference_mode():
        truth = {path: twin(x) for path, twin in twins.items()}
        errors = {(name, path): relative_error(calls[name, path](), truth[path]) for name, path in calls}
        for (name, path), error in errors.items():
            if not error <= TOLERANCE.get(_dtype(name, x), TOLERANCE[torch.float32]):
                raise VerificationError(
                    f"{name} differs from the dense network by {error:.2e} on path {path!r}: not timed"
                )
        memory = _memory(runners, x, twins, sparse)
        seconds = interleave(calls, budget_s)
    report = sparse.report()
    weights = sum(row["weights"] for row in report)
    density = {path: sum(row["density"][path] * row["weights"] for row in report) / weights for path in twins}
    backends = "+".join(sorted({row["backend"] for row in report}))
    rows = []
    for (name, path), samples in seconds.items():
        kind, mode, dtype = backends if name == SPARSE else "dense", runners[name, path].mode, _dtype(name, x)
        p20, p50, p80 = (percentile(samples, percent) * 1e3 for percent in (20, 50, 80))
        weight_bytes, peak_bytes = memory[name, path]
        rows.append(
            {
                **case,
                "density": round(density[path], 4),
                "batch": len(x),
                "dtype": str(dtype).removeprefix("torch."),
                "device": x.device.type,
                "threads": torch.get_num_threads(),
                "path": path,
                "runner": name,
                "backend": f"{kind} ({mode})" if mode else kind,
                "ms_p20": p20,
                "ms_p50": p50,
                "ms_p80": p80,
                "images_per_s": len(x) / p50 * 1e3,
                "weight_bytes": weight_bytes,
                "peak_bytes": peak_bytes,
                "max_rel_error": errors[name, path],
            }
        )
    return rows


def _pattern(model: nn.Module, sparse: SparseModel) -> str:
    """The patterns of the layers that have one."""
    patterns = {row["pattern"] for row in sparse.report() if row["pattern"] != "dense"}
    if patterns == {"channel"}:
        return getattr(model, "pattern", "channel")  # no layer by itself shows whether it is coupled
    return "/".join(sorted(patterns)) or "dense"


def _dtype(runner: str, x: Tensor) -> torch.dtype:
    """In which a runner computes."""
    return (PEERS[runner].dtype if runner in PEERS else None) or x.dtype


def _capture(sparse: SparseModel, x: Tensor, paths: Sequence[str]) -> str:
    """Has batches on a GPU run as CUDA graphs, as dense peers do; how they run then."""
    if not x.is_cuda:
        return ""
    try:
        for path in paths:
            sparse.capture(x, path)
    except ValueError:
        return ""  # they run as ever
    return "CUDA graph"


def _memory(
    runners: Mapping[Runner, Ready], x: Tensor, twins: Mapping[str, nn.Module], sparse: SparseModel
) -> dict[Runner, tuple[int | None, int | None]]:
    """Bytes of weights, all paths together, and the most that a batch takes; None where there is no count.

    On a GPU both are the allocator's, all that a network holds. On a CPU they are of the layers that are swapped: fully
    connected ones without zeros are in neither number.
    """
    if not x.is_cuda:
        weights = sum(row["weights"] for row in sparse.report())
        return {
            runner: (sparse.weight_bytes if runner[0] == SPARSE else weights * _dtype(runner[0], x).itemsize, None)
            for runner in runners
        }
    ours = gpu_memory.measure(sparse, [partial(_on_path, path) for path in twins], x)
    dense, _ = gpu_memory.measure(next(iter(twins.values())), [lambda net, batch: net(batch)], x)
    return {
        runner: ours if runner[0] == SPARSE else (dense, _peak_bytes(ready, x, dense))
        for runner, ready in runners.items()
    }


def _on_path(path: str, sparse: SparseModel, x: Tensor) -> Tensor:
    return sparse(x, path=path)


def _peak_bytes(ready: Ready, x: Tensor, weight_bytes: int) -> int | None:
    if ready.net is not None:
        return gpu_memory.measure(ready.net, [lambda net, batch: net(batch)], x)[1]
    return weight_bytes + gpu_memory.peak(partial(ready.call, x), x.device) if ready.counted else None


def _check(
    batches: Sequence[int], paths: Sequence[str], peers: Sequence[str], sparse: SparseModel, example: Tensor
) -> list[str]:
    """The names of the peers that were asked for."""
    if bad := [batch for batch in batches if batch < 1]:
        raise ValueError(f"batch {bad[0]}: give sizes of at least 1")
    if bad := [path for path in paths if path not in sparse.paths]:
        raise ValueError(f"unknown path {bad[0]!r}: this network has {', '.join(map(repr, sparse.paths))}")
    names, _ = dense_peers.select(peers, example.device.type, example.dtype)
    return names
