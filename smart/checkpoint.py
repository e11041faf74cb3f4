"""Checkpoints: one safetensors file with JSON metadata in its header; nothing in it is ever executed.

Tensors are named ``model.<key of the state dict>``, masks packed to one bit a weight; whatever else was saved with them
is ``<group>.<key>``. The metadata holds a SHA-256 of everything, so that a damaged or edited file is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import warnings
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from smart.conversion import PatternWarning
from smart.layers import SmartConv2d, SmartNet
from smart.models import create_model
from smart.twin import DenseTwin
from smart.version import __version__
from smart_kernels.files import replacing
from smart_kernels.packing.bits import pack_bits, unpack_bits
from smart_kernels.paths import PATHS

FORMAT = "smart-checkpoint"
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A file is not a checkpoint, is damaged, or belongs to another network."""


def save_checkpoint(
    path: str | Path,
    model: SmartNet,
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Writes a model whole or not at all: weights, bit-packed masks, both norms, and how to build it again.

    Args:
        extra: JSON values to keep in the metadata, such as the training config.
        tensors: further named tensors by group, such as the optimizer's momentum; ``"model"`` is taken.

    Raises:
        TypeError: ``model`` is another network than this package makes.
        OSError: the file cannot be written.
    """
    if not isinstance(model, SmartNet):
        raise TypeError(f"model is a {type(model).__name__}: make it with smart.create_model or smart.convert")
    groups = {"model": _packed_state(model), **(tensors or {})}
    stored = {f"{group}.{key}": _plain(t) for group, named in groups.items() for key, t in named.items()}
    _write(path, stored, {**(extra or {}), "format": FORMAT, "model": model.spec})


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> tuple[SmartNet, dict[str, Any]]:
    """Rebuilds a network made by :func:`smart.create_model` from its checkpoint.

    Returns:
        The network on ``device`` in eval mode, and the metadata.

    Raises:
        CheckpointError: the file is damaged, no checkpoint, or of a converted network (see :func:`load_into`).
        FileNotFoundError: there is no such file.
    """
    metadata, groups = read_checkpoint(path)
    spec = metadata.get("model")
    if not isinstance(spec, dict):
        raise CheckpointError(
            f"{path} is of a converted network: build and convert it, then call load_into(model, path)"
        )
    sizes = {"num_classes": groups["model"].get("net.fc.bias"), "in_channels": groups["model"].get("mean")}
    for key, tensor in sizes.items():
        # The sizes are compared before anything of that size is allocated.
        if tensor is None or spec.get(key) != tensor.numel():
            raise CheckpointError(f"{path} says {key} {spec.get(key)!r} but its tensors differ: the file is damaged")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PatternWarning)  # it was given when the network was first made
            model = create_model(**spec)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path} describes a network that cannot be built: {error}") from error
    _restore(model, groups["model"], path)
    return model.to(device).eval(), metadata


def load_into(model: SmartNet, path: str | Path) -> dict[str, Any]:
    """Loads a checkpoint's weights, masks and norms into a network of the same architecture; returns the metadata.

    Raises:
        CheckpointError: the file is damaged or of another network; ``model`` is then as before.
        FileNotFoundError: there is no such file.
    """
    metadata, groups = read_checkpoint(path)
    _restore(model, groups["model"], path)
    return metadata


def read_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The metadata, and the tensors by group and key, of a checkpoint whose SHA-256 is right; masks still packed.

    Raises:
        CheckpointError, FileNotFoundError: as for :func:`load_checkpoint`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}: give the path of a .safetensors file that smart wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}): copy or download it again") from error
    try:
        metadata = json.loads(header[FORMAT])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} was not written by smart.save_checkpoint: give a file that was") from error
    if not isinstance(metadata, dict) or metadata.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path} has another format version than {FORMAT_VERSION}: use the version that wrote it")
    if header.get("sha256") != _digest(stored, header[FORMAT]):
        raise CheckpointError(
            f"{path} does not match its own SHA-256, it was damaged or edited: copy or download it again"
        )
    groups: dict[str, dict[str, Tensor]] = {"model": {}}
    for key, tensor in stored.items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = tensor
    return metadata, groups


def dense_state(model: SmartNet, path: str) -> dict[str, Tensor]:
    """One path as the state dict of the plain network, with the masks multiplied in.

    That path's batch norms have their old names back. The plain network takes normalised images, (x - mean) / std.

    Raises:
        ValueError: ``path`` is not a name, or has noise in its weights.
    """
    return {key: _plain(value) for key, value in DenseTwin(model, path).net.state_dict().items()}


def save_dense(path: str | Path, model: SmartNet, path_name: str) -> None:
    """Writes :func:`dense_state` as a plain safetensors file that any tool loads into the plain network.

    Raises:
        ValueError: as for :func:`dense_state`.
        OSError: the file cannot be written.
    """
    normalisation = {what: getattr(model, what).flatten().tolist() for what in ("mean", "std")}
    metadata = {"format": "smart-dense-twin", "path": path_name, "model": model.spec, **normalisation}
    _write(path, dense_state(model, path_name), metadata)


def versions() -> dict[str, str]:
    """The versions that results depend on."""
    return {"smart": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _packed_state(model: SmartNet) -> dict[str, Tensor]:
    masks = _mask_keys(model)
    return {key: pack_bits(value) if key in masks else value for key, value in model.state_dict().items()}


def _mask_keys(model: nn.Module) -> set[str]:
    convs = (name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, SmartConv2d))
    return {f"{name}.mask_{path}" for name in convs for path in PATHS}


@torch.no_grad()
def _restore(model: SmartNet, stored: Mapping[str, Tensor], path: str | Path) -> None:
    """Checks every tensor against the model before the first is copied into it."""
    own = model.state_dict()
    for what, keys in (("lacks", own.keys() - stored.keys()), ("has besides", stored.keys() - own.keys())):
        if keys:
            raise CheckpointError(
                f"{path} is of another network, it {what} {min(keys)!r}: build the network it was saved from"
            )
    masks = _mask_keys(model)
    loaded = {}
    for key, mine in own.items():
        value = stored[key]
        expected = (math.ceil(mine.numel() / 8),) if key in masks else tuple(mine.shape)
        if tuple(value.shape) != expected or value.is_floating_point() != (mine.is_floating_point()):
            raise CheckpointError(
                f"{path} is of another network, its {key!r} has shape {tuple(value.shape)} where {expected} is needed: "
                "build the network it was saved from"
            )
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise CheckpointError(
                f"{path} holds NaN or infinity in {key!r}: use a checkpoint from before training diverged"
            )
        try:
            loaded[key] = unpack_bits(value, tuple(mine.shape)) if key in masks else value
        except ValueError as error:
            raise CheckpointError(f"{path} has a damaged mask {key!r}: {error}") from error
    for key, mine in own.items():
        mine.copy_(loaded[key])


def _plain(tensor: Tensor) -> Tensor:
    # safetensors refuses tensors that share memory or are not contiguous.
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    stamp = {"format_version": FORMAT_VERSION, "versions": versions(), "saved": _now()}
    text = json.dumps({**stamp, **metadata})
    with replacing(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata={FORMAT: text, "sha256": _digest(tensors, text)})
        except SafetensorError as error:
            # A full disk or a read-only folder comes out of safetensors as an error of its own.
            raise OSError(str(error)) from error


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
