"""CIFAR-10 and CIFAR-100 from their binary archives (https://www.cs.toronto.edu/~kriz/cifar.html); no pickles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from smart.datasets.base import Dataset, Splits, register
from smart.datasets.files import Archive, class_lines, labels_of, read_members

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
IMAGE = (3, 32, 32)


@dataclass(frozen=True)
class Cifar:
    """One of the two.

    Attributes:
        files: by split, the number of images in each file. A record is the labels, a byte each, and then the pixels.
        labels: bytes of labels before an image; the last is the fine one.
        names: the file that lists the classes.
    """

    archive: Archive
    files: Mapping[str, Mapping[str, int]]
    labels: int
    classes: int
    names: str


CIFAR10 = Cifar(
    Archive("CIFAR-10", PAGE, "cifar-10-binary.tar.gz", "cifar-10-batches-bin", md5="c32a1d4ab5d03f1284b67883e8d87530"),
    {"train": {f"data_batch_{i}.bin": 10_000 for i in range(1, 6)}, "test": {"test_batch.bin": 10_000}},
    labels=1,
    classes=10,
    names="batches.meta.txt",
)
CIFAR100 = Cifar(
    Archive("CIFAR-100", PAGE, "cifar-100-binary.tar.gz", "cifar-100-binary", md5="03b5dce01913d631647c71ecec9e9cb8"),
    {"train": {"train.bin": 50_000}, "test": {"test.bin": 10_000}},
    labels=2,
    classes=100,
    names="fine_label_names.txt",
)


def read_cifar(root: Path, cifar: Cifar) -> Splits:
    """The training and the test split, uint8.

    Raises:
        FileNotFoundError, ValueError: as for :func:`smart.datasets.files.read_members`; labels out of range.
    """
    record = cifar.labels + int(np.prod(IMAGE))
    sizes = {name: count * record for split in cifar.files.values() for name, count in split.items()}
    content = read_members(root, cifar.archive, {**sizes, cifar.names: None})
    splits = {}
    for split, files in cifar.files.items():
        images, labels = [], []
        for name in files:
            rows = content.pop(name).reshape(-1, record)
            labels.append(labels_of(rows[:, cifar.labels - 1], f"{cifar.archive.title}'s {name}", 0, cifar.classes))
            images.append(torch.from_numpy(rows[:, cifar.labels :].reshape(-1, *IMAGE)))
        splits[split] = (torch.cat(images), torch.cat(labels))
    return splits, class_lines(content[cifar.names], f"{cifar.archive.title}'s {cifar.names}", cifar.classes)


for _name, _cifar in (("cifar10", CIFAR10), ("cifar100", CIFAR100)):
    register(
        Dataset(
            _name,
            f"60,000 colour images 32x32 of {_cifar.classes} classes",
            f"{_cifar.archive.file}, or {_cifar.archive.folder}/ from it",
            partial(read_cifar, cifar=_cifar),
        )
    )
