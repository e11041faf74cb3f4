"""Swapped networks as files: one safetensors file, with the values of each weight's union once and its masks as bits.

A file holds data only: the graph names operations from a fixed list (graph_json.py), weights are packed again for the
machine that loads them, and everything is checked before anything runs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from smart_kernels import backends, devices, graph_json
from smart_kernels.files import replacing
from smart_kernels.geometry import Geometry
from smart_kernels.model import SparseModel
from smart_kernels.modules import PathAffine, SparseConv2d, SparseLinear
from smart_kernels.packing import PackedWeight
from smart_kernels.packing.mask_codec import decode_masks, encode_masks
from smart_kernels.report import Row
from smart_kernels.stored_layers import read_layer, write_layer
from smart_kernels.verify import check_swapped

FORMAT = "smart_kernels"
VERSION = 2
MAX_WEIGHT = 2**34  # numbers in one weight: more is a corrupt header, not a convolution


class FileError(ValueError):
    """The file is not a swapped network, or not a whole one."""


def save(sparse: SparseModel, path: str | os.PathLike) -> None:
    """Writes a swapped network; a file of that name is replaced only once the new one is complete.

    Raises:
        TypeError: ``sparse`` is no swapped network.
        ValueError: the network cannot be written as a graph of known operations; the message says what is in the way.
        OSError: the file cannot be written.
    """
    check_swapped(sparse)
    if sparse.uncaptured:
        raise ValueError(f"this network cannot be saved as one file: {sparse.uncaptured}; save its state_dict instead")
    tensors: dict[str, Tensor] = {}
    modules: dict[str, dict[str, object]] = {}
    stored: dict[int, str] = {}
    for node in sparse.net.graph.nodes:
        if node.op == "get_attr":
            tensors[node.target] = _attribute(sparse.net, node.target)
        if node.op == "call_module" and node.target not in modules:
            modules[node.target] = _write_module(node.target, sparse.net.get_submodule(node.target), tensors, stored)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    description = {
        "paths": sparse.paths,
        "attributes": sorted({node.target for node in sparse.net.graph.nodes if node.op == "get_attr"}),
        "graph": graph_json.encode(sparse.net.graph),
        "modules": modules,
        "rows": sparse.report(),
        "programs": sparse.runs_programs,
        "compact": sparse._compact.plan if sparse.runs_compact else None,
        "stages": sparse.stages,
        "channels": sparse.channels,
    }
    graph_json.check_names({*modules, *(n.target for n in sparse.net.graph.nodes if n.op == "get_attr")})
    text = json.dumps(description, separators=(",", ":"))
    metadata = {"format": FORMAT, "version": str(VERSION), "network": text, "sha256": _digest(text, tensors)}

    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> SparseModel:
    """Reads a swapped network; each layer runs on the backend that it was planned for.

    Where that cannot run on this device, another that reads the same packed weight does, or else dense; the report says
    so. Nothing is measured: :meth:`SparseModel.replan` plans the network for this device.

    Raises:
        FileError: the file is truncated, altered, or not a swapped network of a version this library reads.
        FileNotFoundError: there is no such file.
        ValueError: this machine has no such device.
    """
    path, device = Path(path), devices.usable(device)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give one that smart_kernels.save wrote")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise FileError(
            f"{path} is not a whole safetensors file ({error}): write it again with smart_kernels.save"
        ) from error
    if metadata.get("format") != FORMAT:
        raise FileError(
            f"{path} is a safetensors file, but not a swapped network: give one that smart_kernels.save wrote"
        )
    if metadata.get("version") != str(VERSION):
        raise FileError(f"{path} has format version {metadata.get('version')}: this library reads version {VERSION}")
    text = metadata.get("network", "")
    if metadata.get("sha256") != _digest(text, tensors):
        raise FileError(
            f"{path} was altered or damaged after it was written: its checksum differs; copy or write it again"
        )
    try:
        return _build(json.loads(text), tensors, device).to(device)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        raise FileError(
            f"{path} does not describe a network ({error}): write it again with smart_kernels.save"
        ) from error


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _attribute(root: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    return getattr(root.get_submodule(owner), attribute)


# ---- one module ----


def _write_module(
    name: str, module: nn.Module, tensors: dict[str, Tensor], stored: dict[int, str]
) -> dict[str, object]:
    """Puts a module's tensors under its name and returns the rest of it as plain data.

    ``stored`` holds which layer's name each packed weight was stored under: one that several use is stored once.
    """
    if isinstance(module, SparseConv2d):
        return _write_conv(name, module, tensors, stored)
    if isinstance(module, PathAffine):
        return _write_affine(name, module, tensors)
    return write_layer(name, module, tensors)


def _write_affine(name: str, affine: PathAffine, tensors: dict[str, Tensor]) -> dict[str, object]:
    for kind in ("scale", "bias"):
        for path, value in getattr(affine, kind).as_dict().items():
            tensors[f"{name}.{kind}.{path}"] = value.flatten()
    return {"type": "PathAffine", "relu": affine.relu, "stage": affine.stage}


def _write_conv(name: str, conv: SparseConv2d, tensors: dict[str, Tensor], stored: dict[int, str]) -> dict[str, object]:
    g = conv.geometry
    weight_of = stored.setdefault(id(conv.packed), name)
    if weight_of == name:
        weight, masks = conv.packed.unpack()
        union = functools.reduce(torch.logical_or, masks.values())
        tensors[f"{name}.values"] = weight[union]
        tensors |= {f"{name}.{key}": data for key, data in encode_masks(masks).items()}
    for kind in ("scale", "bias"):
        for path, value in getattr(conv, kind).as_dict().items() if getattr(conv, kind) is not None else ():
            tensors[f"{name}.{kind}.{path}"] = value
    return {
        "type": type(conv).__name__,
        "weight_of": weight_of,
        "geometry": [g.weight_shape, g.stride, g.padding, g.dilation, g.groups],
        "backend": conv.backend,
        "scale": conv.scale is not None,
        "bias": conv.bias is not None,
        "relu": conv.relu,
        "pad": conv.pad,
        "second": conv.second and _write_affine(f"{name}.second", conv.second, tensors),
        "input_shape": conv.input_shape,
        "stage": conv.stage,
    }


# ---- and back ----


def _build(description: Mapping[str, object], tensors: Mapping[str, Tensor], device: torch.device) -> SparseModel:
    paths = tuple(str(path) for path in description["paths"])
    if not 1 <= len(paths) <= 2:
        raise ValueError(f"{len(paths)} paths")
    rows = [Row(**row) for row in description["rows"]]
    modules: dict[str, nn.Module] = {}
    for name, entry in description["modules"].items():
        if entry["type"] in ("SparseConv2d", "SparseLinear"):
            modules[name] = _read_conv(name, entry, tensors, paths, device, modules)
        elif entry["type"] == "PathAffine":
            modules[name] = _read_affine(name, entry, tensors, paths, None)
        else:
            modules[name] = read_layer(name, entry, tensors)
    for row in rows:
        if isinstance(conv := modules.get(row.name), SparseConv2d):
            _tell_replaced(row, conv, description["modules"][row.name]["backend"], device)
    attributes = [str(name) for name in description["attributes"]]
    graph = graph_json.decode(description["graph"], modules, attributes)
    root = {**modules, **{name: tensors[name] for name in attributes}}
    stages = int(description.get("stages", 0))  # files of before there were stages do not say
    sparse = SparseModel(fx.GraphModule(root, graph), paths, rows, takes_path=True, stages=stages)
    for name, module in modules.items():
        if isinstance(module, (SparseConv2d, PathAffine)):
            _place(module, description["modules"][name], stages)
    sparse.runs_programs = bool(description["programs"]) and device.type == "cpu"
    if (channels := description.get("channels")) is not None:  # files of before inputs were checked do not say
        sparse.channels = int(channels)
    if (plan := description.get("compact")) is not None:  # files of before there was such a thing do not say
        sparse.runs_compact = True
        sparse._compact.plan = {str(layer): backends.find(backend).name for layer, backend in plan.items()}
    return sparse


def _tell_replaced(row: Row, conv: SparseConv2d, planned: str, device: torch.device) -> None:
    """Says in a layer's row what runs it in place of the backend planned, if another does, and why."""
    if conv.backend == planned:
        return
    refused = backends.find(planned).supports(conv.geometry, next(conv.packed.buffers()).dtype, device)
    same = ", which reads the same packed weight" if conv.packed.format == backends.find(planned).format else ""
    row.why = f"in place of {planned}{same}: {refused.why}"
    row.backend, row.bytes = conv.backend, conv.packed.nbytes if row.bytes else 0
    row.dense_us = row.sparse_us = None  # of the machine that it was planned on


