"""CIFAR's binary files, and what holds for every archive: missing, truncated, altered."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import tarfile
import tracemalloc
import warnings

import numpy as np
import pytest
import torch

from smart.data import load_data
from smart.datasets import DATASETS, files
from smart.datasets.cifar import CIFAR10, CIFAR100, read_cifar

NAMES = "\n".join(["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]) + "\n\n"
PER_FILE = 4


def small(cifar, md5=None):
    """The description of an archive with few images in each file."""
    counts = {split: dict.fromkeys(names, PER_FILE) for split, names in cifar.files.items()}
    return dataclasses.replace(cifar, files=counts, archive=dataclasses.replace(cifar.archive, md5=md5))


def contents(cifar, change=lambda name, content: content):
    """Files as published, with few images; the pixels of image i of file f are known."""
    made = {}
    for number, name in enumerate(name for split in cifar.files.values() for name in split):
        records = b""
        for i in range(PER_FILE):
            fine = (7 * number + i) % cifar.classes
            pixels = np.full((3, 32, 32), 10 * number + i, np.uint8)
            pixels[0, 0, 1], pixels[2, 31, 0] = 200, 100
            records += bytes([0] * (cifar.labels - 1) + [fine]) + pixels.tobytes()
        made[name] = change(name, records)
    made[cifar.names] = change(cifar.names, (NAMES if cifar is CIFAR10 else "x\n" * 100).encode())
    return {name: content for name, content in made.items() if content is not None}


def pack(root, cifar, change=lambda name, content: content, mode="w:gz"):
    file = root / cifar.archive.file
    with tarfile.open(file, mode) as archive:
        for name, content in contents(cifar, change).items():
            member = tarfile.TarInfo(f"{cifar.archive.folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def extract(root, cifar, **options):
    (root / cifar.archive.folder).mkdir(parents=True, exist_ok=True)
    for name, content in contents(cifar, **options).items():
        (root / cifar.archive.folder / name).write_bytes(content)


@pytest.mark.parametrize("cifar", [CIFAR10, CIFAR100], ids=["10", "100"])
@pytest.mark.parametrize("make", [pack, extract])
def test_images_and_labels_are_read_in_their_order(cifar, make, tmp_path):
    make(tmp_path, cifar)
    splits, names = read_cifar(tmp_path, small(cifar))
    assert len(names) == cifar.classes
    images, labels = splits["train"]
    count = PER_FILE * len(cifar.files["train"])
    assert images.shape == (count, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.tolist() == [(7 * (i // PER_FILE) + i % PER_FILE) % cifar.classes for i in range(count)]
    assert images[:, 1, 5, 5].tolist() == [10 * (i // PER_FILE) + i % PER_FILE for i in range(count)]
    # Red first, row by row.
    assert (images[:, 0, 0, 1] == 200).all() and (images[:, 2, 31, 0] == 100).all()
    assert len(splits["test"][0]) == PER_FILE and int(splits["test"][0][0, 1, 5, 5]) == 10 * len(cifar.files["train"])


def test_the_published_counts_make_the_usual_splits():
    for cifar in (CIFAR10, CIFAR100):
        assert [sum(files.values()) for files in cifar.files.values()] == [50_000, 10_000]


def test_it_is_loaded_by_name(tmp_path, monkeypatch):
    pack(tmp_path, CIFAR10)
    read = lambda root: read_cifar(root, small(CIFAR10))  # noqa: E731
    monkeypatch.setitem(DATASETS, "cifar10", dataclasses.replace(DATASETS["cifar10"], read=read))
    with pytest.raises(ValueError, match=r"class \d has 1 images: too few"):
        load_data("cifar10", data_root=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "stl10", "tiny_imagenet", "fashion_mnist"])
def test_missing_files_are_named_with_where_to_put_them(name, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_data(name, data_root=tmp_path)
    words = str(caught.value)
    assert "looked for" in words and str(tmp_path) in words and "http" in words and "data_root" in words
    assert "\n" not in words


def test_a_name_that_is_nearly_right():
    with pytest.raises(FileNotFoundError, match=r"no data 'cifar-10': did you mean 'cifar10'\? give one of "):
        load_data("cifar-10")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda n, c: c[:-1] if n == "data_batch_3.bin" else c, ValueError, "data_batch_3.bin .*12,291 bytes.*12,292"),
        (lambda n, c: c + c if n == "test_batch.bin" else c, ValueError, "test_batch.bin .*24,584 bytes"),
        (lambda n, c: None if n == "data_batch_5.bin" else c, FileNotFoundError, "data_batch_5.bin"),
        (lambda n, c: b"\x0a" + c[1:] if n == "data_batch_2.bin" else c, ValueError, "image 0 has label 10, outside"),
        (lambda n, c: c[20:] if n == "batches.meta.txt" else c, ValueError, "names 8 classes, where 10"),
        (lambda n, c: b"\xff\xfe" if n == "batches.meta.txt" else c, ValueError, "is not text"),
        (lambda n, c: c * 40_000 if n == "batches.meta.txt" else c, ValueError, "a short list of names"),
    ],
    ids=["short", "long", "absent", "label", "names", "binary", "bomb"],
)
@pytest.mark.parametrize("make", [pack, extract])
def test_files_of_another_content_are_refused(make, change, error, words, tmp_path):
    make(tmp_path, CIFAR10, change=change)
    with pytest.raises(error, match=words):
        read_cifar(tmp_path, small(CIFAR10))


def test_a_truncated_or_damaged_archive_is_refused(tmp_path):
    # Noise does not compress: so every byte of the archive matters.
    noise = np.random.default_rng(0).integers(0, 256, (PER_FILE, 3072), np.uint8)
    records = np.concatenate([np.zeros((PER_FILE, 1), np.uint8), noise], 1).tobytes()
    file = pack(tmp_path, CIFAR10, lambda name, content: records if name.endswith(".bin") else content)
    whole = file.read_bytes()
    read_cifar(tmp_path, small(CIFAR10))
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    for content in (whole[:-20], whole[: len(whole) // 2], whole[:10], b"", b"no archive at all", bytes(damaged)):
        file.write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError), match="again from https") as caught:
            read_cifar(tmp_path, small(CIFAR10))
        assert str(file) in str(caught.value)


def test_an_archive_that_is_not_the_published_one_is_told_of(tmp_path):
    pack(tmp_path, CIFAR10)
    with pytest.warns(UserWarning, match=f"is not the published file .*{CIFAR10.archive.md5}"):
        read_cifar(tmp_path, small(CIFAR10, CIFAR10.archive.md5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        published = hashlib.md5((tmp_path / CIFAR10.archive.file).read_bytes()).hexdigest()
        read_cifar(tmp_path, small(CIFAR10, published))


def test_names_in_an_archive_lead_nowhere(tmp_path):
    """Members elsewhere, links and doubles of other names are never followed, and nothing is written."""
    root = tmp_path / "root"
    root.mkdir()
    outside = tmp_path / "outside.bin"
    outside.write_bytes(b"\0" * PER_FILE * 3073)
    with tarfile.open(root / CIFAR10.archive.file, "w:gz") as archive:
        for name, content in contents(CIFAR10).items():
            for folder in ("../", "/", f"{CIFAR10.archive.folder}/../"):
                member = tarfile.TarInfo(f"{folder}{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            link = tarfile.TarInfo(f"{CIFAR10.archive.folder}/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, str(outside)
            archive.addfile(link)
    with pytest.raises(FileNotFoundError, match="has no cifar-10-batches-bin/"):
        read_cifar(root, small(CIFAR10))
    assert sorted(each.name for each in tmp_path.rglob("*")) == sorted(["root", "outside.bin", CIFAR10.archive.file])


def test_sizes_are_compared_before_reading(tmp_path, monkeypatch):
    """A file that claims to be huge is not read."""
    monkeypatch.setattr(files, "TEXT_LIMIT", 10)
    extract(tmp_path, CIFAR10)
    with pytest.raises(ValueError, match=r"batches.meta.txt has \d+ bytes: a short list"):
        read_cifar(tmp_path, small(CIFAR10))


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_a_header_that_would_fill_memory_is_refused(format, tmp_path):
    with tarfile.open(tmp_path / CIFAR10.archive.file, "w:gz", format=format) as archive:
        archive.addfile(tarfile.TarInfo("x" * (64 << 20)))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"damaged .a header has more than 1,048,576 bytes"):
        read_cifar(tmp_path, small(CIFAR10))
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
