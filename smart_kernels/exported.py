"""Loads what :func:`smart_kernels.export` wrote.

Programs are code: torch evaluates expressions found in them, and an AOTInductor package holds machine code. What is
checked here keeps mistakes and damage from becoming riddles, and pickled data out; it does not make files of strangers
safe. Networks of strangers come as :func:`smart_kernels.save` writes them.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import platform
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smart_kernels import native, paths
from smart_kernels.io import FileError

ABOUT = "smart_kernels.json"
KIND = "smart_kernels program"
VERSION = 1
_CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")
_KEYS = {"version", "format", "paths", "path", "shape", "dtype", "device", "operators", "torch", "machine", "cpu"}


class Exported:
    """A program that was loaded; called like the network it was made of: ``y = program(x, path="adv")``.

    Attributes:
        format: ``"pt2"`` or ``"aoti"``.
        paths: the names that ``path`` may take; for a program of one lambda the lambda itself.
        shape: (N, C, H, W) of its inputs; N is None if it may vary.
        dtype, device: of its inputs.
    """

    def __init__(self, run: Callable[..., Any], about: Mapping[str, Any]) -> None:
        self._run = run
        self._choose = about["path"] is None
        self.format: str = about["format"]
        self.paths: tuple[str | float, ...] = tuple(about["paths"]) if self._choose else (_as_path(about["path"]),)
        self.shape: tuple[int | None, ...] = tuple(about["shape"])
        self.dtype: torch.dtype = getattr(torch, about["dtype"])
        self.device: str = about["device"]

    def __call__(self, x: Tensor, path: str | float | Tensor | None = None) -> Any:
        """Runs a batch.

        Args:
            x: (N, C, H, W).
            path: one of ``paths``, by default the first. A program of two paths also takes 0 and 1, and an integer
                tensor (N,) of 0 and 1 that picks a path for each sample.

        Returns:
            What the network returns.

        Raises:
            TypeError, ValueError: the input or the path does not fit; the message says what does.
            RuntimeError: a gradient is asked for.
        """
        if self._choose and isinstance(path, Tensor):
            return paths.run_per_sample(self._run_path, x, path, self.paths)
        return self._run_path(x, self._resolve(path))

    def _resolve(self, path: str | float | None) -> str | float:
        if path is None or (not isinstance(path, Tensor) and path == self.paths[0]):
            return self.paths[0]
        if not self._choose:
            raise ValueError(f"path is {path!r}: this program was exported for path {self.paths[0]!r} alone")
        path = paths.resolve(path, self.paths)
        if isinstance(path, float):
            raise ValueError(f"lambda is {path}: this program holds named paths, export one with path={path} for it")
        return path

    def _run_path(self, x: Tensor, path: str | float) -> Any:
        self._check(x)
        if not self._choose:
            return self._run(x)
        return self._run(x, torch.tensor(path == self.paths[1]))

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"input is a {type(x).__name__}: a tensor {self._accepted()} is needed")
        fits = x.dim() == 4 and all(need in (None, given) for need, given in zip(self.shape, x.shape, strict=True))
        if not fits or x.dtype != self.dtype or x.device.type != self.device:
            given = f"{tuple(x.shape)}, {str(x.dtype).removeprefix('torch.')} on {x.device}"
            raise ValueError(f"input is {given}: this program takes {self._accepted()}; export it for other sizes")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "an exported program computes no gradients: take them through smart_kernels.dense_twin(sparse, path), "
                "or run the program under torch.no_grad()"
            )

    def _accepted(self) -> str:
        batch, *image = self.shape
        sizes = ", ".join(map(str, ("N" if batch is None else batch, *image)))
        return f"({sizes}), {str(self.dtype).removeprefix('torch.')} on {self.device}"


def load_exported(file: str | os.PathLike) -> Exported:
    """Loads a ``"pt2"`` or ``"aoti"`` file that :func:`smart_kernels.export` wrote, in this process or another.

    Only open files from where you would also run code from: see the top of this module.

    Raises:
        FileError: the file is damaged, or not ours, or of another version.
        FileNotFoundError: there is no such file.
        RuntimeError: this machine lacks what the program needs: the compiled operators, a device, a kind of CPU.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}: give one that smart_kernels.export wrote")
    about = _read_about(file)
    _check_machine(file, about)
    try:
        run = _load_pt2(file) if about["format"] == "pt2" else _load_aoti(file)
    except FileError:
        raise
    except Exception as error:
        raise FileError(
            f"{file}, exported with torch {about['torch']}, cannot be loaded with torch {torch.__version__} "
            f"({type(error).__name__}: {error}): export it again with this version"
        ) from error
    return Exported(run, about)