def _place(module: SparseConv2d | PathAffine, entry: Mapping[str, object], stages: int) -> None:
    """Puts a layer, and a norm in its epilogue, into their stages."""
    module.stage = int(entry.get("stage", 0))
    if not 0 <= module.stage < max(1, stages):
        raise ValueError(f"a layer is in stage {module.stage} of {stages}")
    if isinstance(module, SparseConv2d) and module.second is not None:
        _place(module.second, entry["second"], stages)


def _read_affine(
    name: str,
    entry: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    paths: tuple[str, ...],
    channels: int | None,
) -> PathAffine:
    scale, bias = (_per_path(tensors, name, kind, paths, channels) for kind in ("scale", "bias"))
    return PathAffine(scale, bias, bool(entry["relu"]))


def _read_conv(
    name: str,
    entry: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    paths: tuple[str, ...],
    device: torch.device,
    before: Mapping[str, nn.Module],
) -> SparseConv2d:
    shape, stride, padding, dilation, groups = entry["geometry"]
    geometry = Geometry(tuple(shape), tuple(stride), tuple(padding), tuple(dilation), groups)
    if math.prod(geometry.weight_shape) > MAX_WEIGHT:
        raise ValueError(f"weight of {name} has shape {shape}")
    if entry["weight_of"] == name:
        packed, backend = _read_weight(name, entry, tensors, paths, device, geometry)
    else:
        packed, backend = before[entry["weight_of"]].packed, before[entry["weight_of"]].backend
        if tuple(packed.shape) != geometry.weight_shape:
            raise ValueError(f"{name} has another shape than the layer whose weight it uses")
    channels = geometry.weight_shape[0]
    scale, bias = (
        _per_path(tensors, name, kind, paths, channels) if entry[kind] else None for kind in ("scale", "bias")
    )
    pad = entry["pad"] and (tuple(int(n) for n in entry["pad"][0]), str(entry["pad"][1]))
    second = entry["second"] and _read_affine(f"{name}.second", entry["second"], tensors, paths, channels)
    input_shape = entry["input_shape"] and tuple(int(n) for n in entry["input_shape"])
    cls = SparseLinear if entry["type"] == "SparseLinear" else SparseConv2d
    return cls(packed, geometry, backend, scale, bias, bool(entry["relu"]), pad, second or None, input_shape)


