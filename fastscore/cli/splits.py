"""Which images a run trains on and which it keeps apart.

They are written down in its folder, for the data may change while the run is there.
"""

import hashlib
import warnings
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from fastscore import datasets
from fastscore.cli.config import TrainConfig
from fastscore.cli.run_folder import CONFIG
from fastscore.training import checkpoint

# training and held_out: 128 bits of each image and its label, uint8 (n, 16).
FILE = "split.safetensors"


def part(
    config: TrainConfig, name: str, data: tuple[Tensor, Tensor | None] | None = None
) -> tuple[Tensor, Tensor | None]:
    """The images that a run trains on ("training") or keeps apart ("held_out"), and their labels.

    data: what `datasets.load(config.data)` returns, which is read unless given.
    """
    images, labels = datasets.load(config.data) if data is None else data
    chosen = dict(zip(("training", "held_out"), split(config, images, labels)))[name]
    return images[chosen], None if labels is None else labels[chosen]


def split(
    config: TrainConfig, images: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Indices (training, held out) into the images of a run.

    They are the images of its beginning, in their order, wherever they stand now; images that came
    later belong to neither, and a warning says so. Before a run begins, and for one that keeps no
    record, they are those of `datasets.split`.

    Raises:
        ValueError: an image of the run is no longer among the data.
    """
    path = Path(config.out) / FILE
    if not _is_kept(config):
        return datasets.split(len(images), config.held_out, seed=0)

    record = checkpoint.load(path)
    places = defaultdict(list)
    for place, digest in reversed(list(enumerate(digests(images, labels)))):
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
    keys = (bytes(row) for row in record.numpy())
    return [places[key].pop() if places.get(key) else None for key in keys]


def record(
    config: TrainConfig, images: Tensor, labels: Tensor | None = None
) -> dict[str, Tensor] | None:
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

    every = digests(images, labels)
    parts = zip(("training", "held_out"), split(config, images, labels))
    return {name: _table([every[i] for i in part.tolist()]) for name, part in parts}


def _is_kept(config):
    # A record without a config is of a run that was killed before it had begun.
    return all((Path(config.out) / name).exists() for name in (FILE, CONFIG))


def keep(folder: Path, rows: dict[str, Tensor] | None) -> None:
    """Write a `record`."""
    if rows is not None:
        checkpoint.save(folder / FILE, rows)


def _table(keys):
    return torch.tensor(list(b"".join(keys)), dtype=torch.uint8).view(-1, 16)


def digests(images: Tensor, labels: Tensor | None = None) -> list[bytes]:
    """128 bits of each image, its shape and its label."""
    array = images.detach().cpu().contiguous().numpy()
    ends = [b""] * len(array)
    if labels is not None:
        ends = [str(label).encode() for label in labels.tolist()]

    start = str(array.shape[1:]).encode()
    rows = (start + image.tobytes() + end for image, end in zip(array, ends))
    return [hashlib.blake2b(row, digest_size=16).digest() for row in rows]
