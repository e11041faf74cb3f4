"""Dense competitors: each makes, of a network and an example, the fastest call it knows for that network and batch.

What a user may pass as ``peers`` are the names in :data:`PEERS`, and ``"all"`` for those installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smart.peers import on_gpu, pytorch, runtimes, with_ncnn
from smart.peers.ready import Ready

__all__ = ["ALL", "EXTRA", "PEERS", "Peer", "Ready", "make", "missing", "select", "versions"]

ALL = "all"
EXTRA = "bench"  # the extra of this package with what peers need


@dataclass(frozen=True)
class Peer:
    """One competitor.

    Attributes:
        make: of a network and an example, (N, C, H, W), makes it ready to run.
        packages: what it needs beside torch.
        dtype: in which it computes; None for that of the example.
        in_all: whether ``"all"`` means it too.
        in_extra: whether the extra ``bench`` installs it.
        lacks: why it cannot run here though its packages are installed; None if it can.
        device: the only one whose images it takes; None for any.
    """

    make: Callable[[nn.Module, Tensor], Ready]
    packages: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    in_all: bool = True
    in_extra: bool = True
    lacks: Callable[[], str | None] = lambda: None
    device: str | None = None


_ONNX = ("onnx", "onnxscript")
PEERS: dict[str, Peer] = {
    "eager": Peer(pytorch.eager),
    "fused": Peer(pytorch.fused),
    "compile": Peer(pytorch.compiled),
    "cudnn": Peer(on_gpu.cudnn, lacks=on_gpu.lacks, device="cuda"),
    "max-autotune": Peer(on_gpu.max_autotune, lacks=on_gpu.lacks, device="cuda"),
    "onnxruntime": Peer(runtimes.onnxruntime, ("onnxruntime", *_ONNX), torch.float32),
    "openvino": Peer(runtimes.openvino, ("openvino", *_ONNX), torch.float32),
    # Not among "all", which compute in the network's own precision.
    "openvino-bf16": Peer(
        runtimes.openvino_bf16, ("openvino", *_ONNX), torch.bfloat16, in_all=False, lacks=runtimes.lacks_bf16
    ),
    "ncnn": Peer(with_ncnn.ncnn, ("ncnn", "pnnx"), torch.float32),
    "deepsparse": Peer(runtimes.deepsparse, ("deepsparse", *_ONNX), torch.float32, in_extra=False),
}


def missing(name: str) -> str | None:
    """Why a peer cannot run here, and what to install for it; None if it can."""
    peer = PEERS[name]
    if lacking := _lacking(peer):
        extra = f", or this package with the extra [{EXTRA}]" if peer.in_extra else ""
        return f"peer {name!r} needs what is not installed: pip install {' '.join(lacking)}{extra}"
    if why := peer.lacks():
        return f"peer {name!r} cannot run here: {why}"
    return None


def select(
    names: Sequence[str], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[list[str], str | None]:
    """The peers that names mean.

    Args:
        names: of :data:`PEERS`, or ``"all"``.
        device, dtype: of the images; ``"all"`` passes over peers that do not take such.

    Returns:
        The names, each once, and for ``"all"`` a sentence on those that are not installed, None if all are.

    Raises:
        ValueError: a name is unknown, or one was given whose peer cannot run here or takes no such images.
    """
    if bad := [name for name in names if name not in (ALL, *PEERS)]:
        raise ValueError(f"unknown peer {bad[0]!r}: accepted are {', '.join(map(repr, (ALL, *PEERS)))}")
    for name in names:
        if name != ALL and (why := _refusal(name, device, dtype) or missing(name)):
            raise ValueError(why)
    wanted = list(names)
    if ALL in names:
        candidates = [name for name, peer in PEERS.items() if peer.in_all and not _refusal(name, device, dtype)]
        at = wanted.index(ALL)
        wanted[at : at + 1] = [name for name in candidates if not missing(name)]
        return [name for name in dict.fromkeys(wanted) if name != ALL], _note(filter(missing, candidates))
    return list(dict.fromkeys(wanted)), None


def _refusal(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a peer does not take such images: what is no part of torch is run on CPUs in float32."""
    if (only := PEERS[name].device) is not None and device != only:
        return f"peer {name!r} takes images on {only}, not on {device}: name other peers"
    given = f"{dtype} on {device}".removeprefix("torch.")
    if PEERS[name].packages and given != "float32 on cpu":
        return f"peer {name!r} takes images of float32 on cpu, not {given}: name other peers"
    return None


def _note(left_out: Iterable[str]) -> str | None:
    # DeepSparse is for those who have it: nobody is told to install it.
    names = [name for name in left_out if PEERS[name].in_extra and PEERS[name].device is None]
    if not names:
        return None
    packages = dict.fromkeys(package for name in names for package in _lacking(PEERS[name]))
    return (
        f"not installed, so not measured: {', '.join(names)} (pip install {' '.join(packages)}, or this package with "
        f"the extra [{EXTRA}])"
    )


def make(name: str, net: nn.Module, example: Tensor) -> Ready:
    """Has a peer make a network ready to run.

    Raises:
        RuntimeError: the peer cannot take this network.
    """
    try:
        return PEERS[name].make(net, example)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RuntimeError(f"peer {name!r} cannot take this network, name other peers: {lines[0]}") from error


def versions(names: Iterable[str]) -> dict[str, str]:
    """package -> version, of what the named peers need; names of no peer are passed over."""
    packages = dict.fromkeys(package for name in names if name in PEERS for package in PEERS[name].packages)
    return {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # Another distribution brought it, such as onnxruntime-openvino or deepsparse-nightly.
        names = importlib.metadata.packages_distributions().get(package, [])
        return " and ".join(f"{name} {importlib.metadata.version(name)}" for name in names) or "unknown"


def _lacking(peer: Peer) -> list[str]:
    return [package for package in peer.packages if importlib.util.find_spec(package) is None]
