"""Reads the files of published archives, in place or extracted, and checks that they are what was published.

Nothing is unpacked to disk, so no name inside an archive can lead anywhere. Sizes are compared before anything of that
size is read.
"""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

# More than any list of names takes, or the headers of a file in a tar archive.
TEXT_LIMIT = HEADER_LIMIT = 1 << 20


@dataclass(frozen=True)
class Archive:
    """An archive as it is published.

    Attributes:
        title: what it is called in messages.
        page: where it is found.
        file: its name, a tar file, compressed by gzip or not.
        folder: that it extracts to.
        md5: that was published for it.
        member_md5: that was published for files in it.
    """

    title: str
    page: str
    file: str
    folder: str
    md5: str | None = None
    member_md5: Mapping[str, str] = field(default_factory=dict)


def read_members(root: Path, archive: Archive, sizes: Mapping[str, int | None]) -> dict[str, np.ndarray]:
    """Files of an archive by name, each as uint8 (bytes,): from the folder it extracts to, else from itself.

    Args:
        root: the folder that holds either.
        sizes: of each file that is wanted, in bytes; None for a short text.

    Raises:
        FileNotFoundError: neither is there, or a file is missing in it.
        ValueError: a file of another size, or an archive that is truncated or damaged.
    """
    folder, packed = root / archive.folder, root / archive.file
    if folder.is_dir():
        found = {name: _read_file(folder / name, size) for name, size in sizes.items()}
    elif packed.is_file():
        found = _read_archive(packed, archive, sizes)
    else:
        raise missing(archive.title, root, [f"{archive.folder}/", archive.file], archive.page)
    for name, md5 in archive.member_md5.items():
        if name in found:
            _compare(f"{archive.title}'s {name}", hashlib.md5(found[name], usedforsecurity=False).hexdigest(), md5)
    return found


def missing(title: str, root: Path, looked_for: list[str], page: str) -> FileNotFoundError:
    """The error for a data set that is not there: what was looked for, and where to put it."""
    names = " or ".join(str(root / name) for name in looked_for)
    return FileNotFoundError(
        f"there is no {title} here: looked for {names}; get {looked_for[-1]} from {page} and put it into {root}, "
        "or say with data_root where it is"
    )


def _read_file(file: Path, size: int | None) -> np.ndarray:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: extract the archive again, or remove {file.parent}")
    with file.open("rb") as opened:
        return _read(opened, str(file), file.stat().st_size, size)


def _read_archive(packed: Path, archive: Archive, sizes: Mapping[str, int | None]) -> dict[str, np.ndarray]:
    if archive.md5 is not None and not archive.member_md5:
        check_md5(packed, archive.title, archive.md5)
    found: dict[str, np.ndarray] = {}
    try:
        # As a stream: a compressed archive cannot be searched without reading it several times.
        with _decompressed(packed) as stream, tarfile.open(fileobj=(metered := _Metered(stream)), mode="r|") as opened:
            for member in opened:
                metered.left = member.size + HEADER_LIMIT
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                if folder == archive.folder and name in sizes and member.isfile():
                    content = opened.extractfile(member)
                    assert content is not None
                    found[name] = _read(content, f"{name} in {packed}", member.size, sizes[name])
                if archive.member_md5 and found.keys() == sizes.keys():
                    break
            else:
                # Only at the end does gzip compare its checksum, which speaks for files that have none of their own.
                while stream.read(1 << 20):
                    pass
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{packed} is truncated or damaged ({error}): get it again from {archive.page}") from error
    if absent := sorted(sizes.keys() - found.keys()):
        raise FileNotFoundError(
            f"{packed} has no {archive.folder}/{absent[0]}: get {archive.file} again from {archive.page}"
        )
    return found


class _Metered:
    """A stream that gives no more bytes than are left.

    Headers of a tar archive may be of any size, are read whole, and compress well: without this one could fill all
    memory.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.left = HEADER_LIMIT

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self.left -= len(content)
        if self.left < 0:
            raise OSError(f"a header has more than {HEADER_LIMIT:,} bytes")
        return content


def _decompressed(packed: Path) -> BinaryIO:
    with packed.open("rb") as opened:
        compressed = opened.read(2) == b"\x1f\x8b"
    return gzip.open(packed) if compressed else packed.open("rb")


def _read(file: BinaryIO, what: str, actual: int, size: int | None) -> np.ndarray:
    if size is None and actual > TEXT_LIMIT:
        raise ValueError(f"{what} has {actual:,} bytes: a short list of names was expected, get the archive again")
    if size is not None and actual != size:
        raise ValueError(f"{what} has {actual:,} bytes, where {size:,} are expected: get the archive again")
    content = np.frombuffer(bytearray(file.read(actual)), np.uint8)
    if len(content) != actual:
        raise ValueError(f"{what} ends after {len(content):,} of {actual:,} bytes: get the archive again")
    return content


def check_md5(file: Path, title: str, *expected: str) -> None:
    """Warns where a file is not the published one: it may be repacked, or altered."""
    digest = hashlib.md5(usedforsecurity=False)
    for block in _blocks(file):
        digest.update(block)
    _compare(f"{title}'s {file}", digest.hexdigest(), *expected)


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            yield block


def _compare(what: str, actual: str, *expected: str) -> None:
    if actual not in expected:
        warnings.warn(
            f"{what} is not the published file (MD5 {actual}, published {expected[0]}): it was repacked or altered, so "
            "numbers measured on it may not compare with published ones",
            stacklevel=3,
        )


def class_lines(content: np.ndarray, what: str, count: int) -> list[str]:
    """The names of ``count`` classes, one a line.

    Raises:
        ValueError: another number of lines, or no text.
    """
    try:
        names = [line.strip() for line in content.tobytes().decode().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not text ({error}): get the archive again") from error
    if len(names) != count:
        raise ValueError(f"{what} names {len(names)} classes, where {count} are expected: get the archive again")
    return names


def labels_of(values: np.ndarray, what: str, first: int, classes: int) -> Tensor:
    """Labels (N,), int64 from 0, of values that count from ``first``.

    Raises:
        ValueError: a value outside its range.
    """
    wrong = np.flatnonzero(~((values >= first) & (values < first + classes) & (values % 1 == 0)))
    if len(wrong):
        raise ValueError(
            f"{what}: image {wrong[0]} has label {values[wrong[0]]}, outside {first} to {first + classes - 1}: the "
            "file is damaged, get it again"
        )
    return torch.from_numpy(values.astype(np.int64) - first)
