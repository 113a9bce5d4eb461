"""Samples of a table, in its units, as files."""

import csv
import io
from pathlib import Path

import numpy as np
from torch import Tensor

from fastscore.datasets.tables import Units
from fastscore.training import files


def check(out: Path, path: Path | None, units: Units | None) -> None:
    """Refuse files that cannot hold samples of a run, before any is drawn.

    Raises:
        ValueError: out is a picture and the run is of a table, or the other way round.
    """
    if units is None and out.suffix == ".csv":
        raise ValueError(f"sample: a .csv is for rows of a table, and not for images; got {out}.")
    if units is not None and (out.suffix == ".png" or path is not None):
        raise ValueError(
            "sample: the run is of a table, whose samples are no pictures; name a .csv or .npz "
            f"(--out samples.csv); got {out if out.suffix == '.png' else path}."
        )


def write(out: Path, samples: Tensor, units: Units) -> None:
    """Write samples (N, d): a .csv with its header, or a .npz with `table` and `columns`."""
    table = units.to_units(samples).numpy()
    if out.suffix == ".npz":
        with files.replacing(out, table.nbytes) as file:
            np.savez(file, table=table, columns=np.array(units.columns))
        return

    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(units.columns)
    # As many digits as float32 has.
    rows.writerows([f"{value:.7g}" for value in row] for row in table.tolist())
    files.write_atomic(out, text.getvalue().encode())
