"""Fashion-MNIST from its idx files, compressed or not (https://github.com/zalandoresearch/fashion-mnist)."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from smart.datasets.base import Dataset, Splits, register
from smart.datasets.files import check_md5, labels_of, missing

PAGE = "https://github.com/zalandoresearch/fashion-mnist"
# Where they may lie within the root: as they come, and where Debian and torchvision put them.
FOLDERS = ("", "fashion-mnist", "FashionMNIST/raw")
COUNTS = {"train": 60_000, "t10k": 10_000}
SPLITS = {"train": "train", "t10k": "test"}
# As published, and as Debian's package dataset-fashion-mnist holds them, without the names that gzip keeps.
MD5 = {
    "train-images-idx3-ubyte.gz": ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "cf8536b0aa1a6ac5fa3f23001093305c"),
    "train-labels-idx1-ubyte.gz": ("25c81989df183df01b3e8a0aad5dffbe", "10bea18fdb374794d4bb42e356e600c9"),
    "t10k-images-idx3-ubyte.gz": ("bef4ecab320f06d8554ea6380940ec79", "f78720b4224f21cce2f2ccf2d7a94c9a"),
    "t10k-labels-idx1-ubyte.gz": ("bb300cfdad3c16e7a12a480ee83cd310", "0d30e22e447f3c33dab9ed536400ac01"),
}
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
CLASSES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def read_fashion_mnist(root: Path, counts: Mapping[str, int] = COUNTS) -> Splits:
    """The training and the test split, uint8.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is truncated, damaged, of other sizes, or has labels out of range.
    """
    splits = {}
    for part, split in SPLITS.items():
        images = _read_idx(_find(root, f"{part}-images-idx3-ubyte"), (counts[part], 28, 28))
        file = _find(root, f"{part}-labels-idx1-ubyte")
        labels = labels_of(_read_idx(file, (counts[part],)), str(file), 0, len(CLASSES))
        splits[split] = (torch.from_numpy(images)[:, None], labels)
    return splits, list(CLASSES)


def _find(root: Path, name: str) -> Path:
    for folder in FOLDERS:
        for suffix in ("", ".gz"):
            if (root / folder / (name + suffix)).is_file():
                return root / folder / (name + suffix)
    raise missing("Fashion-MNIST", root, [*(f"{folder}/{name}" for folder in FOLDERS[1:]), f"{name}.gz"], PAGE)


def _read_idx(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """An array of bytes: two zeros, the type 8, the number of dimensions, their sizes as big-endian int32, the data."""
    if file.suffix == ".gz":
        check_md5(file, "Fashion-MNIST", *MD5[file.name])
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
    size = int(np.prod(shape))
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
            start = opened.read(len(header))
            # A byte more than there should be: reaching the end makes gzip compare its checksum.
            content = opened.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is truncated or damaged ({error}): get it again from {PAGE}") from error
    if start != header:
        raise ValueError(f"{file} does not begin as an idx file of {shape} bytes: get it again from {PAGE}")
    if len(content) != size:
        word = "more than" if len(content) > size else f"{len(content):,} bytes of"
        raise ValueError(f"{file} holds {word} the {size:,} bytes that its header tells of: get it again from {PAGE}")
    return np.frombuffer(bytearray(content), np.uint8).reshape(shape)


register(
    Dataset(
        "fashion_mnist",
        "70,000 grey images 28x28 of 10 classes",
        "train- and t10k-images-idx3-ubyte, and -labels-idx1-ubyte, each .gz or not",
        read_fashion_mnist,
    )
)
