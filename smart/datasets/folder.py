"""Reads a folder of images sorted into classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smart.datasets.base import SPLITS, Splits

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp")
GREY_MODES = ("1", "L", "LA")
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")


def read_folder(folder: Path, image_size: int | tuple[int, int] | None) -> Splits:
    """Reads ``train/<class>/*`` and, where they exist, ``val`` and ``test``; classes are sorted by name.

    Images are uint8 (N, C, H, W): C is 1 if all are grey, else 3.

    Raises:
        ValueError: no train folder, an empty class, unreadable or differently sized images, a class unknown to train.
    """
    if not (folder / "train").is_dir():
        raise ValueError(f"{folder} has no folder 'train': give a folder with the images of class c in train/c/")
    class_names = _subfolders(folder / "train")
    if not class_names:
        raise ValueError(f"{folder / 'train'} is empty: put the images of class c into train/c/")
    arrays: dict[str, list[np.ndarray]] = {}
    labels: dict[str, list[int]] = {}
    for split in SPLITS:
        if not (folder / split).is_dir():
            continue
        arrays[split], labels[split] = [], []
        for name in _subfolders(folder / split):
            if name not in class_names:
                raise ValueError(f"{folder / split / name} is a class that {folder / 'train'} does not have")
            files = sorted(f for f in (folder / split / name).iterdir() if f.suffix.lower() in SUFFIXES)
            if not files:
                raise ValueError(f"{folder / split / name} holds no images: accepted are {', '.join(SUFFIXES)}")
            arrays[split] += [read_image(file, image_size) for file in files]
            labels[split] += [class_names.index(name)] * len(files)
        if not arrays[split]:
            raise ValueError(f"{folder / split} is empty: put images into {split}/<class>/, or remove the folder")
    _check_sizes(folder, [array for split in arrays.values() for array in split])
    channels = max(array.shape[2] for split in arrays.values() for array in split)
    splits = {split: (_stack(arrays[split], channels), torch.tensor(labels[split])) for split in arrays}
    return splits, class_names


def _subfolders(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def read_image(file: Path, image_size: int | tuple[int, int] | None = None) -> np.ndarray:
    """uint8 (H, W, 1) of a grey image, (H, W, 3) of any other.

    Raises:
        ImportError: pillow is not installed.
        ValueError: the file is no image, is damaged, or has more than 8 bits a pixel.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("image folders are read with pillow: pip install pillow") from error
    try:
        with Image.open(file) as opened:
            if opened.mode in DEEP_MODES:
                raise ValueError("it has more than 8 bits a pixel")
            image = opened.convert("L" if opened.mode in GREY_MODES else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as an image ({error}): repair or remove it") from error
    if image_size is not None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def _check_sizes(folder: Path, arrays: list[np.ndarray]) -> None:
    sizes = sorted({array.shape[:2] for array in arrays})
    if len(sizes) > 1:
        raise ValueError(
            f"{folder} has images of {len(sizes)} sizes, from {sizes[0]} to {sizes[-1]}: give image_size to resize all"
        )


def _stack(arrays: list[np.ndarray], channels: int) -> Tensor:
    same = np.stack([np.broadcast_to(array, (*array.shape[:2], channels)) for array in arrays])
    return torch.from_numpy(same).permute(0, 3, 1, 2).contiguous()
