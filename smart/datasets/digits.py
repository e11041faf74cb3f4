"""The handwritten digits that come with scikit-learn: real images, and nothing to download."""

from __future__ import annotations

from pathlib import Path

import torch

from smart.datasets.base import NO_AUGMENTATION, Dataset, Splits, register


def read_digits(_: Path) -> Splits:
    """1,797 images 1x8x8 of 16 grey levels, without a split.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16).float().unsqueeze(1)
    return {"train": (images, torch.from_numpy(digits.target).long())}, [str(digit) for digit in range(10)]


register(Dataset("digits", "1,797 grey digits 8x8, inside scikit-learn", "", read_digits, NO_AUGMENTATION))
