"""Files whose bytes are there to be read: no pipe that waits for a writer, no device without an
end, and no more than the memory holds."""

import errno
import os
import stat
from os import PathLike
from typing import BinaryIO

from fastscore import memory

_HEADER = 1 << 24   # bytes; those of ten thousand tensors take one sixteenth of it

# A pipe would wait for its writer; Windows has none of that.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def opened(path: str | PathLike[str]) -> BinaryIO:
    """A regular file, open to be read.

    Raises:
        ValueError: it is something else.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, _FLAGS | getattr(os, "O_CLOEXEC", 0))
    try:
        # Of what is open, whatever the name stands for by now.
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path} is no regular file.")
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def size(file: BinaryIO) -> int:
    """Bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def read(path: str | PathLike[str], most: int | None = None) -> bytes:
    """The bytes of a regular file.

    Args:
        most: of its bytes; what the memory holds unless given.

    Raises:
        ValueError: it is something else, or larger.
        OSError: it cannot be read.
    """
    with opened(path) as file:
        found = size(file)
        if most is not None and found > most:
            raise ValueError(f"{path} must have at most {most} bytes; it has {found}.")
        memory.check(found, str(path))
        return file.read(found)


def check_header(data: bytes) -> None:
    """Refuse a safetensors file whose list of tensors is longer than the file, or than any
    network's: the package makes an object of each name.

    Raises:
        ValueError: it is.
    """
    declared = int.from_bytes(data[:8], "little")
    if declared > min(len(data), _HEADER):
        raise ValueError(
            f"it declares a header of {declared} bytes, where {len(data)} are in all and at most "
            f"{_HEADER} are taken"
        )
