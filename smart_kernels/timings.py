"""Measured times of layers, kept so that no layer is measured twice on one machine.

A time is known by everything that decides on it: device, versions, backend, dtype, the convolution, its input's shape,
and a hash of its masks.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from smart_kernels import devices
from smart_kernels.files import write_text
from smart_kernels.geometry import Geometry
from smart_kernels.packing.bits import pack_bits

VERSION = 1


class Timings:
    """Medians in microseconds by layer, in memory, and in a JSON file if one is named.

    Args:
        file: is read now if it exists, and written by :meth:`save`; None keeps the times in this process.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, file: str | os.PathLike | None = None) -> None:
        self.file = None if file is None else Path(file)
        self._us: dict[str, float] = {}
        self._changed = False
        if self.file is not None and self.file.exists():
            self._us = _read(self.file)

    def __len__(self) -> int:
        return len(self._us)

    def get(self, key: str) -> float | None:
        """Microseconds of the layer that :func:`layer_key` named, or None."""
        return self._us.get(key)

    def put(self, key: str, us: float) -> None:
        """Keeps a measurement."""
        self._us[key] = us
        self._changed = True

    def save(self) -> None:
        """Writes what was measured since, beside what others have written meanwhile; does nothing without a file."""
        if self.file is None or not self._changed:
            return
        others = _read(self.file) if self.file.exists() else {}
        self._us = {**others, **self._us}
        write_text(self.file, json.dumps({"version": VERSION, "us": self._us}, indent=1) + "\n")
        self._changed = False


# Of this process: a network swapped again, or one like it, is planned at once.
SHARED = Timings()


def layer_key(
    backend: str, geometry: Geometry, input_shape: Iterable[int], dtype: torch.dtype, device: torch.device, masks: str
) -> str:
    """The name of one measurement; ``masks`` is what :func:`mask_hash` gives."""
    parts = (
        devices.name(device),
        f"torch {torch.__version__}",
        backend,
        str(dtype).removeprefix("torch."),
        "x".join(map(str, input_shape)),
        " ".join(map(str, geometry.numbers)),
        masks,
    )
    return " | ".join(parts)


def mask_hash(masks: Mapping[str, Tensor]) -> str:
    """A short digest of all masks of a layer."""
    digest = hashlib.blake2b(digest_size=8)
    for mask in masks.values():
        digest.update(pack_bits(mask).numpy().data)
    return digest.hexdigest()


def _read(file: Path) -> dict[str, float]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        times = content["us"]
        good = content["version"] == VERSION and all(
            isinstance(us, float) and math.isfinite(us) and us > 0 for us in times.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is not a file of measured times ({error}): delete it, or name another") from error
    if not good:
        raise ValueError(f"{file} is not a file of measured times, version {VERSION}: delete it, or name another")
    return times
