"""The records of a run for TensorBoard, by `fastscore train --tensorboard`."""

import importlib.util
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastscore.cli import draw

FOLDER = "tensorboard"
SAMPLES = 16


def check() -> None:
    """Raise ValueError where the package is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "train: tensorboard needs the package tensorboard: pip install "
            "'fastscore[tensorboard]'."
        )


class Board:
    """Writes events into a folder of the run; what it shows is in metrics.jsonl, too, but for
    samples.

    Args:
        since: the step that the run goes on from; events of later ones are not shown.
    """

    def __init__(self, out: Path, sigmas: Tensor, shape: tuple[int, ...], since: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(out / FOLDER, purge_step=since + 1)
        self.sigmas = sigmas
        self.shape = shape
        self._next = 0

    def add(self, record: dict[str, Any]) -> None:
        """A record of metrics.jsonl."""
        for name in ("loss", "held_out"):
            if name in record:
                self.writer.add_scalar(name, record[name], record["step"])
        for name, values in (("level", "levels"), ("held_out_level", "held_out_levels")):
            for k, value in enumerate(record.get(values, [])):
                if value is not None:
                    self.writer.add_scalar(f"{name}/{k}", value, record["step"])
        self.writer.flush()

    def show(self, net: nn.Module, step: int) -> None:
        """Samples of an averaged network: of the first save, and of one that has twice the steps
        of the last that was shown, for they take a while."""
        images = len(self.shape) == 3 and self.shape[0] in (1, 3)
        if step < self._next or not images:
            return
        self._next = 2 * step
        drawn = draw.draw(draw.prepare(net, self.sigmas, self.shape, SAMPLES))
        self.writer.add_images("samples", drawn.samples.clamp(0, 1), step)
        self.writer.flush()

    def close(self) -> None:
        """Once the run ends."""
        self.writer.close()
