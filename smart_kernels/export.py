"""Swapped networks as programs for deployment: torch.export, AOTInductor, and ONNX of the dense twin."""

from __future__ import annotations

import copy
import json
import os
import platform
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from smart_kernels import paths
from smart_kernels.backends import schedules
from smart_kernels.exported import ABOUT, KIND, VERSION, load_exported
from smart_kernels.files import replacing
from smart_kernels.model import SparseModel
from smart_kernels.modules import PerPathTensors
from smart_kernels.onnx_export import first_line, write_onnx
from smart_kernels.twin import dense_twin, single_path
from smart_kernels.verify import TOLERANCE, VerificationError, check_swapped, relative_error

FORMATS = ("pt2", "aoti", "onnx")
# Where in the exporter's source a node came from: twice the size of the program, and paths of this machine.
_ORIGINS = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def export(
    sparse: SparseModel,
    example: Tensor,
    file: str | os.PathLike,
    path: paths.Path | None = None,
    format: str = "pt2",
    dynamic_batch: bool = True,
) -> dict[str, float]:
    """Writes a swapped network as a program that needs neither the network's code nor, as ``"aoti"``, Python.

    The file is loaded back and compared with the network before it takes its place. It holds none of the example's
    values.

    Args:
        sparse: what :func:`smart_kernels.swap` or :func:`smart_kernels.load` returned.
        example: (N, C, H, W); C, H and W are those of all later inputs.
        file: is replaced only once the new one is complete.
        path: the program's only path, a name, a lambda in [0, 1], or one for each stage. None puts all paths into one
            file, over weights stored once: which one runs is a second input, a bool tensor of no dimensions, false for
            the first path.
        format: ``"pt2"``, a torch.export program on the operators of this library; ``"aoti"``, the same compiled by
            AOTInductor for this kind of machine; ``"onnx"``, one path's dense twin for any ONNX runtime.
        dynamic_batch: whether later batches may have other sizes than N.

    Returns:
        path -> max |difference| / max |output| of the file's program; of the dense twin for ONNX.

    Raises:
        TypeError, ValueError: the arguments are not as described, or torch cannot express the network as a program.
        ImportError: packages for ONNX are missing. RuntimeError: AOTInductor has no C++ compiler, or failed.
        VerificationError: the program computes something else than the network. OSError: it cannot be written.
    """
    check_swapped(sparse)
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: accepted are {', '.join(map(repr, FORMATS))}")
    if Path(file).suffix == ".onnx" and format != "onnx":
        raise ValueError(f"{file} is named as an ONNX file, but format is {format!r}: give 'onnx', or another name")
    chosen = _chosen(sparse, path, format)
    with torch.no_grad():
        sparse(example, path=sparse.paths[0])  # complains of a wrong example in our words
    with replacing(file) as temporary:
        if format == "onnx":
            return _export_onnx(sparse, example, temporary, chosen, dynamic_batch)
        program = _trace(sparse, example, chosen, dynamic_batch)
        about = _about(sparse, example, program, chosen, format, dynamic_batch)
        (_write_pt2 if format == "pt2" else _write_aoti)(program, temporary, about)
        return _compare(sparse, example, temporary, chosen, dynamic_batch)


def _chosen(sparse: SparseModel, path: paths.Path | None, format: str) -> paths.Path | None:
    """The resolved path of a program of one path; None for one of all paths."""
    if path is not None:
        return paths.resolve(path, sparse.paths, sparse.stages)
    if len(sparse.paths) == 1:
        return sparse.paths[0]
    if format == "onnx":
        raise ValueError(f"an ONNX file holds one path: give path, {' or '.join(map(repr, sparse.paths))}, or a lambda")
    return None


# ---- the program ----


class _OnePath(nn.Module):
    def __init__(self, sparse: SparseModel, path: paths.Path) -> None:
        super().__init__()
        self.sparse = sparse
        self.path = path

    def forward(self, x: Tensor) -> Any:
        return self.sparse(x, path=self.path)


class _BothPaths(nn.Module):
    def __init__(self, sparse: SparseModel) -> None:
        super().__init__()
        self.sparse = sparse

    def forward(self, x: Tensor, path: Tensor) -> Any:
        first, second = self.sparse.paths

        def run_second(x: Tensor) -> Any:
            return self.sparse(x, path=second)

        def run_first(x: Tensor) -> Any:
            return self.sparse(x, path=first)

        # torch.export lets sizes vary inside of branches even where they are fixed outside.
        with torch._dynamo.config.patch(assume_static_by_default=True):
            return torch.cond(path, run_second, run_first, (x,))


def _trace(sparse: SparseModel, example: Tensor, path: paths.Path | None, dynamic_batch: bool) -> ExportedProgram:
    inputs, shapes = _traced_on(example, dynamic_batch)
    if path is None:
        network: nn.Module = _BothPaths(_untied(sparse))
        inputs, shapes = (*inputs, torch.tensor(False)), (*shapes, {})
    else:
        single = single_path(sparse, path)
        network = _OnePath(single, single.paths[0] if len(single.paths) < len(sparse.paths) else path)
    try:
        with torch.no_grad():
            network(*inputs)  # what layers prepare at their first call must be there: it would be part of the program
            program = torch.export.export(network.eval(), inputs, dynamic_shapes=shapes)
    except Exception as error:
        why = sparse.uncaptured or _advice(path, dynamic_batch)
        raise ValueError(f"torch cannot export the network: {first_line(error)}; {why}") from error
    _drop_unused(program)
    _drop_origins(program)
    return program


