"""Samples that are read by their numbers, wherever they lie."""

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastscore.messages import shown


class Source:
    """N samples of one shape, read by their numbers.

    What `read` returns is a function of the numbers alone: it does not depend on what was read
    before, on the order, on threads or on the process.

    Attributes:
        shape: of a sample, (C, H, W) or (d,).
        labels: int64 (N,), or None.
        classes: the names of the labels' classes; None where they are numbers, or there are none.
        units: of a table, whose `to_units` takes samples (N, d) back to the units of its columns;
            None for images, which are in [0, 1], and for tensors.
        in_memory: whether the samples lie in memory, so that reading ahead gains nothing.
    """

    shape: tuple[int, ...]
    labels: Tensor | None = None
    units: Any = None
    classes: tuple[str, ...] | None = None
    in_memory: bool = False

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, indices: Tensor) -> Tensor:
        """The samples of these numbers: int64 (B,) -> float32 (B, *shape).

        Raises:
            ValueError: a number is not in 0 .. N - 1; a sample cannot be read.
        """
        return self._read(self._checked(indices))

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, Tensor]:
        """One sample, and its label if there are labels, as a DataLoader takes them."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"a sample's number must lie in 0..{len(self) - 1}; got {index}.")
        sample = self.read(torch.tensor([index]))[0]
        return sample if self.labels is None else (sample, self.labels[index])

    def _read(self, indices: Tensor) -> Tensor:
        raise NotImplementedError

    def _checked(self, indices):
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1:
            raise ValueError(
                f"read: indices must be an int64 tensor (B,); got {_outline(indices)}."
            )
        # On a GPU the device itself refuses: looking would wait for it.
        if indices.device.type == "cpu" and len(indices):
            low, high = map(int, indices.aminmax())
            if low < 0 or high >= len(self):
                wrong = low if low < 0 else high
                raise ValueError(f"read: indices must lie in 0..{len(self) - 1}; got {wrong}.")
        return indices

    def raw(self, indices: Tensor) -> Tensor:
        """The samples of these numbers as they are stored: what tells one from another."""
        return self.read(indices)

    def stamps(self) -> list[str] | None:
        """What tells that a sample's file has not been touched: its name, size and time.

        One entry for each sample, or a single one of the file that holds them all; None where there
        is no file.
        """
        return None

    @property
    def whole(self) -> "Source":
        """The same samples before they are cropped."""
        return self

    def subset(self, indices: Tensor) -> "Source":
        """The samples of these numbers, in this order, as a source."""
        return Subset(self, self._checked(indices))

    def to(self, device: torch.device | str) -> "Source":
        """The same source, its samples on the device if they lie in memory."""
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} samples of shape {tuple(self.shape)})"


class Tensors(Source):
    """Samples that lie in memory: float32 (N, *)."""

    shape: tuple[int, ...]

    in_memory = True

    def __init__(
        self,
        samples: Tensor,
        labels: Tensor | None = None,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        self.samples = samples
        self.labels = labels
        self.classes = classes
        self.shape = tuple(samples.shape[1:])

    def __len__(self) -> int:
        return len(self.samples)

    def _read(self, indices):
        return self.samples[indices]

    def to(self, device: torch.device | str) -> Source:
        return Tensors(self.samples.to(device), _to(self.labels, device), self.classes)


class Subset(Source):
    """A part of a source, in an order of its own."""

    shape: tuple[int, ...]
    labels: Tensor | None
    classes: tuple[str, ...] | None
    units: Any
    in_memory: bool

    def __init__(self, source: Source, indices: Tensor) -> None:
        self.source = source
        self.indices = indices
        self.shape = source.shape
        self.in_memory = source.in_memory
        self.units = source.units
        self.classes = source.classes
        self.labels = None if source.labels is None else source.labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def _read(self, indices):
        return self.source.read(self.indices[indices])

    def raw(self, indices: Tensor) -> Tensor:
        return self.source.raw(self.indices[indices])

    def stamps(self) -> list[str] | None:
        stamps = self.source.stamps()
        return stamps if stamps is None or len(stamps) == 1 else [
            stamps[i] for i in self.indices.tolist()
        ]

    @property
    def whole(self) -> Source:
        return Subset(self.source.whole, self.indices)

    def to(self, device: torch.device | str) -> Source:
        if not self.in_memory:
            return self
        # Only what is used goes there.
        return Tensors(self.source.read(self.indices), self.labels, self.classes).to(device)


def _to(labels, device):
    return None if labels is None else labels.to(device)


def _outline(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return shown(value)


def labels_of(labels: np.ndarray, n: int, name: object) -> Tensor:
    """Numbers of classes: whole, from 0, one for each sample; int64 (n,).

    Raises:
        ValueError: they are not.
    """
    whole = labels.dtype.kind in "biu" or (
        labels.dtype.kind == "f" and bool((labels == labels.round()).all())
    )
    if labels.shape != (n,) or not whole or (n and labels.min() < 0):
        raise ValueError(
            f"{name}: labels must be {n} whole numbers from 0, one for each image; got "
            f"{labels.dtype} {labels.shape}."
        )
    return torch.from_numpy(labels.astype(np.int64))