def _as_path(path: object) -> Any:
    # JSON has no tuples.
    return tuple(path) if isinstance(path, list) else path


def _read_about(file: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            names = [name for name in archive.namelist() if name.endswith(f"/extra/{ABOUT}")]
            about = json.loads(archive.read(names[0])) if names and damaged is None else None
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise FileError(f"{file} is not a whole file of an exported network ({error}): export it again") from error
    if damaged is not None:
        raise FileError(f"{file} was damaged after it was written, in {damaged}: copy or export it again")
    if not isinstance(about, dict) or about.get("kind") != KIND:
        raise FileError(f"{file} is an archive, but no exported network: give one that smart_kernels.export wrote")
    if about.get("version") != VERSION:
        raise FileError(f"{file} has format version {about.get('version')}: this library reads version {VERSION}")
    if not about.keys() >= _KEYS:
        raise FileError(f"{file} does not say {', '.join(sorted(_KEYS - about.keys()))}: export it again")
    return about


def _check_machine(file: Path, about: Mapping[str, Any]) -> None:
    if any("triton" in name for name in about["operators"]) and importlib.util.find_spec("triton"):
        importlib.import_module("smart_kernels.triton_ops")  # registers them
    for name in about["operators"]:
        namespace, _, operator = name.partition("::")
        if not hasattr(getattr(torch.ops, namespace), operator.partition(".")[0]):
            why = native.missing() or "it is of another version of smart_kernels"
            raise RuntimeError(f"{file} needs the operator {name}, which is not here: {why}")
    if about["device"] == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"{file} was exported for a GPU, and there is none: export it from a network on the CPU")
    if about["format"] != "aoti":
        return
    here = platform.machine(), torch.backends.cpu.get_cpu_capability()
    made_for = about["machine"], about["cpu"]
    lesser = all(cpu in _CAPABILITIES for cpu in (here[1], made_for[1])) and (
        _CAPABILITIES.index(here[1]) < _CAPABILITIES.index(made_for[1])
    )
    if here[0] != made_for[0] or lesser:
        raise RuntimeError(
            f"{file} holds machine code for {' '.join(made_for)}, and this is {' '.join(here)}: export it on a machine "
            "like this one"
        )


# ---- torch.export ----


def _load_pt2(file: Path) -> Callable[..., Any]:
    content = file.read_bytes()
    _check_unpickled(file, content)
    # Of the very bytes that were checked.
    return torch.export.load(io.BytesIO(content)).module()


def _check_unpickled(file: Path, content: bytes) -> None:
    """Raises FileError if torch would unpickle anything of the file: torch.export.load does so without restriction."""
    from torch.export.pt2_archive import PT2ArchiveReader

    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if "version" in archive.namelist():  # where torch finds it, it falls back to an older format, all pickles
            raise _unsafe(file, ["version"])
    found = []
    with PT2ArchiveReader(io.BytesIO(content)) as archive:
        for name in archive.get_file_names():
            kind = name.removeprefix("data/").partition("/")[0]
            if name.endswith("_config.json"):
                entries = json.loads(archive.read_string(name))["config"].values()
                found += [entry["path_name"] for entry in entries if _is_pickled(entry)]
            elif kind == "aotinductor" or (name.endswith(".pt") and archive.read_bytes(name)):
                found.append(name)
    if found:
        raise _unsafe(file, found)


def _unsafe(file: Path, found: list[str]) -> FileError:
    return FileError(
        f"{file} holds pickled data or machine code ({', '.join(found)}), which smart_kernels.export never writes into "
        "it: do not open it"
    )


def _is_pickled(entry: Mapping[str, Any]) -> bool:
    from torch.export.pt2_archive.constants import TENSOR_CONSTANT_FILENAME_PREFIX, WEIGHT_FILENAME_PREFIX

    tensor = entry["path_name"].startswith((WEIGHT_FILENAME_PREFIX, TENSOR_CONSTANT_FILENAME_PREFIX))
    return entry["use_pickle"] is not False or not tensor


# ---- AOTInductor ----


def _load_aoti(file: Path) -> Callable[..., Any]:
    from torch._inductor import aoti_load_package

    if file.suffix == ".pt2":
        return aoti_load_package(str(file))
    # torch insists on the suffix; what it loads it has unpacked elsewhere.
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "network.pt2"
        link.symlink_to(file.resolve())
        return aoti_load_package(str(link))
