"""Reading a foreign checkpoint: tensors and plain values, and nothing that runs.

Everything that a file declares is compared with what it has before anything is allocated, and only
then does torch.load(weights_only=True) read it.
"""

import io
import zipfile
from os import PathLike, fspath
from typing import Any, BinaryIO

import torch

from fastscore import memory, regular
from fastscore.models.pickles import NUMPY, Refused, Storage, scan
from fastscore.models.state_dicts import OP

_PICKLE = 1 << 24   # bytes of a pickle without its tensors; published ones have 400 kB
_DIRECTORY = 1 << 24   # bytes of a list of what is in a file
_ZIP = b"PK\x03\x04"
_ENDS, _LOCATES, _ENDS64 = 22, 20, 56   # bytes of what stands behind it
_MAGIC = 0x1950A86A20F9469CFC6C


class _Passed:
    """Stands for what no network is made of, such as the learning rate of an optimizer, which
    numpy's numbers are."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Instead of numpy's own functions, which are never called.
_PASSED = [(_Passed, name) for name in NUMPY]


def read(path: str | PathLike[str]) -> Any:
    """What torch.save wrote, or the tensors of a .safetensors file.

    Raises:
        ValueError: it cannot be read, declares what it does not have, or is more than tensors and
            plain values.
    """
    try:
        with _opened(path) as file:
            memory.check(regular.size(file), f"{OP}: {path}")
            return _read(file, path)
    except OSError as error:
        raise ValueError(f"{OP}: {path} cannot be read: {error.strerror or error}.") from None


def _opened(path):
    try:
        return regular.opened(path)
    except ValueError as error:
        raise ValueError(f"{OP}: {error}") from None


def _read(file, path):
    refused = f"{OP}: {path} is damaged, or no checkpoint of tensors alone"
    try:
        return _checked(file, fspath(path).endswith(".safetensors"))
    except Refused as reason:
        raise ValueError(f"{refused}: {reason}.") from None
    # Damaged files raise almost anything.
    except Exception:
        raise ValueError(f"{refused} (weights_only=True refuses it).") from None


def _checked(file, safe):
    if safe:
        from safetensors.torch import load

        data = file.read()
        try:
            regular.check_header(data)
        except ValueError as error:
            raise Refused(error) from None
        return load(data)

    start = file.read(len(_ZIP))
    file.seek(0)
    if start == _ZIP:
        _check_archive(file)
    else:
        _check_sequence(file)
    file.seek(0)
    with torch.serialization.safe_globals(_PASSED):
        return torch.load(file, map_location="cpu", weights_only=True)


def _check_archive(file: BinaryIO) -> None:
    """Of the zip file that torch.save writes: entries that are stored as they are, each once."""
    size = regular.size(file)
    _check_directory(file, size)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        packed = [e.filename for e in entries if e.compress_type or e.file_size != e.compress_size]
        if packed:
            raise Refused(f"its entry {packed[0][:80]} is compressed, which torch.save never does")
        if sum(e.file_size for e in entries) > size:
            raise Refused("its entries lie on one another")
        # torch.load finds them by names without case.
        lengths = {e.filename.lower(): e.file_size for e in entries}
        if len(lengths) != len(entries):
            raise Refused("it has two entries of one name")

        root = entries[0].filename.partition("/")[0] if entries else ""
        name = f"{root}/data.pkl"
        if lengths.get(name.lower(), _PICKLE + 1) > _PICKLE:
            raise Refused(f"it has no {name[:80]} of at most {_PICKLE} bytes")
        pickled = io.BytesIO(archive.read(name))

    def stored(storage: Storage) -> None:
        length = lengths.get(f"{root}/data/{storage.key}".lower())
        if length != storage.bytes:
            raise Refused(
                f"it declares a storage of {storage.bytes} bytes where {length or 'none'} are"
            )

    scan(pickled, stored)


def _check_directory(file, size):
    """That the list of entries ends the file, where every reader looks first, and is no book."""
    end = _bytes_at(file, size - _ENDS, _ENDS)
    if not end.startswith(b"PK\x05\x06") or end[20:] != b"\0\0":
        raise Refused("its list of entries is not at its end")
    length, start = _number(end, 12, 4), _number(end, 16, 4)
    behind = size - _ENDS

    # Of a file that may be beyond 4 GB, the same again in eight bytes each.
    locator = _bytes_at(file, behind - _LOCATES, _LOCATES)
    if locator.startswith(b"PK\x06\x07"):
        behind -= _LOCATES + _ENDS64
        wide = _bytes_at(file, behind, _ENDS64)
        if _number(locator, 8, 8) != behind or not wide.startswith(b"PK\x06\x06"):
            raise Refused("its list of entries is not at its end")
        length, start = _number(wide, 40, 8), _number(wide, 48, 8)
    if length > _DIRECTORY:
        raise Refused(f"its list of entries has {length} bytes, where {_DIRECTORY} are taken")
    if start + length != behind:
        raise Refused("its list of entries is not where it says")


def _bytes_at(file, start, count):
    file.seek(max(0, start))
    return file.read(count)


def _number(data, start, count):
    return int.from_bytes(data[start : start + count], "little")


def _check_sequence(file: BinaryIO) -> None:
    """Of what torch.save wrote before 1.6: a magic number, a version, the machine, the pickle, the
    names of the storages, and the storages."""
    size = regular.size(file)
    pickled = io.BytesIO(file.read(_PICKLE))
    storages: list[Storage] = []

    def none(storage: Storage) -> None:
        raise Refused("it names storages before its pickle")

    if scan(pickled, none) != _MAGIC:
        raise Refused("it is no file of torch.save")
    scan(pickled, none)
    scan(pickled, none)
    scan(pickled, storages.append)
    names = scan(pickled, none)
    if type(names) is not list or any(type(name) is not str for name in names):
        raise Refused("it does not list its storages")
    if sorted(names) != sorted(s.key for s in storages):
        raise Refused("its storages are not those that it lists")
    # Each behind its length.
    if pickled.tell() + sum(8 + s.bytes for s in storages) > size:
        declared = sum(s.bytes for s in storages)
        raise Refused(f"it declares storages of {declared} bytes and has {size} in all")


