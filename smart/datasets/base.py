"""What a named data set is, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

SPLITS = ("train", "val", "test")
# By split, of which the source may lack the last two: images (N, C, H, W), uint8 or float32 in [0, 1], and labels (N,),
# int64; beside them the names of the classes.
Splits = tuple[dict[str, tuple[Tensor, Tensor]], list[str]]


@dataclass(frozen=True)
class Dataset:
    """A data set that is loaded by name.

    Attributes:
        about: what it holds, in a line.
        needs: the files that it is read from, as they are published; empty if it needs none.
        read: reads it from the folder that holds those files.
        training: settings of training that suit it better than the usual defaults.
    """

    name: str
    about: str
    needs: str
    read: Callable[[Path], Splits]
    training: Mapping[str, Any] = field(default_factory=dict)


DATASETS: dict[str, Dataset] = {}
# Digits must not be shifted out of a small image, nor mirrored into signs that do not exist.
NO_AUGMENTATION = {"crop_padding": 0, "flip": False}


def register(dataset: Dataset) -> None:
    """Makes a data set known by its name."""
    DATASETS[dataset.name] = dataset
