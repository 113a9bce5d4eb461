"""Text of comma-separated numbers."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastscore import memory
from fastscore.messages import shown

_LONGEST = 1 << 20   # characters of a line
_WIDEST = 1 << 16
_LONGEST_NAME = 200
_ROWS = 4096   # parsed together


class Columns(NamedTuple):
    """What a table holds: names, float64 (N, d), and the words of the labels' column."""

    columns: list[str]
    numbers: np.ndarray
    labels: list[str]


def choose(
    names: list[str], label: str | None, without: tuple[str, ...], path: Path
) -> list[int]:
    """Places of the columns that make the samples.

    Raises:
        ValueError: two have one name, or a column that is named is not there.
    """
    seen = set()
    for name in names:
        if len(name) > _LONGEST_NAME:
            raise ValueError(
                f"{path}: names of columns must have at most {_LONGEST_NAME} characters; got "
                f"{shown(name)}."
            )
        if name in seen:
            raise ValueError(f"{path}: the names of columns must differ; {name!r} comes twice.")
        seen.add(name)
    for name in (*without, *([] if label is None else [label])):
        if name not in seen:
            raise ValueError(f"{path} has no column {name!r}; its columns are {shown(names)}.")
    left_out = {label, *without}
    kept = [i for i, name in enumerate(names) if name not in left_out]
    if not kept:
        raise ValueError(f"{path} has no columns besides those that are left out.")
    return kept


def read(path: Path, label: str | None, without: tuple[str, ...]) -> Columns:
    """The numbers of a .csv file, and the labels.

    Raises:
        ValueError: a row has other columns, a value is missing or no finite number, each by line
            and column; the text is not UTF-8.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            return _read(csv.reader(_lines(file, path)), path, label, without)
        except csv.Error as error:
            raise ValueError(f"{path} is not a readable .csv file ({error}).") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not a readable .csv file (it is not UTF-8).") from None


def _lines(file, path) -> Iterator[str]:
    number = 0
    while line := file.readline(_LONGEST):
        number += 1
        if len(line) == _LONGEST:
            raise ValueError(f"{path}, line {number}: it is longer than {_LONGEST} characters.")
        yield line


def _read(rows, path, label, without):
    first = next((row for row in rows if row), None)
    if first is None:
        raise ValueError(f"{path} is empty.")
    if len(first) > _WIDEST:
        raise ValueError(f"{path} must have at most {_WIDEST} columns; got {len(first)}.")
    header = any(_number(text) is None for text in first)
    names = [name.strip() if header else "" for name in first]
    names = [name or str(i) for i, name in enumerate(names, 1)]
    kept = choose(names, label, without, path)
    label_at = None if label is None else names.index(label)

    blocks, labels, block = [], [], []
    waiting = iter([]) if header else iter([(1, first)])
    for line, row in _chain(waiting, rows):
        if len(row) != len(names):
            way = ""
            if len(names) == 1 and len(first[0].split(";")) > 1:
                way = "; columns are separated by commas"
            raise ValueError(
                f"{path}, line {line}: it must have {len(names)} columns; got {len(row)}{way}."
            )
        block.append([_number_at(row[i], path, line, names[i]) for i in kept])
        if label_at is not None:
            labels.append(_label_at(row[label_at], path, line, label))
        if len(block) == _ROWS:
            blocks.append(np.array(block))
            block = []
            # They are put together in the end.
            held = blocks[0].nbytes * len(blocks)
            memory.check(2 * held, f"{path}: the table up to line {line}")

    if block:
        blocks.append(np.array(block))
    numbers = np.concatenate(blocks) if blocks else np.empty((0, len(kept)))
    return Columns([names[i] for i in kept], numbers, labels)


def _chain(first, rows):
    yield from first
    for row in rows:
        # Blank lines are none.
        if row:
            yield rows.line_num, row


def _number(text):
    """The number, or None; Python would read 1_000 as well."""
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def _number_at(text, path, line, name):
    value = _number(text)
    if value is not None and math.isfinite(value):
        return value
    where = f"{path}, line {line}, column {name}"
    if not text.strip():
        raise ValueError(f"{where}: a value is missing; leave the row out, or fill it in.")
    raise ValueError(f"{where}: it must be a finite number; got {shown(text)}.")


def _label_at(text, path, line, name):
    if not text.strip():
        raise ValueError(f"{path}, line {line}, column {name}: the label is missing.")
    return text.strip()
