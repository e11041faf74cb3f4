"""Image classification data as tensors: a data set by name, a folder of images, or an .npz file."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from smart.datasets import DATASETS
from smart.datasets.base import SPLITS
from smart.datasets.folder import read_folder
from smart.datasets.npz import read_npz


@dataclass
class ImageData:
    """Images and labels of three splits.

    Attributes:
        name: for reports.
        class_names: one per class; label i means class_names[i].
        train, val, test: pairs of images (N, C, H, W), float32 in [0, 1] or uint8, and labels (N,), int64. Bytes take a
            quarter of the memory; :func:`as_floats` makes floats of a batch of either.
        mean, std: C numbers each, of the training split as floats.

    Raises:
        ValueError: a split that is empty, of another shape or dtype, or outside the ranges above.
    """

    name: str
    class_names: list[str]
    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    mean: list[float] = field(init=False)
    std: list[float] = field(init=False)

    def __post_init__(self) -> None:
        for split in SPLITS:
            images, labels = getattr(self, split)
            _check_split(f"{self.name}, {split} split", images, labels, len(self.class_names))
            if images.shape[1:] != self.train[0].shape[1:]:
                raise ValueError(
                    f"{self.name}: {split} images have shape {tuple(images.shape[1:])}, training images "
                    f"{tuple(self.train[0].shape[1:])}: all must be alike"
                )
        self.mean, spread = _statistics(self.train[0])
        # A channel of one constant value has no spread to divide by.
        self.std = [value or 1.0 for value in spread]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train[0].shape[1:]
        return channels, height, width

    def floats(self, split: str, count: int | None = None) -> Tensor:
        """The first ``count`` images of a split, or all, float32 (N, C, H, W) in [0, 1]."""
        return as_floats(getattr(self, split)[0][:count])


def as_floats(images: Tensor) -> Tensor:
    """Images as a network takes them: bytes divided by 255, floats as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def _statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of (N, C, H, W), as floats in [0, 1]."""
    if images.dtype != torch.uint8:
        channels = images.transpose(0, 1).flatten(1).double()
        return channels.mean(1).tolist(), channels.std(1, correction=0).tolist()
    # How often each value occurs says all, in a fraction of the memory that the values take as doubles.
    counts = torch.zeros(images.shape[1], 256, dtype=torch.float64)
    for part in images.split(1024):
        for row, channel in zip(counts, part.transpose(0, 1), strict=True):
            row += torch.bincount(channel.flatten(), minlength=256)
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = counts / counts.sum(1, keepdim=True)
    mean = shares @ values
    spread = (shares * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.tolist(), spread.tolist()


def _check_split(what: str, images: Tensor, labels: Tensor, classes: int) -> None:
    if images.dim() != 4 or images.dtype not in (torch.float32, torch.uint8) or labels.dtype != torch.int64:
        raise ValueError(
            f"{what}: images have dtype {images.dtype} and shape {tuple(images.shape)}, labels {labels.dtype}: "
            "give float32 or uint8 (N, C, H, W) and int64 (N,)"
        )
    if not len(images) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{what}: {len(images)} images and {tuple(labels.shape)} labels: give one label per image, one at least"
        )
    if images.dtype != torch.uint8 and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"{what}: pixel values outside [0, 1] or NaN: give bytes as uint8, normalise inside the model")
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"{what}: labels from {labels.min()} to {labels.max()}: with {classes} classes give 0 to {classes - 1}"
        )


def load_data(
    source: str | Path,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
    image_size: int | tuple[int, int] | None = None,
    data_root: str | Path = "data",
) -> ImageData:
    """Loads data by name or from a path.

    Splits that the source does not have are drawn from its training images, class by class, by ``seed`` alone.

    Args:
        source: the name of a data set, such as ``"digits"`` or ``"cifar10"`` (:data:`smart.datasets.DATASETS` has all);
            a folder ``train/<class>/*.png`` with, if there are, ``val`` and ``test`` beside ``train``; or an .npz file
            with ``images`` (N, H, W), (N, H, W, C) or (N, C, H, W), bytes or floats in [0, 1], and integer ``labels``
            (N,), with, if there are, ``val_images``, ``val_labels``, ``test_images``, ``test_labels``.
        val_fraction, test_fraction: of all training images, in (0, 1), where a split is drawn.
        image_size: for a folder, resize to this side or (H, W); needed when sizes differ.
        data_root: the folder that holds the published files of data sets; a name finds its own there.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: the data is empty, of mixed sizes, unreadable, or labelled out of range.
    """
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 < fraction < 1:
            raise ValueError(f"{name} is {fraction}: it must lie in (0, 1)")
    path = Path(source)
    if str(source) in DATASETS:
        splits, class_names = DATASETS[str(source)].read(Path(data_root))
    elif path.is_dir():
        splits, class_names = read_folder(path, image_size)
    elif path.suffix == ".npz" and path.is_file():
        splits, class_names = read_npz(path)
    else:
        close = difflib.get_close_matches(path.name.lower(), DATASETS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise FileNotFoundError(
            f"there is no data {str(source)!r}: {hint}give one of {', '.join(DATASETS)}, a folder with train/<class>/ "
            "images, or an .npz file"
        )
    name = str(source) if str(source) in DATASETS else path.resolve().name
    _check_split(f"{name}, train split", *splits["train"], len(class_names))
    generator = torch.Generator().manual_seed(seed)
    total = len(splits["train"][0])
    for split, fraction in (("test", test_fraction), ("val", val_fraction)):
        if split not in splits:
            # The fraction is of all training images, also when a part of them has gone into the other split.
            share = fraction * total / len(splits["train"][0])
            splits["train"], splits[split] = stratified_split(*splits["train"], share, generator)
    return ImageData(name, class_names, **splits)


def stratified_split(
    images: Tensor, labels: Tensor, fraction: float, generator: torch.Generator
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Splits off ``fraction`` of each class, at least one image of it; returns (rest, split off), in the given order.

    Raises:
        ValueError: a class too small to have an image on both sides.
    """
    away = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        rows = torch.nonzero(labels == label).flatten()
        count = max(1, round(fraction * len(rows)))
        if count >= len(rows):
            raise ValueError(
                f"class {label} has {len(rows)} images: too few to hold {fraction:.2f} of them out; "
                "add images, or give val and test splits"
            )
        away[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return (images[~away], labels[~away]), (images[away], labels[away])


def batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    generator: torch.Generator | None = None,
    crop_padding: int = 0,
    flip: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled, augmented batches; a last, incomplete one is left out unless it is the only one.

    All is done on the device that holds the images, but for the draws: the same generator gives the same batches on
    every device. Images given as bytes become floats in [0, 1] batch by batch.

    Args:
        images, labels: (N, C, H, W), uint8 or float, and (N,).
        generator: of the order and the augmentation, on the CPU; default: torch's global random state.
        crop_padding: pad by so many zeros on each side and crop at random, that is, shift by up to so many pixels.
        flip: mirror every other image, at random.
    """
    order = torch.randperm(len(images), generator=generator).to(images.device)
    for start in range(0, max(1, len(order) - batch_size + 1), batch_size):
        rows = order[start : start + batch_size]
        yield as_floats(augment(images[rows], generator, crop_padding, flip)), labels[rows]


def augment(images: Tensor, generator: torch.Generator | None, crop_padding: int, flip: bool) -> Tensor:
    """Shifts and mirrors each image (N, C, H, W) of a batch on its own; arguments as for :func:`batches`."""
    count, _, height, width = images.shape
    if crop_padding:
        padded = F.pad(images, [crop_padding] * 4)
        corner = torch.randint(2 * crop_padding + 1, (2, count, 1), generator=generator).to(images.device)
        rows = corner[0] + torch.arange(height, device=images.device)
        columns = corner[1] + torch.arange(width, device=images.device)
        sample = torch.arange(count, device=images.device)[:, None, None]
        images = padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
    if flip:
        mirrored = (torch.rand(count, generator=generator) < 0.5).to(images.device)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    return images
