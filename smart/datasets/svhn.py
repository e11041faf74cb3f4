"""SVHN, cropped digits, from its MATLAB files (http://ufldl.stanford.edu/housenumbers)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smart.datasets.base import NO_AUGMENTATION, Dataset, Splits, register
from smart.datasets.files import check_md5, labels_of, missing

PAGE = "http://ufldl.stanford.edu/housenumbers"
COUNTS = {"train": 73_257, "test": 26_032}
MD5 = {"train": "e26dedcc434d2e4c54c9b2d4a06d8373", "test": "eb5a983be6a315427106f1b164d9cef3"}


def read_svhn(root: Path, counts: Mapping[str, int] = COUNTS) -> Splits:
    """The training and the test split, uint8; the additional images are left out.

    Raises:
        ImportError: scipy is not installed.
        FileNotFoundError: a file is missing.
        ValueError: it is damaged, holds something else, or labels out of range.
    """
    files = {split: root / f"{split}_32x32.mat" for split in counts}
    for file in files.values():
        if not file.is_file():
            raise missing("SVHN", root, [file.name], PAGE)
    for split, file in files.items():
        check_md5(file, "SVHN", MD5[split])
    return {split: _read_mat(file, counts[split]) for split, file in files.items()}, [str(i) for i in range(10)]


def _read_mat(file: Path, count: int) -> tuple[Tensor, Tensor]:
    try:
        from scipy.io import loadmat, whosmat
    except ImportError as error:
        raise ImportError("SVHN's MATLAB files are read with scipy: pip install scipy") from error
    expected = {"X": (32, 32, 3, count), "y": (count, 1)}
    try:
        # Sizes first: a file may claim any.
        shapes = {name: shape for name, shape, _ in whosmat(file)}
        if any(shapes.get(name) != shape for name, shape in expected.items()):
            raise ValueError(f"it holds {shapes}, where {expected} is expected")
        arrays = loadmat(file, variable_names=list(expected))
        if arrays["X"].dtype != np.uint8 or arrays["X"].shape != expected["X"] or arrays["y"].dtype.kind not in "uif":
            raise ValueError(f"its images are {arrays['X'].dtype}, its labels {arrays['y'].dtype}")
    except Exception as error:  # scipy raises whatever damage leads to: TypeError, KeyError, zlib.error, ...
        raise ValueError(f"{file} is no whole SVHN file ({error}): get it again from {PAGE}") from error
    images = np.ascontiguousarray(arrays["X"].transpose(3, 2, 0, 1))
    # The digit 0 has the label 10.
    labels = labels_of(arrays["y"].ravel(), str(file), 1, 10)
    return torch.from_numpy(images), (labels + 1) % 10


register(
    Dataset(
        "svhn",
        "99,289 colour digits 32x32",
        "train_32x32.mat and test_32x32.mat",
        read_svhn,
        NO_AUGMENTATION,
    )
)
