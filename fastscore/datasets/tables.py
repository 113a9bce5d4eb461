"""Tables of numbers, .csv and .parquet: standardised columns, and the way back to their units.

What a file does not say is said behind its name, `flowers.csv:label=species:without=id`:

| words | say |
| --- | --- |
| label=NAME | the column of the classes, which is not among the samples' |
| without=NAME | a column that is left out; any number of times |

A .csv is separated by commas; its first line is a header unless all of it is numbers, and columns
without a name have their number, from 1. Classes that are whole numbers from 0 are themselves;
others are numbered in the order of their names.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastscore.datasets import parquet, values
from fastscore.datasets.source import Source
from fastscore.images import check_regular
from fastscore.messages import shown

SUFFIXES = (".csv", ".parquet")


class Units(NamedTuple):
    """The columns of a table, their mean and their standard deviation: x_c = (raw_c - μ_c) / σ_c.

    mean, deviation: float64 (d,).
    """

    columns: tuple[str, ...]
    mean: Tensor
    deviation: Tensor

    def to_units(self, x: Tensor) -> Tensor:
        """Samples (N, d) in the units of the table: float64."""
        return x.cpu().double() * self.deviation + self.mean

    def from_units(self, raw: Tensor) -> Tensor:
        """Rows of the table (N, d), standardised: float32."""
        return ((raw.double() - self.mean) / self.deviation).float()


class Table(Source):
    """The rows of a table, standardised by the mean and deviation of some of them.

    Attributes:
        units: of the columns; `to_units` is the way back.
    """

    shape: tuple[int, ...]
    samples: Tensor

    in_memory = True

    def __init__(
        self,
        path: Path,
        raw: Tensor,
        units: Units,
        labels: Tensor | None,
        classes: tuple[str, ...] | None,
    ) -> None:
        self.path = path
        self.table = raw
        self.units = units
        self.labels = labels
        self.classes = classes
        self.shape = tuple(raw.shape[1:])
        self.samples = units.from_units(raw)

    def __len__(self) -> int:
        return len(self.table)

    def _read(self, indices):
        return self.samples[indices]

    def raw(self, indices: Tensor) -> Tensor:
        """Rows in the units of the table, float64: they do not depend on the standardisation."""
        return self.table[self._checked(indices)]

    def fitted(self, rows: Tensor) -> "Table":
        """The same table, standardised by these rows.

        Raises:
            ValueError: a column is the same in all of them.
        """
        return self.scaled(_units_of(self.units.columns, self.raw(rows), self.path))

    def scaled(self, units: Units) -> "Table":
        """The same table in other units, such as those of a run.

        Raises:
            ValueError: they are of other columns.
        """
        if units.columns != self.units.columns:
            raise ValueError(
                f"{self.path} must have the columns {list(units.columns)}; got "
                f"{list(self.units.columns)}."
            )
        return Table(self.path, self.table, units, self.labels, self.classes)


def _units_of(columns, raw, path):
    mean = raw.mean(0)
    deviation = (raw - mean).square().mean(0).sqrt()
    # What is left of a constant by rounding is none of its own.
    same = deviation <= 1e-12 * mean.abs()
    if bool(same.any()):
        names = [name for name, constant in zip(columns, same.tolist()) if constant]
        without = ":".join(f"without={name}" for name in names)
        raise ValueError(
            f"{path}: {', '.join(names)} {'is' if len(names) == 1 else 'are'} the same in every "
            f"row, which no deviation scales; leave it out: {path}:{without}."
        )
    return Units(tuple(columns), mean, deviation)


def is_table(source: object) -> bool:
    """Whether a name is that of a table."""
    return parse(source)[0].suffix.lower() in SUFFIXES


def parse(source: object) -> tuple[Path, str | None, tuple[str, ...]]:
    """The file, the column of the labels and those that are left out.

    >>> parse("x.csv:label=species:without=id")
    (PosixPath('x.csv'), 'species', ('id',))
    """
    path, label, without = str(source), None, []
    while True:
        rest, _, word = path.rpartition(":")
        if rest and word.startswith("without="):
            without.insert(0, word.removeprefix("without="))
        elif rest and word.startswith("label="):
            if label is not None:
                raise ValueError(f"{source} says two things about one, {word} among them.")
            label = word.removeprefix("label=")
        else:
            return Path(path), label, tuple(without)
        path = rest


def open_table(source: object) -> Table:
    """A table, standardised by all its rows.

    Raises:
        ValueError: it is no readable table of numbers; the sentence names line and column.
    """
    path, label, without = parse(source)
    check_regular(path)
    reader = parquet if path.suffix.lower() == ".parquet" else values
    found = reader.read(path, label, without)
    if not len(found.numbers):
        raise ValueError(f"{path} holds no rows of numbers.")
    raw = torch.from_numpy(found.numbers)
    labels, classes = (None, None) if label is None else _classes(found.labels, path, label)
    return Table(path, raw, _units_of(found.columns, raw, path), labels, classes)


def _classes(names, path, label):
    """Numbers of classes, and their names if they are not the numbers."""
    if all(name.isascii() and name.isdecimal() for name in names):
        numbers = np.array([min(int(name), 2**31) for name in names])
        if numbers.max() >= 2**24:
            raise ValueError(f"{path}: {label} must be classes below 2^24; got {numbers.max()}.")
        return torch.from_numpy(numbers), None

    known, numbers = np.unique(np.array(names, dtype=object), return_inverse=True)
    if len(known) == len(names) > 1:
        raise ValueError(
            f"{path}: {label} must be classes; each of its {len(names)} rows has one of its own, "
            f"such as {shown(known[0])}."
        )
    return torch.from_numpy(numbers.astype(np.int64)), tuple(map(str, known))
