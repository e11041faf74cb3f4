"""Tiny-ImageNet-200 from its folder (http://cs231n.stanford.edu/tiny-imagenet-200.zip).

Its own test images have no labels: the validation images are the test split here, and a validation split is drawn from
the training images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smart.datasets.base import Dataset, Splits, register
from smart.datasets.files import missing
from smart.datasets.folder import read_image

ARCHIVE = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
FOLDER = "tiny-imagenet-200"


@dataclass(frozen=True)
class Counts:
    """How much there is of everything."""

    classes: int = 200
    per_class: int = 500
    test: int = 10_000
    side: int = 64


def read_tiny_imagenet(root: Path, counts: Counts = Counts()) -> Splits:
    """The training split, and the validation images as the test split, uint8.

    Raises:
        ImportError: pillow is not installed.
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: an unreadable image, one of another size, another number of them, or an unknown class.
    """
    folder = root / FOLDER
    if not folder.is_dir():
        if (root / f"{FOLDER}.zip").is_file():
            raise FileNotFoundError(f"{root / FOLDER}.zip is packed: extract it there, unzip -d {root}")
        raise missing("Tiny-ImageNet-200", root, [f"{FOLDER}/", f"{FOLDER}.zip"], ARCHIVE)
    classes = _lines(folder / "wnids.txt")
    if len(classes) != counts.classes or len(set(classes)) != counts.classes or any(map(_leads_away, classes)):
        raise ValueError(f"{folder / 'wnids.txt'} does not list {counts.classes} classes: extract the archive again")
    train = _train_files(folder / "train", classes, counts.per_class)
    test = _test_files(folder / "val", classes, counts.test)
    splits = {"train": _read(train, counts.side), "test": _read(test, counts.side)}
    return splits, _names(folder / "words.txt", classes)


def _train_files(folder: Path, classes: list[str], per_class: int) -> list[tuple[Path, int]]:
    found = []
    for label, name in enumerate(classes):
        files = sorted((folder / name / "images").glob("*.JPEG"))
        if len(files) != per_class:
            raise ValueError(
                f"{folder / name / 'images'} holds {len(files)} images, where {per_class} are expected: extract the "
                "archive again"
            )
        found += [(file, label) for file in files]
    return found


def _test_files(folder: Path, classes: list[str], count: int) -> list[tuple[Path, int]]:
    """The files that val_annotations.txt names: a file, its class, and where the object is, between tabs."""
    listing = folder / "val_annotations.txt"
    numbers = {name: label for label, name in enumerate(classes)}
    found = []
    for i, line in enumerate(_lines(listing)):
        name, _, rest = line.partition("\t")
        of_class = rest.split("\t")[0]
        if of_class not in numbers or not name or _leads_away(name):
            raise ValueError(f"{listing}, line {i + 1}: {line[:60]!r} names no image and class: extract it again")
        found.append((folder / "images" / name, numbers[of_class]))
    if len(found) != count:
        raise ValueError(f"{listing} lists {len(found)} images, where {count} are expected: extract the archive again")
    return found


def _leads_away(name: str) -> bool:
    return name != Path(name).name or name in (".", "..")


def _read(files: list[tuple[Path, int]], side: int) -> tuple[Tensor, Tensor]:
    images = np.empty((len(files), 3, side, side), np.uint8)
    for i, (file, _) in enumerate(files):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: extract the archive again")
        image = read_image(file)
        if image.shape[:2] != (side, side):
            raise ValueError(f"{file} has {image.shape[1]}x{image.shape[0]} pixels, where {side}x{side} are expected")
        # A grey image is the same in each channel.
        images[i] = image.transpose(2, 0, 1)
    return torch.from_numpy(images), torch.tensor([label for _, label in files])


def _names(file: Path, classes: list[str]) -> list[str]:
    """The first word for each class; its number where there is none."""
    words = dict(line.split("\t", 1) for line in _lines(file) if "\t" in line) if file.is_file() else {}
    return [words.get(name, name).split(",")[0] for name in classes]


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing: extract the archive again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text ({error}): extract the archive again") from error


register(
    Dataset(
        "tiny_imagenet",
        "110,000 colour images 64x64 of 200 classes",
        f"{FOLDER}/, extracted from its .zip",
        read_tiny_imagenet,
    )
)
