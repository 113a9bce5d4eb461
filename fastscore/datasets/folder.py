"""The pictures of a folder, decoded as they are wanted."""

import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from fastscore import images
from fastscore.datasets.source import Source
from fastscore.images import rules


class Folder(Source):
    """The pictures of a folder and its folders, in the order of their names.

    Args:
        skip_corrupt: files that may be left out, with a warning, because they cannot be read.
        workers: threads that decode; one for each processor, up to eight, unless given.
    """

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
        self._first = self._raw(self.files[0]).array.shape
        channels, *sides = self._first
        self.shape = (rules.channels_of(channels, self.reading, self.files[0]), *sides)
        self._sample(self.files[0])

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, indices):
        out = np.empty((len(indices), *self.shape), np.float32)

        def put(k, file):
            out[k] = self._sample(file)

        with ThreadPoolExecutor(self.workers) as pool:
            for _ in pool.map(put, range(len(out)), [self.files[i] for i in indices.tolist()]):
                pass
        return torch.from_numpy(out)

    def _sample(self, file):
        raw = self._raw(file)
        first = self.files[0], self._first
        images.check_alike(first, (file, raw.array.shape), self.reading, self.folder)
        self._check_white(raw.array)
        return rules.to_channels(rules.unit(raw, self.reading, file), self.reading, file)

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
        if dtype in self._bright or rules.tells_white(array.max(), dtype, self.reading):
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
