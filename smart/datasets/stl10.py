"""STL-10 from its binary archive (https://cs.stanford.edu/~acoates/stl10); its unlabelled images are left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from smart.datasets.base import Dataset, Splits, register
from smart.datasets.files import Archive, class_lines, labels_of, read_members

ARCHIVE = Archive(
    "STL-10",
    "https://cs.stanford.edu/~acoates/stl10",
    "stl10_binary.tar.gz",
    "stl10_binary",
    md5="91f7769df0f17e558f3565bffb0c7dfb",
    member_md5={
        "train_X.bin": "918c2871b30a85fa023e0c44e0bee87f",
        "train_y.bin": "5a34089d4802c674881badbb80307741",
        "test_X.bin": "7f263ba9f9e0b06b93213547f721ac82",
        "test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
    },
)
COUNTS = {"train": 5_000, "test": 8_000}
CLASSES = 10
IMAGE = (3, 96, 96)


def read_stl10(root: Path, counts: Mapping[str, int] = COUNTS) -> Splits:
    """The labelled training images and the test split, uint8.

    Raises:
        FileNotFoundError, ValueError: as for :func:`smart.datasets.files.read_members`; labels out of range.
    """
    sizes: dict[str, int | None] = {"class_names.txt": None}
    for split, count in counts.items():
        sizes |= {f"{split}_X.bin": count * int(np.prod(IMAGE)), f"{split}_y.bin": count}
    content = read_members(root, ARCHIVE, sizes)
    splits = {}
    for split in counts:
        # Each channel is stored column by column.
        images = content.pop(f"{split}_X.bin").reshape(-1, *IMAGE).transpose(0, 1, 3, 2)
        labels = labels_of(content[f"{split}_y.bin"], f"STL-10's {split}_y.bin", 1, CLASSES)
        splits[split] = (torch.from_numpy(np.ascontiguousarray(images)), labels)
    return splits, class_lines(content["class_names.txt"], "STL-10's class_names.txt", CLASSES)


register(
    Dataset(
        "stl10",
        "13,000 colour images 96x96 of 10 classes",
        f"{ARCHIVE.file}, or {ARCHIVE.folder}/ from it",
        read_stl10,
    )
)