def _traced_on(example: Tensor, dynamic_batch: bool) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Inputs to trace on, and which of their dimensions may vary.

    They are zeros, since programs keep them, and at least two images: torch takes a batch of one for a constant.
    """
    batch = max(2, len(example)) if dynamic_batch else len(example)
    varying = {0: torch.export.Dim("batch", min=1)} if dynamic_batch else {}
    return (example.new_zeros(batch, *example.shape[1:]),), (varying,)


def _advice(path: paths.Path | None, dynamic_batch: bool) -> str:
    ways = ["dynamic_batch=False, for batches of one size"] if dynamic_batch else []
    ways += ["a single path"] if path is None else []
    return f"it may work with {' or '.join(ways)}" if ways else "smart_kernels.save keeps it for use from Python"


def _untied(sparse: SparseModel) -> SparseModel:
    """A copy whose paths have scales and biases of their own: operands of torch.cond must not share memory."""
    untied = copy.deepcopy(sparse)
    for module in untied.modules():
        if isinstance(module, PerPathTensors):
            for name, tensor in module.as_dict().items():
                setattr(module, name, tensor.clone())
    return untied


def _drop_unused(program: ExportedProgram) -> None:
    """Removes tensors that nothing reads, such as the masks of dense layers, which torch would store all the same."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    kept = []
    for spec in program.graph_signature.input_specs:
        node = nodes.get(getattr(spec.arg, "name", None))
        if spec.target is None or node is None or node.users:
            kept.append(spec)
            continue
        program.graph.erase_node(node)
        for tensors in (program.state_dict, program.constants):
            tensors.pop(spec.target, None)
    program.graph_signature.input_specs = kept
    program.graph_module.recompile()


def _drop_origins(program: ExportedProgram) -> None:
    for graph in _graphs(program):
        for node in graph.nodes:
            for key in _ORIGINS:
                node.meta.pop(key, None)


def _graphs(program: ExportedProgram) -> Iterator[fx.Graph]:
    """Of the program and of the branches in it."""
    return (module.graph for module in program.graph_module.modules() if isinstance(module, fx.GraphModule))


# ---- files ----


def _about(
    sparse: SparseModel,
    example: Tensor,
    program: ExportedProgram,
    path: paths.Path | None,
    format: str,
    dynamic_batch: bool,
) -> str:
    """What :func:`load_exported` must know, as JSON."""
    targets = {node.target for graph in _graphs(program) for node in graph.nodes if node.op == "call_function"}
    ours = {str(target.name()) for target in targets if getattr(target, "namespace", "") == "smart_kernels"}
    about = {
        "kind": KIND,
        "version": VERSION,
        "format": format,
        "paths": sparse.paths,
        "path": path,
        "shape": [None if dynamic_batch else len(example), *example.shape[1:]],
        "dtype": str(example.dtype).removeprefix("torch."),
        "device": example.device.type,
        "operators": sorted(ours),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
    return json.dumps(about)


def _write_pt2(program: ExportedProgram, file: Path, about: str) -> None:
    program.example_inputs = None
    with file.open("wb") as stream:  # by name, torch would keep the name, and complain of its suffix
        torch.export.save(program, stream, extra_files={ABOUT: about})


def _write_aoti(program: ExportedProgram, file: Path, about: str) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InvalidCxxCompiler

    with tempfile.TemporaryDirectory(prefix=".", dir=file.parent) as folder:
        package = Path(folder) / "network.pt2"  # torch insists on the suffix
        try:
            with warnings.catch_warnings(), schedules.without_tma():
                warnings.simplefilter("ignore")  # torch deprecating its own calls
                aoti_compile_and_package(program, package_path=str(package))
        except Exception as error:
            if isinstance(getattr(error, "inner_exception", error), InvalidCxxCompiler):
                raise RuntimeError(
                    "AOTInductor found no C++ compiler: install g++, or name one in the environment variable CXX"
                ) from error
            raise RuntimeError(
                f"AOTInductor failed: {first_line(error)}; format='pt2' needs no compiler, only Python"
            ) from error
        with zipfile.ZipFile(package, "a") as archive:
            archive.writestr(f"{package.stem}/extra/{ABOUT}", about)
        os.replace(package, file)


def _compare(
    sparse: SparseModel, example: Tensor, file: Path, path: paths.Path | None, dynamic_batch: bool
) -> dict[str, float]:
    """Runs what was written: also on one image, where batches may vary, since torch traced on more."""
    program = load_exported(file)
    batches = [example, example[:1]] if dynamic_batch else [example]
    errors = {}
    with torch.no_grad():
        for each in sparse.paths if path is None else [path]:
            errors[_name(each)] = max(relative_error(program(x, each), sparse(x, path=each)) for x in batches)
    _check_errors(errors, example.dtype, "the exported program")
    return errors


def _check_errors(errors: dict[str, float], dtype: torch.dtype, what: str) -> None:
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
    if not all(error <= tolerance for error in errors.values()):
        listing = ", ".join(f"{path}: {error:.2e}" for path, error in errors.items())
        raise VerificationError(
            f"{what} differs from the swapped network by {listing}, where {tolerance:.0e} is accepted: nothing was "
            "written; please report it"
        )


def _name(path: paths.Path) -> str:
    if isinstance(path, tuple):
        return ", ".join(map(_name, path))
    return path if isinstance(path, str) else f"lambda {path:g}"


def _export_onnx(
    sparse: SparseModel, example: Tensor, file: Path, path: paths.Path, dynamic_batch: bool
) -> dict[str, float]:
    twin = dense_twin(sparse, path)
    with torch.no_grad():
        errors = {_name(path): relative_error(twin(example), sparse(example, path=path))}
    _check_errors(errors, example.dtype, "the dense twin")
    write_onnx(twin, *_traced_on(example, dynamic_batch), file)
    return errors
