"""Image classification data as tensors: scikit-learn's digits, a folder of images, or an .npz file."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SPLITS = ("train", "val", "test")


@dataclass
class ImageData:
    """Images and labels of three splits.

    Attributes:
        name: for reports.
        class_names: one per class; label i means class_names[i].
        train, val, test: pairs of images (N, C, H, W), float32 in [0, 1], and labels (N,), int64.
        mean, std: C numbers each, of the training split.

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
        channels = self.train[0].transpose(0, 1).flatten(1).double()
        self.mean = channels.mean(1).tolist()
        # A channel of one constant value has no spread to divide by.
        self.std = [value or 1.0 for value in channels.std(1, correction=0).tolist()]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train[0].shape[1:]
        return channels, height, width


def _check_split(what: str, images: Tensor, labels: Tensor, classes: int) -> None:
    if images.dim() != 4 or images.dtype != torch.float32 or labels.dtype != torch.int64:
        raise ValueError(
            f"{what}: images have dtype {images.dtype} and shape {tuple(images.shape)}, labels {labels.dtype}: "
            "give float32 (N, C, H, W) and int64 (N,)"
        )
    if not len(images) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{what}: {len(images)} images and {tuple(labels.shape)} labels: give one label per image, one at least"
        )
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"{what}: pixel values outside [0, 1] or NaN: divide bytes by 255, normalise inside the model")
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
) -> ImageData:
    """Loads data by name or from a path.

    Splits that the source does not have are drawn from its training images, class by class, by ``seed`` alone.

    Args:
        source: ``"digits"`` (1,797 images 1x8x8 inside scikit-learn, 16 grey levels); a folder
            ``train/<class>/*.png`` with, if there are, ``val`` and ``test`` beside ``train``; or an .npz file with
            ``images`` (N, H, W), (N, H, W, C) or (N, C, H, W), bytes or floats in [0, 1], and integer ``labels`` (N,),
            with, if there are, ``val_images``, ``val_labels``, ``test_images``, ``test_labels``.
        val_fraction, test_fraction: of all training images, in (0, 1), where a split is drawn.
        image_size: for a folder, resize to this side or (H, W); needed when sizes differ.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: the data is empty, of mixed sizes, unreadable, or labelled out of range.
    """
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 < fraction < 1:
            raise ValueError(f"{name} is {fraction}: it must lie in (0, 1)")
    path = Path(source)
    if str(source) == "digits":
        splits, class_names = _read_digits()
    elif path.is_dir():
        from smart.image_folder import read_folder

        splits, class_names = read_folder(path, image_size)
    elif path.suffix == ".npz" and path.is_file():
        splits, class_names = _read_npz(path)
    else:
        raise FileNotFoundError(
            f"there is no data {str(source)!r}: give 'digits', a folder with train/<class>/ images, or an .npz file"
        )
    name = str(source) if str(source) == "digits" else path.resolve().name
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


def _read_digits() -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16).float().unsqueeze(1)
    return {"train": (images, torch.from_numpy(digits.target).long())}, [str(digit) for digit in range(10)]


def _read_npz(path: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
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
        return torch.from_numpy(np.ascontiguousarray(array)).float() / 255
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{path}: images have dtype {array.dtype}: give uint8, or floats in [0, 1]")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _labels(path: Path, array: np.ndarray) -> Tensor:
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{path}: labels have dtype {array.dtype} and shape {array.shape}: give integers (N,)")
    return torch.from_numpy(array.astype(np.int64))


def batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    generator: torch.Generator | None = None,
    crop_padding: int = 0,
    flip: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled, augmented batches; a last, incomplete one is left out unless it is the only one.

    Args:
        images, labels: (N, C, H, W) and (N,).
        generator: of the order and the augmentation, on the CPU; default: torch's global random state.
        crop_padding: pad by so many zeros on each side and crop at random, that is, shift by up to so many pixels.
        flip: mirror every other image, at random.
    """
    order = torch.randperm(len(images), generator=generator).to(images.device)
    for start in range(0, max(1, len(order) - batch_size + 1), batch_size):
        rows = order[start : start + batch_size]
        yield augment(images[rows], generator, crop_padding, flip), labels[rows]


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