def _read_weight(
    name: str,
    entry: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    paths: tuple[str, ...],
    device: torch.device,
    geometry: Geometry,
) -> tuple[PackedWeight, str]:
    """The packed weight stored under a layer's name, and the backend it is packed for."""
    masks = decode_masks(lambda key: tensors.get(f"{name}.{key}"), paths, geometry.weight_shape)
    union = functools.reduce(torch.logical_or, masks.values())
    values = tensors[f"{name}.values"]
    if values.shape != (int(union.sum()),):
        raise ValueError(f"{name} has {values.numel()} values for {int(union.sum())} weights")
    weight = values.new_zeros(geometry.weight_shape)
    weight[union] = values

    backend = backends.runnable(entry["backend"], geometry, masks, weight.dtype, device) or backends.find("dense")
    # Layers that lie on the device already are not planned anew by what moves the rest of the network there.
    return backend.pack(weight, masks, geometry.groups).to(device), backend.name


def _per_path(
    tensors: Mapping[str, Tensor], name: str, kind: str, paths: tuple[str, ...], channels: int | None
) -> dict[str, Tensor]:
    values = {path: tensors[f"{name}.{kind}.{path}"] for path in paths}
    if any(value.dim() != 1 or (channels and len(value) != channels) for value in values.values()):
        raise ValueError(f"{kind} of {name} is not one number a channel")
    return values
