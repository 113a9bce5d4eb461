"""Which images a run trains on and which it keeps apart.

They are written down in its folder, for the data may change while the run is there. A file that has
its name, size and time of then counts as unchanged.
"""

import hashlib
import math
import os
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastscore import datasets
from fastscore.cli.config import TrainConfig
from fastscore.cli.run_folder import CONFIG
from fastscore.datasets import Source
from fastscore.training import checkpoint

# training and held_out: 128 bits of each image and its label, uint8 (n, 16). Where samples are read
# as they are wanted also stamps and digests: of all of them, so that few are read again.
FILE = "split.safetensors"
_BLOCK = 1 << 24   # bytes read together


def source(config: TrainConfig) -> Source:
    """The data of a run, as they are now; held-out samples are among them."""
    return datasets.open(config.data, skip_corrupt=config.skip_corrupt)


def part(
    config: TrainConfig, name: str, data: Source | tuple[Tensor, Tensor | None] | None = None
) -> tuple[Tensor, Tensor | None]:
    """The images that a run trains on ("training") or keeps apart ("held_out"), and their labels.

    data: what `source(config)` or `datasets.load(config.data)` returns, which is opened unless
    given.
    """
    data = source(config) if data is None else datasets.open(data)
    chosen = dict(zip(("training", "held_out"), split(config, data)))[name]
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
    places = defaultdict(list)
    for place, digest in reversed(list(enumerate(digests(data, record)))):
        places[digest].append(place)

    found = {name: _places(places, record[name]) for name in ("held_out", "training")}
    lost = sum(place is None for part in found.values() for place in part)
    if lost:
        total = sum(map(len, found.values()))
        raise ValueError(
            f"{config.data} must still hold the images that the run in {config.out} began with; "
            f"{lost} of its {total} are gone or changed."
        )
    new = sum(map(len, places.values()))
    if new:
        warnings.warn(
            f"{config.data} has {new} images that the run in {config.out} did not begin with; "
            "they are neither trained on nor held out.",
            stacklevel=2,
        )
    training, held_out = (
        torch.tensor(found[name], dtype=torch.int64) for name in ("training", "held_out")
    )
    return training, held_out


def _places(places, record):
    """Where each recorded image stands, or None; one that was there twice is found twice."""
    return [places[key].pop() if places.get(key) else None for key in _keys(record)]


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
    rows = {name: _table([every[i] for i in part.tolist()]) for name, part in parts}
    stamps = _stamps(data)
    if stamps is not None:
        rows |= {"stamps": _table(stamps), "digests": _table(every)}
    return rows


def _is_kept(config):
    # A record without a config is of a run that was killed before it had begun.
    return all((Path(config.out) / name).exists() for name in (FILE, CONFIG))


def keep(folder: Path, rows: dict[str, Tensor] | None) -> None:
    """Write a `record`."""
    if rows is not None:
        checkpoint.save(folder / FILE, rows)


def _table(keys):
    return torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).copy()).view(-1, 16)


def _keys(table):
    return [bytes(row) for row in table.numpy()]


def digests(data: Source, record: dict[str, Tensor] | None = None) -> list[bytes]:
    """128 bits of each sample, its shape and its label.

    record: of the run; samples whose files have the names, sizes and times of then are not read
    again.
    """
    stamps, known = _stamps(data), {}
    if record is not None and stamps is not None and "stamps" in record:
        known = dict(zip(_keys(record["stamps"]), _keys(record["digests"])))

    found = [known.get(stamp) for stamp in stamps or [None] * len(data)]
    unread = torch.tensor([i for i, digest in enumerate(found) if digest is None])
    size = 4 * math.prod(data.shape)
    for rows in unread.long().split(max(1, _BLOCK // size)):
        for i, digest in zip(rows.tolist(), _read_digests(data, rows)):
            found[i] = digest
    return found


def _read_digests(data, rows):
    array = data.read(rows).cpu().contiguous().numpy()
    ends = [b""] * len(array)
    if data.labels is not None:
        ends = [str(label).encode() for label in data.labels[rows].tolist()]

    start = str(array.shape[1:]).encode()
    return [_digest(start + image.tobytes() + end) for image, end in zip(array, ends)]


def _stamps(data):
    """128 bits for each sample that tell its file, size and time.

    None where reading is no matter.
    """
    stamps = None if data.in_memory else data.stamps()
    if stamps is None:
        return None
    if len(stamps) == 1:
        stamps = [f"{i} {stamps[0]}" for i in range(len(data))]
    return [_digest(os.fsencode(stamp)) for stamp in stamps]


def _digest(data):
    return hashlib.blake2b(data, digest_size=16).digest()
