"""The records of a run: metrics.jsonl, a line every 100 steps with the loss of each noise level."""

import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastscore import regular
from fastscore.training import files, saves
from fastscore.training.ranks import Ranks

FILE = "metrics.jsonl"


class Metrics:
    """The mean loss at each noise level since the last record, divided by dim.

    Args:
        together: the processes whose losses it is of; what each of them has is kept apart, so that
            a run that goes on adds up in the same order.
        sums, counts, seconds: of a run that goes on.
    """

    sums: Tensor
    counts: Tensor
    begin: float

    def __init__(
        self,
        levels: int,
        dim: int,
        together: Ranks | None = None,
        sums: Tensor | None = None,
        counts: Tensor | None = None,
        seconds: Tensor | None = None,
    ) -> None:
        self.together = together or Ranks()
        self.sums, self.counts = (
            torch.zeros(levels) if t is None else self._own(t) for t in (sums, counts)
        )
        self.dim = dim
        self._waiting = []
        # Of the whole run, interruptions left out.
        self.begin = time.perf_counter() - (0 if seconds is None else float(seconds))

    def _own(self, t):
        """This process's part of what a save holds; the first has all of another number's."""
        t = t[None] if t.dim() == 1 else t
        if len(t) != self.together.size:
            t = torch.stack([t.sum(0), *[torch.zeros_like(t[0])] * (self.together.size - 1)])
        return t[self.together.rank].clone()

    def _rows(self):
        """(sums, counts) of each process."""
        self._look()
        return self.together.rows(self.sums), self.together.rows(self.counts)

    def state(self) -> dict[str, Tensor]:
        """What the next run needs to go on."""
        sums, counts = self._rows()
        if len(sums) == 1:
            sums, counts = sums[0], counts[0]
        seconds = torch.tensor(time.perf_counter() - self.begin, dtype=torch.float64)
        return {"sums": sums, "counts": counts, "seconds": seconds}

    def add(self, levels: Sequence[Tensor], values: Tensor) -> None:
        """Take in the losses of one step, and the level of each, by batches."""
        self._waiting.append((levels[0] if len(levels) == 1 else torch.cat(levels), values))
        if not values.is_cuda:
            self._look()

    def _look(self):
        """Add up what has come: at once on the CPU, else where the GPU is waited for anyway."""
        for level, values in self._waiting:
            level = level.cpu()
            self.sums.index_add_(0, level, values.cpu().to(self.sums.dtype) / self.dim)
            self.counts += torch.bincount(level, minlength=len(self.counts))
        self._waiting.clear()

    def record(self, step: int) -> dict[str, Any]:
        """A line of metrics.jsonl; the next one begins."""
        sums, counts = (rows.sum(0) for rows in self._rows())
        pairs = zip(sums.tolist(), counts.tolist())
        line = {
            "step": step,
            "loss": float(sums.sum() / counts.sum()),
            "levels": [total / count if count else None for total, count in pairs],
            "seconds": round(time.perf_counter() - self.begin, 2),
        }
        self.sums.zero_()
        self.counts.zero_()
        return line


def read(out: Path) -> list[dict[str, Any]]:
    """The saved lines; none where the file is missing.

    Raises:
        ValueError: they are not what was saved.
    """
    path = out / FILE
    if not path.exists():
        return []
    found = saves.of_run(out)
    data = found[0].log(FILE) if found else regular.read(path)
    try:
        return [json.loads(line) for line in data.decode().splitlines()]
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is damaged: it must hold a JSON object in each line.") from None


def add(out: Path, record: dict[str, Any]) -> None:
    """Append a line.

    Raises:
        ValueError: a value is not finite; nothing is written.
    """
    try:
        line = json.dumps(record, allow_nan=False)
    except ValueError:
        raise ValueError(
            f"train: the record of step {record['step']} must be finite, but the losses that it "
            "sums up, or those of the held-out images, are not."
        ) from None
    files.append(out / FILE, f"{line}\n".encode())


def forget_after_save(save: saves.Save) -> None:
    """Drop the lines of steps that were done after a save, and are done again.

    Raises:
        ValueError: the lines before are not what was saved.
    """
    if save.has_log(FILE) and not (save.folder.parent / FILE).exists():
        warnings.warn(
            f"the run in {save.folder.parent} has lost its {FILE}; records begin at step "
            f"{save.step}.",
            stacklevel=2,
        )
        return
    saves.forget_after(save, FILE)


def forget_after(step: int, out: Path) -> None:
    """The same for a run without such a save, by what each line says."""
    if not (out / FILE).exists():
        return
    # A line that a killed process began has no end.
    whole = regular.read(out / FILE).rpartition(b"\n")[0].decode(errors="replace")
    try:
        records = [json.loads(line) for line in whole.splitlines()]
        kept = [record for record in records if record["step"] <= step]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"{out / FILE} is damaged: it must hold a JSON object in each line."
        ) from None
    text = "".join(json.dumps(record) + "\n" for record in kept)
    files.write_atomic(out / FILE, text.encode())
