"""The pictures of a folder, decoded as they are wanted."""

import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastscore import images
from fastscore.datasets.source import Source
from fastscore.images import rules

_TOGETHER = 32   # pictures decoded by one task

def by_folder(files: list[Path], folder: Path) -> tuple[Tensor, tuple[str, ...]]:
    """Numbers of classes, int64 (N,), and their names: the folders that the files lie in.

    Raises:
        ValueError: a file lies in none.
    """
    names = []
    for file in files:
        name, *rest = file.relative_to(folder).parts
        if not rest:
            raise ValueError(f"{folder}: {name} lies in no folder, which would be its class.")
        names.append(name)
    known = sorted(set(names))
    number = {name: k for k, name in enumerate(known)}
    return torch.tensor([number[name] for name in names]), tuple(known)


class Folder(Source):
    """The pictures of a folder and its folders, in the order of their names.

    Args:
        skip_corrupt: files that may be left out, with a warning, because they cannot be read.
        workers: threads that decode; one for each processor, up to eight, unless given.
    """

    folder: Path
    reading: images.Reading
    files: list[Path]
    workers: int
    shape: tuple[int, ...]
    labels: Tensor | None
    classes: tuple[str, ...] | None

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        skip_corrupt: int = 0,
        workers: int | None = None,
    ) -> None:
        self.folder, self.reading = images.parse(source)
        self.files = images.pictures_of(self.folder)
        self.skip_corrupt = skip_corrupt
        self.workers = min(8, os.cpu_count() or 1) if workers is None else workers
        self._lock = threading.Lock()
        # Dtypes that are known to tell white.
        self._bright: set[np.dtype] = set()

        if skip_corrupt:
            self._leave_out()
        if self.reading.by_folder:
            self.labels, self.classes = by_folder(self.files, self.folder)
        self._first = self._raw(self.files[0]).array.shape
        self.shape = rules.shape_of(self._first, self.reading, self.files[0])
        self._samples(self.files[:1])

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, indices):
        out = np.empty((len(indices), *self.shape), np.float32)
        files = [self.files[i] for i in indices.tolist()]
        # A few pictures each: a task of one costs as much as a small picture.
        size = max(1, min(_TOGETHER, -(-len(files) // self.workers)))
        starts = range(0, len(files), size)

        def put(start):
            part = slice(start, start + size)
            out[part] = self._samples(files[part])

        if len(starts) <= 1 or self.workers == 1:
            for start in starts:
                put(start)
            return torch.from_numpy(out)
        with ThreadPoolExecutor(self.workers) as pool:
            for _ in pool.map(put, starts):
                pass
        return torch.from_numpy(out)

    def _samples(self, files):
        raws = [self._raw(file) for file in files]
        first = self.files[0], self._first
        for file, raw in zip(files, raws):
            images.check_alike(first, (file, raw.array.shape), self.reading, self.folder)
            self._check_white(raw.array)
        # At once, where they are alike.
        if self.reading.size is None and len({raw.array.dtype for raw in raws}) == 1 and all(
            raw.alpha is None for raw in raws
        ):
            raw = rules.Raw(np.stack([raw.array for raw in raws]))
            return rules.finished(raw, self.reading, files[0])
        return [rules.finished(raw, self.reading, file) for file, raw in zip(files, raws)]

    def _raw(self, file):
        try:
            return images.picture(file, self.reading)
        except images.Damaged:
            damaged = dict(self._damaged())
            if damaged:
                self._refuse(damaged)
            raise

    def _check_white(self, array):
        """One look at all pictures of a depth, as far as it takes: a single one may be dark."""
        dtype = array.dtype
        if dtype in self._bright:
            return
        if rules.tells_white(array.max(), dtype, self.reading):
            self._bright.add(dtype)
            return
        with self._lock:
            if dtype in self._bright:
                return
            top = 0
            for file in self.files:
                other = self._raw(file).array
                top = max(top, int(other.max())) if other.dtype == dtype else top
                if rules.tells_white(top, dtype, self.reading):
                    break
            rules.check_white(top, dtype, self.reading, self.folder)
            self._bright.add(dtype)

    def _leave_out(self):
        damaged = dict(self._damaged())
        if len(damaged) > self.skip_corrupt or len(damaged) == len(self.files):
            self._refuse(damaged)
        if damaged:
            warnings.warn(
                f"{self.folder}: {len(damaged)} of {len(self.files)} files cannot be read and are "
                f"left out: {', '.join(file.name for file in list(damaged)[:3])}"
                f"{', ...' if len(damaged) > 3 else ''}.",
                stacklevel=4,
            )
        self.files = [file for file in self.files if file not in damaged]

    def _damaged(self) -> Iterator[tuple[Any, str]]:
        """Files that cannot be read, and why."""

        def why(file):
            try:
                images.picture(file, self.reading)
            except images.Damaged as error:
                return str(error)
            return None

        with ThreadPoolExecutor(self.workers) as pool:
            for file, found in zip(self.files, pool.map(why, self.files)):
                if found is not None:
                    yield file, found

    def _refuse(self, damaged):
        first = next(iter(damaged.values())).rstrip(".")
        raise images.Damaged(
            f"{first}; {len(damaged)} of the {len(self.files)} files in {self.folder} cannot be "
            f"read (skip_corrupt={len(damaged)} leaves them out)."
        )

    def stamps(self) -> list[str]:
        return [self._stamp(file) for file in self.files]

    def _stamp(self, file):
        found = os.stat(file)
        name = os.path.relpath(file, self.folder)
        return f"{name} {found.st_size} {found.st_mtime_ns} {tuple(self.reading)}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())
