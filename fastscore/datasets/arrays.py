"""Arrays in .npy and .npz files, read row by row."""

import io
import math
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastscore import images, memory
from fastscore.datasets.source import Source
from fastscore.images import headers, rules
from fastscore.messages import shown

_BLOCK = 1 << 24   # bytes looked at together


class Stored(NamedTuple):
    """An array in a file: where its bytes begin, and what they are."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool
    stamp: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Rows of the array, (B, *).

        They are read, not mapped: a file that is cut meanwhile would end the process (SIGBUS), and
        what is mapped counts as memory.
        """
        out = np.empty((len(indices), *self.shape[1:]), self.dtype)
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        with open(self.path, "rb", buffering=0) as file:
            if stamp_of(self.path, os.fstat(file.fileno())) != self.stamp:
                raise ValueError(f"{self.path} was changed while it was read.")
            # Those that lie side by side are one read.
            runs = np.split(np.arange(len(out)), np.flatnonzero(np.diff(indices) != 1) + 1)
            for run in runs:
                part = memoryview(out[run[0] : run[-1] + 1].reshape(-1).view(np.uint8))
                _read_into(file, part, self.offset + int(indices[run[0]]) * size, self.path)
        return out


def _read_into(file, buffer, start, path):
    file.seek(start)
    while buffer:
        done = file.readinto(buffer)
        if not done:
            raise ValueError(f"{path} was cut while it was read.")
        buffer = buffer[done:]


def stamp_of(path: Path, found: os.stat_result) -> str:
    """A file's name, size and time."""
    return f"{path.name} {found.st_size} {found.st_mtime_ns}"


def stored_npy(path: Path) -> Stored:
    """The array of a .npy file; only its header is read.

    Raises:
        ValueError: it is none, or its header declares more than the file has.
    """
    header = headers.of_npy(path)
    return Stored(path, header.offset, *header[1:], stamp_of(path, os.stat(path)))


class Archive:
    """The arrays of a .npz file by name; none is read before its declared size is looked at.

    Raises:
        ValueError: it is no readable .npz file.
    """

    stamp: str
    members: dict[str, zipfile.ZipInfo]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamp = stamp_of(path, images.check_regular(path))
        try:
            with zipfile.ZipFile(path) as archive:
                self.members = {i.filename.removesuffix(".npy"): i for i in archive.infolist()}
        # Of bytes that somebody else chose.
        except Exception as error:
            raise self._unreadable(type(error).__name__) from None

    def _unreadable(self, why):
        return ValueError(f"{self.path} is not a readable .npz file of plain arrays ({why}).")

    def require(self, name: str) -> None:
        """Refuse an archive without this array."""
        if name not in self.members:
            raise ValueError(
                f"{self.path} must hold an array named {name}; got {shown(sorted(self.members))}."
            )

    def declared(self, name: str) -> Stored:
        """What the header of an array says, held against the archive's own word; offset 0."""
        member = self.members[name]
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(member) as file:
                head = file.read(headers.LONGEST)
        # Of bytes that somebody else chose.
        except Exception as error:
            raise self._unreadable(type(error).__name__) from None

        header = headers.parse(io.BytesIO(head), self.path, ".npz")
        stored = Stored(self.path, 0, *header[1:], self.stamp)
        held = member.file_size - header.offset
        if stored.nbytes != held:
            raise self._unreadable(f"{name} declares {stored.nbytes} bytes; it holds {held}")
        return stored

    def stored(self, name: str) -> Stored | None:
        """The array where it lies in the file; None if it is compressed."""
        member = self.members[name]
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            return None

        with open(self.path, "rb") as file:
            file.seek(member.header_offset)
            head = file.read(30)
            if len(head) < 30 or head[:4] != b"PK\3\4":
                raise self._unreadable("no member where one was said to be")
            begun = member.header_offset + 30 + sum(struct.unpack("<HH", head[26:]))
            self._check_sum(file, begun, member)
            file.seek(begun)
            header = headers.parse(file, self.path, ".npz")
        return Stored(self.path, begun + header.offset, *header[1:], self.stamp)

    def _check_sum(self, file, begun, member):
        file.seek(begun)
        left, found = member.file_size, 0
        while left:
            block = file.read(min(left, _BLOCK))
            if not block:
                raise self._unreadable("it is cut")
            found = zlib.crc32(block, found)
            left -= len(block)
        if found != member.CRC:
            raise self._unreadable("BadZipFile")

    def read(self, name: str) -> np.ndarray:
        """The array, in memory."""
        stored = self.declared(name)
        memory.check(stored.nbytes, f"{self.path}: its array {name}")
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                return archive[name]
        except Exception as error:
            raise self._unreadable(type(error).__name__) from None


class Array(Source):
    """Images in one array of a file, which is read as they are wanted."""

    reading: images.Reading
    shape: tuple[int, ...]

    def __init__(
        self, stored: Stored, source: str | os.PathLike[str], labels: Tensor | None = None
    ) -> None:
        path, self.reading = images.parse(source)
        images.check_single(path, self.reading)
        shape, dtype = stored.shape, stored.dtype
        rules.check_set(shape, f"{dtype} {shape}", path)
        first = rules.is_first(shape, dtype, 3, self.reading, path)
        image = shape[1:] if first else (*shape[3:], 1)[:1] + shape[1:3]
        self.stored = stored
        self.shape = rules.shape_of(image, self.reading, path)
        self.labels = labels
        self._check_white()

    def __len__(self) -> int:
        return self.stored.shape[0]

    def _check_white(self):
        """One look at all images, as far as it takes: the first ones may be dark."""
        path, dtype, top = self.stored.path, self.stored.dtype, 0
        if not rules.tells_white(top, dtype, self.reading):
            for part in blocks(len(self), self.stored.nbytes):
                top = max(top, int(self.stored.rows(part.numpy()).max()))
                if rules.tells_white(top, dtype, self.reading):
                    break
            rules.check_white(top, dtype, self.reading, path)

    def _read(self, indices):
        if not len(indices):
            return torch.empty((0, *self.shape))
        path = self.stored.path
        array = rules.channels_first(self.stored.rows(indices.numpy()), 3, self.reading, path)
        array = rules.finished(rules.Raw(array), self.reading, path)
        # With the strides of the whole array's samples: kernels follow them, and so does rounding.
        return torch.from_numpy(array)

    def stamps(self) -> list[str]:
        return [f"{self.stored.stamp} {tuple(self.reading)}"]


def blocks(n: int, nbytes: int) -> list[Tensor]:
    """Numbers 0 .. n - 1 of samples that take nbytes together, in parts of some 16 MiB."""
    return list(torch.arange(n).split(max(1, _BLOCK * n // max(nbytes, 1))))
