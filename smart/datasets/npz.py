"""Reads images and labels from an .npz file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smart.datasets.base import SPLITS, Splits


def read_npz(path: Path) -> Splits:
    """Reads ``images`` and ``labels``, and, where they exist, those of ``val_`` and ``test_``.

    Raises:
        ValueError: no .npz of plain arrays, a missing array, or one of another dtype or shape.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a readable .npz of plain arrays ({error}): write it with numpy.savez"
        ) from error
    splits = {}
    for split in SPLITS:
        prefix = "" if split == "train" else f"{split}_"
        present = {f"{prefix}images", f"{prefix}labels"} & arrays.keys()
        if len(present) == 1 or (split == "train" and not present):
            raise ValueError(f"{path} holds {sorted(arrays)}: give both '{prefix}images' and '{prefix}labels'")
        if present:
            splits[split] = (_images(path, arrays[f"{prefix}images"]), _labels(path, arrays[f"{prefix}labels"]))
    if not len(splits["train"][1]):
        raise ValueError(f"{path} holds no images: give at least a few of each class")
    return splits, [str(label) for label in range(int(splits["train"][1].max()) + 1)]


def _images(path: Path, array: np.ndarray) -> Tensor:
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[-1] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    elif array.ndim != 4 or array.shape[1] not in (1, 3):
        raise ValueError(
            f"{path}: images have shape {array.shape}: give (N, H, W), (N, H, W, C) or (N, C, H, W), C 1 or 3"
        )
    if array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array))
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{path}: images have dtype {array.dtype}: give uint8, or floats in [0, 1]")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _labels(path: Path, array: np.ndarray) -> Tensor:
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{path}: labels have dtype {array.dtype} and shape {array.shape}: give integers (N,)")
    return torch.from_numpy(array.astype(np.int64))
