"""Finished batches of a job of drawing, kept until the whole is written: the job can go on."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastscore import regular
from fastscore.training import checkpoint, files

JOB = "job.json"


class Parts:
    """The folder of one job.

    It is made with the first finished batch: a job without one leaves nothing. Several processes
    may share it: each batch is a file of its own, and the folder appears whole.

    Args:
        folder: where the batches are kept.
        job: everything that the samples depend on, by name, of whatever JSON takes.

    Raises:
        ValueError: the folder holds batches of another job; what differs is named.
    """

    folder: Path
    job: dict[str, Any]

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.job = json.loads(json.dumps(job))
        # Apart from what other processes are about to claim.
        self._removed = f"{self.folder.name}.removed"
        files.sweep(self.folder.parent, self._removed)
        if self.folder.exists():
            self._check()

    def load(self, start: int, end: int) -> dict[str, Tensor] | None:
        """The batch of samples start to end; None where it is not finished."""
        file = self._file(start, end)
        return checkpoint.load(file) if file.exists() else None

    def save(self, start: int, end: int, batch: dict[str, Tensor]) -> None:
        """Keep a finished batch."""
        self._claim()
        checkpoint.save(self._file(start, end), batch)

    def remove(self) -> None:
        """Once the samples are written."""
        files.remove_folder(self.folder, self._removed)
        files.sweep(self.folder.parent, self.folder.name)

    def _file(self, start, end):
        return self.folder / f"{start}-{end}.safetensors"

    def _claim(self):
        if self.folder.exists():
            self._check()
            return

        try:
            files.write_folder(self.folder, {JOB: json.dumps(self.job).encode()})
        except OSError:
            # Another process was quicker.
            if not self.folder.exists():
                raise
            self._check()

    def _check(self):
        file = self.folder / JOB
        try:
            found = json.loads(regular.read(file)) if file.exists() else {}
        except (ValueError, RecursionError):
            raise ValueError(
                f"sample: {file} is damaged: it is no JSON; remove {self.folder} or write "
                "elsewhere."
            ) from None
        names = self.job.keys() | found.keys()
        differing = sorted(name for name in names if self.job.get(name) != found.get(name))
        if differing:
            listed = ", ".join(differing)
            raise ValueError(
                f"sample: {self.folder} holds batches of another job ({listed} differ); "
                "remove it or write elsewhere."
            )


def digest_of(*tensors: Tensor) -> str:
    """SHA-256 of shapes, dtypes and bytes."""
    total = hashlib.sha256()
    for t in tensors:
        t = t.detach().cpu().contiguous()
        total.update(f"{t.dtype}{tuple(t.shape)}".encode())
        total.update(t.flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def digest_of_network(net: nn.Module) -> str:
    """SHA-256 of the names and values of a network's tensors."""
    state = net.state_dict()
    return hashlib.sha256(f"{list(state)}{digest_of(*state.values())}".encode()).hexdigest()
