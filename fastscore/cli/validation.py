"""The loss of a run's held-out images while it trains, always under the same noise."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastscore import datasets, likelihood
from fastscore.cli.config import TrainConfig

MOST = 2048   # images at a time: a hundredth of what is trained on until the next
_OTHER = 1_000_003   # added to the seed: noise that no step of the training has


class Validation:
    """Of an averaged network, by noise level.

    Each held-out image has one level, so that all levels have the same number but for one; where
    there are fewer images than levels, they are taken again.

    Args:
        objective: called as `fit.objective`.
        held_out: the images.
        dim: what losses are divided by.
    """

    def __init__(
        self,
        objective: Callable[..., Tensor],
        config: TrainConfig,
        held_out: datasets.Source,
        sigmas: Tensor,
        dim: int,
    ) -> None:
        self.objective = objective
        self.config = copy.copy(config)
        self.config.seed = config.seed + _OTHER
        self.held_out = held_out
        self.sigmas = sigmas
        self.dim = dim

    @torch.no_grad()
    def record(self, net: nn.Module) -> dict[str, Any]:
        """The mean loss, and that of each level, as a record of metrics.jsonl has them."""
        levels = len(self.sigmas)
        total = min(MOST, max(len(self.held_out), levels))
        sums = torch.zeros(levels, dtype=torch.float64)
        counts = torch.zeros(levels, dtype=torch.float64)
        for first in range(0, total, self.config.batch_size):
            numbers = torch.arange(first, min(first + self.config.batch_size, total))
            level = numbers % levels
            found = self._losses(net, numbers, level).cpu().double() / self.dim
            sums.index_add_(0, level, found)
            counts += torch.bincount(level, minlength=levels)

        means = [s / c if c else None for s, c in zip(sums.tolist(), counts.tolist())]
        return {"held_out": float(sums.sum() / counts.sum()), "held_out_levels": means}

    def _losses(self, net, numbers, level):
        rows = numbers % len(self.held_out)
        first = int(numbers[0])
        device = self.sigmas.device
        images = self.held_out.read(rows).to(device)
        if self.config.grey_levels:
            key = {"seed": self.config.seed, "first_sample": first}
            images = likelihood.dequantize(images, self.config.grey_levels, **key)
        labels = self.held_out.labels
        labels = None if labels is None else labels[rows].to(device)
        level = level.to(device)
        of_batch = (self.config, net, self.sigmas, images, labels, level, 0)
        return self.objective(*of_batch, first_sample=first)
