"""Files that are there whole or not at all, whatever ends the process, and their digests."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:
    # Of Windows.
    fcntl = None

# The name of a file or folder that is not there yet, or no longer: .NAME.16 hex digits.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}")

# What the system says where there is no room.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# Stands in a file where its digest belongs while the digest is computed.
BLANK = "0" * 64
_SEAL = re.compile(rb"sha256\W{1,5}([0-9a-f]{64})")
_HEAD = 1 << 16   # bytes in which a file has its digest


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write beside the target, flush to disk, rename: a reader sees the old file or the new one.

    Raises:
        OSError: it could not be written; the old file, if any, is as it was.
    """
    with replacing(path, len(data)) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: str | Path, needed: int | None = None) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends well.

    needed: its bytes where they are known, for the message when the disk is full.
    """
    path = Path(path)
    beside = _beside(path)
    with named_where_full(path, needed):
        try:
            # With the permissions of any new file, which tempfile would narrow.
            with open(beside, "xb") as file:
                hold(file)
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        flush_folder(path.parent)


def write_folder(target: Path, contents: dict[str, bytes]) -> None:
    """Write a new folder of files: all of them are there, or it is not.

    Raises:
        OSError: it could not be written, or is there already.
    """
    beside = _beside(target)
    with named_where_full(target, sum(map(len, contents.values()))):
        try:
            beside.mkdir()
            for name, data in contents.items():
                with open(beside / name, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            flush_folder(beside)
            os.rename(beside, target)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        flush_folder(target.parent)


def append(path: Path, data: bytes) -> None:
    """Add to a file that only grows; where there is no room it is as long as before."""
    with named_where_full(path, len(data)), open(path, "ab", buffering=0) as file:
        length = file.tell()
        try:
            written = file.write(data)
            # What fits is written, and only the rest is refused.
            if written < len(data):
                file.write(data[written:])
        except OSError:
            file.truncate(length)
            raise


def remove_folder(folder: Path, name: str | None = None) -> None:
    """Remove a folder with what is in it: it is there whole, or gone.

    name: whose `sweep` removes the rest after a kill; the folder's unless given.
    """
    beside = _beside(folder.with_name(name or folder.name))
    os.rename(folder, beside)
    shutil.rmtree(beside)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what processes that were killed left in a folder (of the target `name` only).

    A file that a process writes now stays.
    """
    for path in list(folder.iterdir()):
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or name not in (None, found["name"]):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif not _is_held(path):
            path.unlink(missing_ok=True)


def hold(file: IO) -> bool:
    """Mark an open file as this process's, as long as it is open; False where it is another's."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks.
        return True
    return True


def _is_held(path):
    try:
        with open(path, "rb") as file:
            return not hold(file)
    except OSError:
        return False


def is_temporary(path: Path) -> bool:
    """Whether `sweep` would remove it."""
    return _TEMPORARY.fullmatch(path.name) is not None


def flush_folder(folder: Path) -> None:
    """Have the names in a folder on the disk: a rename is lost with the power until then."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no such thing.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def named_where_full(path: Path, needed: int | None) -> Iterator[None]:
    """Within: what the system refuses to write is told by name, with what was needed and free."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(path.parent).free
        wanted = "" if needed is None else f"it needs {size(needed)}, "
        told = OSError(
            f"{path} could not be written: {os.strerror(error.errno).lower()}; {wanted}"
            f"{size(free)} are free. What was saved before is whole."
        )
        told.errno = error.errno
        raise told from error


def size(count: int) -> str:
    """A number of bytes in words."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000


def _beside(path):
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def sealed(data: bytes) -> bytes:
    """Data that say "sha256" and BLANK, with their own SHA-256 in the place of BLANK."""
    start = data.index(BLANK.encode())
    digest = hashlib.sha256(data).hexdigest().encode()
    return b"".join([data[:start], digest, memoryview(data)[start + len(digest) :]])


def is_sealed(data: bytes) -> bool | None:
    """Whether data are what `sealed` returned; None where they carry no digest."""
    found = _SEAL.search(data[:_HEAD])
    if found is None:
        return None
    start, end = found.span(1)
    digest = hashlib.sha256(data[:start] + BLANK.encode())
    digest.update(memoryview(data)[end:])
    return digest.hexdigest().encode() == found[1]
