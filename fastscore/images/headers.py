"""What arrays in files say about themselves, held against what is there before it is read."""

import io
import math
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from fastscore.images.pictures import check_regular

# An array's header is some hundred bytes; nothing longer is even read.
LONGEST = 1 << 16


class Header(NamedTuple):
    """Where an array begins, behind its header, and what it is."""

    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def parse(file: BinaryIO, path: Path, kind: str) -> Header:
    """The header of an array of numpy's format; its offset counts from where `file` stands.

    Raises:
        ValueError: it is none, or of an array of objects, which are not read.
    """
    head = io.BytesIO(file.read(LONGEST))
    try:
        version = np.lib.format.read_magic(head)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(head)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(head)
    # Whatever the parser raises on bytes that somebody else chose.
    except Exception as error:
        raise ValueError(
            f"{path} is not a readable {kind} file ({type(error).__name__})."
        ) from None

    if dtype.hasobject:
        raise ValueError(
            f"{path} is not a readable {kind} file of plain arrays (it holds objects)."
        )
    if any(n < 0 for n in shape):
        raise ValueError(f"{path} is not a readable {kind} file (its shape is {shape}).")
    return Header(head.tell(), dtype, shape, fortran)


def of_npy(path: Path) -> Header:
    """The header of a .npy file.

    Raises:
        ValueError: it is no regular file, or declares more than it holds.
    """
    size = check_regular(path).st_size
    with open(path, "rb") as file:
        header = parse(file, path, ".npy")
    held = size - header.offset
    if header.nbytes > held:
        raise ValueError(
            f"{path} is not a readable .npy file (its header declares {header.nbytes} bytes; it "
            f"holds {held})."
        )
    return header
