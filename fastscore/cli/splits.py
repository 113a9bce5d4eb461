"""Which images a run trains on and which it keeps apart.

They are written down in its folder, for the data may change while the run is there. A file that has
its name, size and time of then counts as unchanged.
"""

import hashlib
import json
import math
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastscore import datasets, memory
from fastscore.cli import contexts
from fastscore.cli.config import TrainConfig
from fastscore.cli.run_folder import CONFIG
from fastscore.datasets import Source
from fastscore.datasets.augment import Cropped
from fastscore.datasets.tables import Units
from fastscore.training import checkpoint

# training and held_out: 128 bits of each image and its label, uint8 (n, 16). Where samples are read
# as they are wanted also stamps and digests: of all of them, so that few are read again. Of a table
# also its columns (JSON in UTF-8), and their mean and deviation, float64 (d,).
FILE = "split.safetensors"
_BLOCK = 1 << 24   # bytes read together


def source(config: TrainConfig) -> Source:
    """The data of a run, as they are now; held-out samples are among them.

    A table is in the units of the run: standardised by the rows that it trains on, or trained on
    when it began.
    """
    data = datasets.open(config.data, skip_corrupt=config.skip_corrupt)
    data = contexts.attached(data, config)
    if config.crop:
        return Cropped(data, config.crop)
    if data.units is None:
        return data
    kept = units(config.out) if _is_kept(config) else None
    return data.fitted(split(config, data)[0]) if kept is None else data.scaled(kept)


def units(folder: str | Path) -> Units | None:
    """The units of the table that a run is of; None where it is of images."""
    path = Path(folder) / FILE
    record = checkpoint.load(path) if path.exists() else {}
    if "columns" not in record:
        return None
    columns = json.loads(bytes(record["columns"].numpy()))
    return Units(tuple(columns), record["mean"], record["deviation"])


def part(
    config: TrainConfig, name: str, data: Source | tuple[Tensor, Tensor | None] | None = None
) -> tuple[Tensor, Tensor | None]:
    """The images that a run trains on ("training") or keeps apart ("held_out"), and their labels.

    data: what `source(config)` or `datasets.load(config.data)` returns, which is opened unless
    given.
    """
    data = source(config) if data is None else datasets.open(data)
    chosen = dict(zip(("training", "held_out"), split(config, data)))[name]
    memory.check(
        4 * len(chosen) * math.prod(data.shape), f"{config.data}: what is {name} of it, as a whole,"
    )
    return data.read(chosen), None if data.labels is None else data.labels[chosen]


def split(config: TrainConfig, data: Source | Tensor) -> tuple[Tensor, Tensor]:
    """Indices (training, held out) into the samples of a run.

    They are the images of its beginning, in their order, wherever they stand now; images that came
    later belong to neither, and a warning says so. Before a run begins, and for one that keeps no
    record, they are those of `datasets.split`.

    Raises:
        ValueError: an image of the run is no longer among the data.
    """
    data = datasets.open(data)
    path = Path(config.out) / FILE
    if not _is_kept(config):
        return datasets.split(len(data), config.held_out, seed=0)

    record = checkpoint.load(path)
    wanted = [record[name].numpy() for name in ("held_out", "training")]
    places = _places(digests(data, record), np.concatenate(wanted))
    lost = int((places < 0).sum())
    if lost:
        raise ValueError(
            f"{config.data} must still hold the images that the run in {config.out} began with; "
            f"{lost} of its {len(places)} are gone or changed."
        )
    new = len(data) - len(places)
    if new:
        warnings.warn(
            f"{config.data} has {new} images that the run in {config.out} did not begin with; "
            "they are neither trained on nor held out.",
            stacklevel=2,
        )
    held_out, training = torch.from_numpy(places).tensor_split([len(wanted[0])])
    return training, held_out


