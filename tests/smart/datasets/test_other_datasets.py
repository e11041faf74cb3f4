"""STL-10, SVHN, Fashion-MNIST and Tiny-ImageNet from tiny files of the true formats."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import struct
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from smart.data import load_data, stratified_split
from smart.datasets import DATASETS
from smart.datasets.fashion_mnist import read_fashion_mnist
from smart.datasets.stl10 import read_stl10
from smart.datasets.svhn import read_svhn
from smart.datasets.tiny_imagenet import Counts, read_tiny_imagenet
from smart.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:.*is not the published file")
FEW = {"train": 3, "test": 2}


# ---- STL-10 ----


def stl10_files(label=10):
    """Pixel (row, column) of channel c of image i is 20 c + 10 i + row, but for a mark at row 2, column 5."""
    files = {"class_names.txt": b"\n".join(b"class%d" % i for i in range(10))}
    for split, count in FEW.items():
        images = np.empty((count, 3, 96, 96), np.uint8)
        for i in range(count):
            for c in range(3):
                images[i, c] = (20 * c + 10 * i + np.arange(96) % 5)[:, None]
        images[:, 1, 2, 5] = 255
        files[f"{split}_X.bin"] = images.transpose(0, 1, 3, 2).tobytes()  # column by column
        files[f"{split}_y.bin"] = bytes([1, label, 3][:count])
    return files


def write_stl10(root, packed, **options):
    files = stl10_files(**options)
    if not packed:
        (root / "stl10_binary").mkdir()
        for name, content in files.items():
            (root / "stl10_binary" / name).write_bytes(content)
        return
    with tarfile.open(root / "stl10_binary.tar.gz", "w:gz") as archive:
        for name, content in {**files, "unlabeled_X.bin": b"\0" * 5000}.items():
            member = tarfile.TarInfo(f"stl10_binary/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("packed", [True, False], ids=["archive", "folder"])
def test_stl10_is_read_column_by_column(packed, tmp_path):
    write_stl10(tmp_path, packed)
    splits, names = read_stl10(tmp_path, FEW)
    images, labels = splits["train"]
    assert labels.tolist() == [0, 9, 2] and names[0] == "class0"
    assert images.dtype == torch.uint8 and images.is_contiguous() and splits["test"][0].shape == (2, 3, 96, 96)
    assert images[1, 2, :5, 7].tolist() == [50, 51, 52, 53, 54]
    assert images[0, 1, 2, 5] == 255 and images[0, 1, 5, 2] != 255


def test_stl10_refuses_labels_out_of_range(tmp_path):
    write_stl10(tmp_path, False, label=11)
    with pytest.raises(ValueError, match=r"train_y\.bin: image 1 has label 11, outside 1 to 10"):
        read_stl10(tmp_path, FEW)


def test_stl10_tells_of_files_that_were_altered(tmp_path):
    write_stl10(tmp_path, False)
    with pytest.warns(UserWarning, match=r"STL-10's train_X\.bin is not the published file"):
        read_stl10(tmp_path, FEW)


# ---- SVHN ----


def write_svhn(root, changes=None, compressed=True):
    savemat = pytest.importorskip("scipy.io", reason="scipy is not installed").savemat
    for split, count in FEW.items():
        images = np.zeros((32, 32, 3, count), np.uint8)
        images[4, 9, 2], images[9, 4, 0] = 70 + np.arange(count), 30
        arrays = {"X": images, "y": np.array([[10], [1], [9]][:count], np.uint8)}
        savemat(root / f"{split}_32x32.mat", arrays | (changes or {}), do_compression=compressed)


@pytest.mark.parametrize("compressed", [True, False])
def test_svhn_calls_the_digit_0_class_0(compressed, tmp_path):
    write_svhn(tmp_path, compressed=compressed)
    splits, names = read_svhn(tmp_path, FEW)
    images, labels = splits["train"]
    assert labels.tolist() == [0, 1, 9] and labels.dtype == torch.int64 and names == [str(i) for i in range(10)]
    assert images.dtype == torch.uint8 and images.shape == (3, 3, 32, 32) and len(splits["test"][1]) == 2
    assert images[:, 2, 4, 9].tolist() == [70, 71, 72] and (images[:, 0, 9, 4] == 30).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y": np.array([[0], [1], [9]])}, "image 0 has label 0, outside 1 to 10"),
        ({"y": np.array([[1], [1.5], [9]])}, "image 1 has label 1.5"),
        ({"y": np.array([[1], [np.nan], [9]])}, "image 1 has label nan"),
        ({"y": np.array([[1], [2]])}, "where .* is expected"),
        ({"X": np.zeros((32, 32, 3, 9), np.uint8)}, r"\(32, 32, 3, 9\)"),
        ({"X": np.zeros((32, 32, 3, 3))}, "images are float64"),
        ({"X": "text"}, "is no whole SVHN file"),
    ],
)
def test_svhn_refuses_what_it_is_not(changes, words, tmp_path):
    write_svhn(tmp_path, changes)
    with pytest.raises(ValueError, match=words):
        read_svhn(tmp_path, FEW)


def test_svhn_refuses_damaged_files(tmp_path):
    write_svhn(tmp_path)
    file = tmp_path / "train_32x32.mat"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (whole[:-10], whole[:130], whole[:40], b"", b"MATLAB" * 100, bytes(flipped)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"train_32x32\.mat is no whole SVHN file \(.*get it again from http"):
            read_svhn(tmp_path, FEW)


def test_svhn_splits_as_published():
    """68,257 training and 5,000 validation images of its 73,257, from the numbers of its digits."""
    counts = (4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659)
    labels = torch.arange(10).repeat_interleave(torch.tensor(counts))
    images = torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8)
    rest, away = stratified_split(images, labels, 5000 / 73257, torch.Generator().manual_seed(0))
    assert (len(rest[1]), len(away[1])) == (68_257, 5_000)


# ---- Fashion-MNIST ----


def write_fashion(root, compressed=True, magic=2051, label=9, cut=0, more=b""):
    root.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 3), ("t10k", 2)):
        pixels = np.zeros((count, 28, 28), np.uint8)
        pixels[:, 3, 8] = 5 + np.arange(count)
        images = struct.pack(">iiii", magic, count, 28, 28) + pixels.tobytes()
        labels = struct.pack(">ii", 2049, count) + bytes([0, label, 4][:count])
        for name, content in (("images-idx3", images[: len(images) - cut] + more), ("labels-idx1", labels)):
            file = root / f"{part}-{name}-ubyte{'.gz' if compressed else ''}"
            file.write_bytes(gzip.compress(content) if compressed else content)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("folder", ["", "FashionMNIST/raw"])
def test_fashion_mnist(compressed, folder, tmp_path):
    write_fashion(tmp_path / folder, compressed)
    splits, names = read_fashion_mnist(tmp_path, {"train": 3, "t10k": 2})
    images, labels = splits["train"]
    assert images.shape == (3, 1, 28, 28) and images.dtype == torch.uint8 and images[:, 0, 3, 8].tolist() == [5, 6, 7]
    assert labels.tolist() == [0, 9, 4] and len(splits["test"][1]) == 2 and names[9] == "Ankle boot"


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"magic": 2049}, "does not begin as an idx file"),
        ({"label": 10}, "image 1 has label 10, outside 0 to 9"),
        ({"cut": 5}, "2,347 bytes of the 2,352"),
        ({"more": b"x"}, "more than the 2,352 bytes"),
    ],
)
def test_fashion_mnist_refuses_what_it_is_not(options, words, compressed, tmp_path):
    write_fashion(tmp_path, compressed, **options)
    with pytest.raises(ValueError, match=words):
        read_fashion_mnist(tmp_path, {"train": 3, "t10k": 2})


def test_fashion_mnist_knows_published_and_packaged_files(tmp_path, monkeypatch):
    write_fashion(tmp_path)
    digests = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in tmp_path.iterdir()}
    monkeypatch.setattr("smart.datasets.fashion_mnist.MD5", {name: ("other", md5) for name, md5 in digests.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_fashion_mnist(tmp_path, {"train": 3, "t10k": 2})
    monkeypatch.setattr("smart.datasets.fashion_mnist.MD5", dict.fromkeys(digests, ("published", "packaged")))
    with pytest.warns(UserWarning, match="train-images-idx3-ubyte.gz is not the published file .* published published"):
        read_fashion_mnist(tmp_path, {"train": 3, "t10k": 2})


def test_fashion_mnist_refuses_damaged_files(tmp_path):
    write_fashion(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # in gzip's own checksum
    for content in (whole[:-9], whole[:5], b"", bytes(flipped)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz .*get it again from https"):
            read_fashion_mnist(tmp_path, {"train": 3, "t10k": 2})


# ---- Tiny-ImageNet ----

TINY = Counts(classes=2, per_class=3, test=2, side=64)


def write_tiny(root, side=64, annotations="b.JPEG\tn02\t0\t0\t5\t5\na.JPEG\tn01\t0\t0\t5\t5\n", wnids="n01\nn02\n"):
    folder = root / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    for label, name in enumerate(("n01", "n02")):
        (folder / "train" / name / "images").mkdir(parents=True)
        for i in range(3):
            colour = (100 * label, 50, 200) if i else 90
            image = Image.new("RGB" if i else "L", (side, side), colour)
            image.save(folder / "train" / name / "images" / f"{name}_{i}.JPEG", quality=95)
    for name, value in (("a", 10), ("b", 240)):
        Image.new("RGB", (64, 64), (value,) * 3).save(folder / "val" / "images" / f"{name}.JPEG")
    (folder / "val" / "val_annotations.txt").write_text(annotations)
    (folder / "wnids.txt").write_text(wnids)
    (folder / "words.txt").write_text("n00\tentity\nn01\tgoldfish, Carassius auratus\n")
    return folder


def test_tiny_imagenet(tmp_path):
    write_tiny(tmp_path)
    splits, names = read_tiny_imagenet(tmp_path, TINY)
    assert names == ["goldfish", "n02"]
    images, labels = splits["train"]
    assert images.shape == (6, 3, 64, 64) and images.dtype == torch.uint8 and labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (images[0].int() - 90).abs().max() <= 2, "a grey image is grey in each channel"
    assert (images[4, :, 30, 30].int() - torch.tensor([100, 50, 200])).abs().max() <= 6
    # The validation images are the test split, in the order of their list.
    assert splits["test"][1].tolist() == [1, 0] and splits["test"][0][:, 0, 0, 0].tolist() == [240, 10]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"side": 32}, ValueError, "has 32x32 pixels, where 64x64"),
        ({"annotations": "a.JPEG\tn01\n"}, ValueError, "lists 1 images, where 2"),
        ({"annotations": "a.JPEG\tn09\nb.JPEG\tn01\n"}, ValueError, "line 1: .* names no image and class"),
        ({"annotations": "../../a.JPEG\tn01\nb.JPEG\tn01\n"}, ValueError, "names no image and class"),
        ({"annotations": "c.JPEG\tn01\nb.JPEG\tn01\n"}, FileNotFoundError, r"c\.JPEG is missing"),
        ({"wnids": "n01\n"}, ValueError, "does not list 2 classes"),
        ({"wnids": "n01\n../n02\n"}, ValueError, "does not list 2 classes"),
    ],
)
def test_tiny_imagenet_refuses_what_it_is_not(options, error, words, tmp_path):
    write_tiny(tmp_path, **options)
    with pytest.raises(error, match=words):
        read_tiny_imagenet(tmp_path, TINY)


def test_tiny_imagenet_refuses_missing_and_damaged_images(tmp_path):
    folder = write_tiny(tmp_path)
    image = folder / "train" / "n02" / "images" / "n02_1.JPEG"
    image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"n02_1\.JPEG cannot be read as an image"):
        read_tiny_imagenet(tmp_path, TINY)
    image.unlink()
    with pytest.raises(ValueError, match="holds 2 images, where 3 are expected"):
        read_tiny_imagenet(tmp_path, TINY)


def test_tiny_imagenet_says_that_it_is_still_packed(tmp_path):
    (tmp_path / "tiny-imagenet-200.zip").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="is packed: extract it there"):
        load_data("tiny_imagenet", data_root=tmp_path)


# ---- the table of them ----


def test_a_data_set_by_name_is_split_and_kept_as_bytes(tmp_path, monkeypatch):
    images = torch.arange(40, dtype=torch.uint8).reshape(40, 1, 1, 1).expand(40, 3, 4, 4).contiguous()
    splits = {"train": (images, torch.arange(40) % 2), "test": (images[:6], torch.arange(6) % 2)}
    known = dataclasses.replace(DATASETS["cifar10"], read=lambda root: (dict(splits), [str(root), "b"]))
    monkeypatch.setitem(DATASETS, "cifar10", known)
    data = load_data("cifar10", val_fraction=0.25, data_root="somewhere")
    assert (data.name, data.class_names) == ("cifar10", ["somewhere", "b"])
    assert [len(getattr(data, split)[1]) for split in ("train", "val", "test")] == [30, 10, 6]
    assert data.train[0].dtype == torch.uint8 and data.floats("test", 2).dtype == torch.float32
    assert data.floats("test")[5, 0, 0, 0] == pytest.approx(5 / 255)


def test_settings_of_training_suit_the_data():
    assert Settings.resolve({"data": "svhn"}).config.flip is False
    assert Settings.resolve({"data": "digits"}).config.crop_padding == 0
    assert Settings.resolve({"data": "cifar10"}).config.crop_padding == 4
    assert Settings.resolve({"data": "svhn", "flip": True, "crop_padding": 2}).config.crop_padding == 2
