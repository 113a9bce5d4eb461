"""Data sets of other libraries: anything with a length and items by number."""

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastscore import images
from fastscore.datasets.source import Source, labels_of
from fastscore.images import rules
from fastscore.messages import shown

_IMAGES = ("image", "img", "images", "pixel_values", "x")
_LABELS = ("label", "labels", "y", "target")


class Mapped(Source):
    """The items of a map-style data set, one read at a time, as they are wanted.

    An item is a sample; a tuple that begins with one, and goes on with its label; or a dict of
    columns, as in Hugging Face's data sets. Samples are taken by the rules of `fastscore.images`:
    pictures of Pillow, arrays, tensors (channels first), and vectors as they are.

    Args:
        columns: names of the samples' and the labels' column (None: no labels), where items are
            dicts; the usual ones unless given.
    """

    shape: tuple[int, ...]
    labels: Tensor | None

    def __init__(self, dataset: Any, columns: tuple[str, str | None] | None = None) -> None:
        self.dataset = dataset
        self._lock = threading.Lock()
        if not len(self):
            raise ValueError(f"open: {type(dataset).__name__} holds no samples.")
        item = dataset[0]
        if isinstance(item, dict):
            if columns is None:
                columns = _columns(item, getattr(dataset, "features", None))
            self._keys = _known(columns, item)
        elif columns is not None:
            raise ValueError(f"open: columns are of items that are dicts; got {shown(item)}.")
        else:
            pair = isinstance(item, tuple | list)
            self._keys = (0 if pair else None, 1 if pair and len(item) > 1 else None)

        self.shape = self._sample(0, item).shape
        self._check_white()
        self.labels = self._read_labels()

    def __len__(self) -> int:
        return len(self.dataset)

    def _item(self, i):
        # Other people's data sets need not be fit for two threads.
        with self._lock:
            return self.dataset[i]

    def _read(self, indices):
        out = np.empty((len(indices), *self.shape), np.float32)
        for k, i in enumerate(indices.tolist()):
            out[k] = self._sample(i, self._item(i))
        return torch.from_numpy(out)

    def _raw(self, i, item):
        value = item if self._keys[0] is None else item[self._keys[0]]
        return _raw_of(value, f"item {i} of {type(self.dataset).__name__}")

    def _sample(self, i, item):
        name = f"item {i} of {type(self.dataset).__name__}"
        raw = self._raw(i, item)
        if raw.array.ndim == 1:
            out = raw.array.astype(np.float32)
            if not np.isfinite(out).all():
                raise ValueError(f"{name} must hold finite numbers; it holds NaN or infinity.")
        else:
            out = rules.unit(raw, images.Reading(), name)
        if out.shape != getattr(self, "shape", out.shape):
            raise ValueError(
                f"all samples must have one shape; item 0 has {self.shape}, {name} {out.shape}."
            )
        return out

    def _check_white(self):
        """One look at all items, as far as it takes: the first ones may be dark."""
        top, reading = 0, images.Reading()
        array = self._raw(0, self._item(0)).array
        if array.ndim == 1 or rules.tells_white(0, array.dtype, reading):
            return
        for i in range(len(self)):
            top = max(top, int(self._raw(i, self._item(i)).array.max()))
            if rules.tells_white(top, array.dtype, reading):
                break
        rules.check_white(top, array.dtype, reading, f"{type(self.dataset).__name__}")

    def _read_labels(self):
        key = self._keys[1]
        if key is None:
            return None
        name = type(self.dataset).__name__
        found = getattr(self.dataset, "targets", None) if key == 1 else None
        if found is None and hasattr(self.dataset, "features"):
            # A column of Hugging Face's: no picture is decoded for it.
            found = self.dataset[key]
        if found is None or len(found) != len(self):
            found = [self._item(i)[key] for i in range(len(self))]
        return labels_of(np.asarray([_plain(v) for v in found]), len(self), name)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())


def _columns(item, features):
    """The samples' column and the labels', by their types or by their names."""
    kinds = dict(features.items()) if hasattr(features, "items") else {}
    by_type = [
        [name for name, kind in kinds.items() if type(kind).__name__ == wanted and name in item]
        for wanted in ("Image", "ClassLabel")
    ]
    found = by_type[0] or [name for name in _IMAGES if name in item]
    if len(found) != 1:
        raise ValueError(
            f"open: the items have the columns {list(item)}; say which one holds the samples, and "
            'which one their labels or None: columns=("image", "label").'
        )
    labels = by_type[1] or [name for name in _LABELS if name in item]
    return found[0], labels[0] if len(labels) == 1 else None


def _known(columns, item):
    for name in columns:
        if name is not None and name not in item:
            raise ValueError(f"open: columns must be among {list(item)}; got {name!r}.")
    return tuple(columns)


def _raw_of(value, name):
    """A sample as it is stored: an image (C, H, W), or a vector (d,)."""
    if isinstance(value, Tensor):
        array = value.detach().cpu().numpy()
        reading = images.Reading(first=True)   # the custom of PyTorch
    elif isinstance(value, np.ndarray | list):
        array, reading = np.asarray(value), images.Reading()
    elif hasattr(value, "getexif"):
        return images.opened(value, name)
    else:
        raise ValueError(
            f"{name} must be a picture, an array or a tensor, a tuple that begins with one, or a "
            f"dict; got {shown(value)}."
        )

    if array.ndim == 1 and array.dtype.kind in "biuf" and array.size:
        return rules.Raw(array)
    return rules.Raw(rules.channels_first(array, 2, reading, name))


def _plain(value):
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