def _places(rows, wanted):
    """Where each of the wanted rows (m, 16) stands among rows (n, 16), or -1: int64 (m,).

    One that is wanted twice is found twice, if it is there twice. In arrays: a dict of a million
    rows takes hundreds of megabytes.
    """
    n, m = len(rows), len(wanted)
    first, last = np.ascontiguousarray(np.concatenate([rows, wanted])).view(np.uint64).T
    # Equal rows side by side, those that are there before those that are wanted.
    order = np.lexsort((last, first))
    differs = (first[order][1:] != first[order][:-1]) | (last[order][1:] != last[order][:-1])
    begins = np.concatenate([[0], 1 + np.flatnonzero(differs)])
    sizes = np.diff(begins, append=n + m)
    there = np.add.reduceat(order < n, begins) if n + m else begins

    # The k-th that is wanted is the k-th that is there.
    within = np.arange(n + m) - np.repeat(begins, sizes)
    begin, count = np.repeat(begins, sizes), np.repeat(there, sizes)
    k = within - count
    found = np.full(n + m, -1)
    has = (k >= 0) & (k < count)
    found[order[has]] = order[begin[has] + k[has]]
    return found[n:]


def record(config: TrainConfig, data: Source) -> dict[str, Tensor] | None:
    """What the folder of a run that begins is to hold as FILE; None where it holds it already."""
    if _is_kept(config):
        return None
    if config.resume and config.held_out:
        warnings.warn(
            f"the run in {config.out} has no record of the images that it held out; it goes on "
            f"with the {config.held_out} that the data give now, which are the same only if the "
            "data are.",
            stacklevel=2,
        )

    every = digests(data)
    parts = zip(("training", "held_out"), split(config, data))
    rows = {name: torch.from_numpy(every[part.numpy()]) for name, part in parts}
    if data.units is not None:
        columns, mean, deviation = data.units
        text = bytearray(json.dumps(columns).encode())
        rows |= {"columns": torch.frombuffer(text, dtype=torch.uint8)}
        rows |= {"mean": mean, "deviation": deviation}
    stamps = _stamps(data)
    if stamps is not None:
        rows |= {"stamps": torch.from_numpy(stamps), "digests": torch.from_numpy(every)}
    return rows


def _is_kept(config):
    # A record without a config is of a run that was killed before it had begun.
    return all((Path(config.out) / name).exists() for name in (FILE, CONFIG))


def keep(folder: Path, rows: dict[str, Tensor] | None) -> None:
    """Write a `record`."""
    if rows is not None:
        checkpoint.save(folder / FILE, rows)


def digests(data: Source, record: dict[str, Tensor] | None = None) -> np.ndarray:
    """128 bits of each sample, its shape and its label: uint8 (n, 16).

    record: of the run; samples whose files have the names, sizes and times of then are not read
    again.
    """
    found = np.zeros((len(data), 16), np.uint8)
    unread = np.arange(len(data))
    stamps = _stamps(data)
    if record is not None and stamps is not None and "stamps" in record:
        places = _places(record["stamps"].numpy(), stamps)
        before = record["digests"].numpy()
        if len(stamps) < len(data):
            # Of the one file.
            unread = unread[:0] if places[0] == 0 and len(before) == len(data) else unread
            found = before if not len(unread) else found
        else:
            found[places >= 0] = before[places[places >= 0]]
            unread = np.flatnonzero(places < 0)

    for rows in torch.from_numpy(unread).split(max(1, _BLOCK // (4 * math.prod(data.shape)))):
        found[rows.numpy()] = _read_digests(data, rows)
    return found


def _read_digests(data, rows):
    array = data.raw(rows).cpu().contiguous().numpy()
    ends = [b""] * len(array)
    if data.labels is not None:
        ends = [str(label).encode() for label in data.labels[rows].tolist()]

    start = str(array.shape[1:]).encode()
    return _table([start + image.tobytes() + end for image, end in zip(array, ends)])


def _stamps(data):
    """128 bits that tell a file, its size and time: of each sample, or of the one that holds all.

    None where reading is no matter.
    """
    stamps = None if data.in_memory else data.stamps()
    return None if stamps is None else _table([os.fsencode(stamp) for stamp in stamps])


def _table(things):
    digests = b"".join(hashlib.blake2b(thing, digest_size=16).digest() for thing in things)
    return np.frombuffer(digests, np.uint8).reshape(-1, 16).copy()
