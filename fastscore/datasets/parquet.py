"""Tables in Parquet's format, by pyarrow."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastscore import images, memory
from fastscore.datasets.values import Columns, choose
from fastscore.messages import shown


def read(path: Path, label: str | None, without: tuple[str, ...]) -> Columns:
    """The numbers of a .parquet file, and the labels.

    Raises:
        ValueError: pyarrow is missing; the file is damaged; a value is missing or no finite number.
    """
    images.need("pyarrow", "pyarrow", "reading .parquet takes")
    import pyarrow.parquet

    with _readable(path):
        file = pyarrow.parquet.ParquetFile(path)
        names = list(file.schema_arrow.names)
    kept = choose(names, label, without, path)
    rows = file.metadata.num_rows
    groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
    # As pyarrow unpacks it, and as float64.
    needed = max(8 * rows * len(names), sum(group.total_byte_size for group in groups))
    memory.check(needed + 8 * rows * len(kept), f"{path}: its table of {rows} rows")

    with _readable(path):
        wanted = [names[i] for i in kept] + ([] if label is None else [label])
        table = file.read(columns=wanted)
    columns = [names[i] for i in kept]
    numbers = np.empty((table.num_rows, len(columns)))
    for k, name in enumerate(columns):
        numbers[:, k] = _numbers(table.column(name), path, name)
    return Columns(columns, numbers, [] if label is None else _words(table, path, label))


@contextlib.contextmanager
def _readable(path) -> Iterator[None]:
    try:
        yield
    # Whatever the reader raises on bytes that somebody else chose.
    except Exception as error:
        raise ValueError(
            f"{path} is not a readable .parquet file ({type(error).__name__})."
        ) from None


def _numbers(column, path, name):
    import pyarrow as pa

    _check_whole(column, path, name)
    kind = column.type
    numeric = pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    if not numeric:
        raise ValueError(
            f"{path}, column {name}: it must hold numbers; got {kind} (:without={name} leaves it "
            "out)."
        )
    found = np.asarray(column.to_numpy(), dtype=np.float64)
    wrong = np.flatnonzero(~np.isfinite(found))
    if len(wrong):
        raise ValueError(
            f"{path}, row {wrong[0] + 1}, column {name}: it must be a finite number; got "
            f"{found[wrong[0]]}."
        )
    return found


def _check_whole(column, path, name):
    if column.null_count:
        row = column.is_null().to_numpy().argmax()
        raise ValueError(
            f"{path}, row {row + 1}, column {name}: a value is missing; leave the row out, or fill "
            "it in."
        )


def _words(table, path, label):
    column = table.column(label)
    _check_whole(column, path, label)
    # Bytes that are no text are found here.
    with _readable(path):
        words = [str(value) for value in column.to_pylist()]
    if not all(words):
        raise ValueError(f"{path}, column {label}: a label is missing; got {shown('')}.")
    return words
