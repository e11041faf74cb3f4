"""Latency and memory of swapped networks beside dense ones, measured in turns, outputs verified first."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import smart_kernels
from smart.peers import PEERS, Call
from smart.twin import dense_twin_of
from smart.version import __version__
from smart_kernels import devices, native
from smart_kernels.files import write_text
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
    """Times a swapped network against dense peers of the same path.

    Args:
        model: the network with its masks or zeros; the peers run its dense twin (:mod:`smart.twin`).
        sparse: what ``smart_kernels.swap`` made of ``model``.
        example: (N, C, H, W), whose images are repeated up to the batch sizes.
        peers: names in ``PEERS``.
        budget_s: seconds for each batch size, all paths and runners together, in turns.
        network: the name that goes into the rows.
        progress: wraps the list of batch sizes, as tqdm does.

    Returns:
        One row for each batch, path and runner: network, pattern, density, batch, dtype, device, threads, path,
        runner, backend, ms_p20, ms_p50, ms_p80, images_per_s, weight_bytes, peak_bytes (None where the device keeps
        no count), max_rel_error (against the dense twin).

    Raises:
        ValueError: an unknown peer or path, or a batch below 1.
        VerificationError: a runner's output differs from the dense twin's by more than its dtype allows.
    """
    _check(batches, paths, peers, sparse)
    twins = {path: dense_twin_of(model, path) for path in paths}
    rows: list[dict[str, Any]] = []
    for batch in progress(batches) if progress else batches:
        x = example.repeat(-(-batch // len(example)), 1, 1, 1)[:batch].contiguous()
        runners: dict[Runner, Call] = {(name, path): PEERS[name](twins[path], x) for path in paths for name in peers}
        runners |= {(SPARSE, path): partial(sparse, path=path) for path in paths}
        rows += _time_batch(runners, x, twins, sparse, budget_s, network)
    return rows


def _time_batch(
    runners: dict[Runner, Call],
    x: Tensor,
    twins: dict[str, nn.Module],
    sparse: SparseModel,
    budget_s: float,
    network: str,
) -> list[dict[str, Any]]:
    calls = {runner: partial(run, x) for runner, run in runners.items()}
    with torch.inference_mode():
        truth = {path: twin(x) for path, twin in twins.items()}
        errors = {(name, path): relative_error(calls[name, path](), truth[path]) for name, path in calls}
        tolerance = TOLERANCE.get(x.dtype, TOLERANCE[torch.float32])
        for (name, path), error in errors.items():
            if not error <= tolerance:
                raise VerificationError(
                    f"{name} differs from the dense network by {error:.2e} on path {path!r}: not timed"
                )
        peaks = {runner: _peak_bytes(call, x.device) for runner, call in calls.items()}
        seconds = interleave(calls, budget_s)
    report = sparse.report()
    patterns = {row["pattern"] for row in report if row["pattern"] != "dense"}
    weights = sum(row["weights"] for row in report)
    density = {path: sum(row["density"][path] * row["weights"] for row in report) / weights for path in twins}
    # Of the same layers: fully connected ones without zeros are not swapped, so they are in neither number.
    dense_bytes = weights * x.element_size()
    rows = []
    for (name, path), samples in seconds.items():
        ours = name == SPARSE
        p20, p50, p80 = (percentile(samples, percent) * 1e3 for percent in (20, 50, 80))
        rows.append(
            {
                "network": network,
                "pattern": "/".join(sorted(patterns)) or "dense",
                "density": round(density[path], 4),
                "batch": len(x),
                "dtype": str(x.dtype).removeprefix("torch."),
                "device": x.device.type,
                "threads": torch.get_num_threads(),
                "path": path,
                "runner": name,
                "backend": "+".join(sorted({row["backend"] for row in report})) if ours else "dense",
                "ms_p20": p20,
                "ms_p50": p50,
                "ms_p80": p80,
                "images_per_s": len(x) / p50 * 1e3,
                "weight_bytes": sparse.weight_bytes if ours else dense_bytes,
                "peak_bytes": peaks[name, path],
                "max_rel_error": errors[name, path],
            }
        )
    return rows


def _peak_bytes(call: Callable[[], Tensor], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _check(batches: Sequence[int], paths: Sequence[str], peers: Sequence[str], sparse: SparseModel) -> None:
    if bad := [batch for batch in batches if batch < 1]:
        raise ValueError(f"batch {bad[0]}: give sizes of at least 1")
    if bad := [peer for peer in peers if peer not in PEERS]:
        raise ValueError(f"unknown peer {bad[0]!r}: accepted are {', '.join(map(repr, PEERS))}")
    if bad := [path for path in paths if path not in sparse.paths]:
        raise ValueError(f"unknown path {bad[0]!r}: this network has {', '.join(map(repr, sparse.paths))}")


# ---- what people and files get ----


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as text, one line for each batch and path; "speed-up" is against the fastest dense runner beside it."""
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["network"], row["batch"], row["path"]), {})[row["runner"]] = row
    runners = list(dict.fromkeys(row["runner"] for row in rows))
    lines = [["network", "batch", "path", "density", *(f"{name} ms" for name in runners), "speed-up"]]
    for (network, batch, path), case in cases.items():
        times = [f"{case[name]['ms_p50']:.3f}" if name in case else "-" for name in runners]
        dense = [row["ms_p50"] for name, row in case.items() if name != SPARSE]
        ratio = f"{min(dense) / case[SPARSE]['ms_p50']:.2f}x" if dense and SPARSE in case else "-"
        density = f"{next(iter(case.values()))['density']:.3f}"
        lines.append([network, str(batch), path, density, *times, ratio])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(text)


def write_results(rows: Sequence[dict[str, Any]], where: str | Path, suite: str, command: str) -> Path:
    """Writes a results file; if ``where`` is a folder the file is named ``<suite>-<device>-<date>.json``.

    Returns:
        The file written.
    """
    now, where = datetime.now(timezone.utc), Path(where)
    device = rows[0]["device"] if rows else "cpu"
    file = where / f"{suite}-{device}-{now:%Y-%m-%d}.json" if where.is_dir() else where
    content = {
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "smart": __version__,
            "smart_kernels": smart_kernels.__version__,
        },
        "commit": commit(),
        "date": now.isoformat(timespec="seconds"),
        "command": command,
        "rows": list(rows),
    }
    write_text(file, json.dumps(content, indent=1) + "\n")
    return file


def machine() -> dict[str, Any]:
    """What ran the measurement: processor, instruction sets, cores, GPU."""
    return {
        "cpu": devices.cpu_name(),
        "isa": native.cpu_isas(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def commit() -> str | None:
    """The commit of the checkout this file lies in, "-dirty" added if it was changed; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
