"""The networks of `fastscore train`: what they take from the data, and what they are told."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastscore import models, random, schedules
from fastscore.cli.config import TrainConfig
from fastscore.datasets import Source

CONDITION = 10   # the stream that drops labels
_LOOKED_AT = 10_000   # samples whose mean and standard deviation stand for all


def resolved(config: TrainConfig, data: Source) -> TrainConfig:
    """The options of a new run with everything that follows from its training data.

    Raises:
        ValueError: labels that are asked for are not there, or more than are asked for.
    """
    if config.task != "score" or config.network != "unet":
        return config
    values: dict[str, Any] = {"classes": _classes(config, data)}
    mean, std = _moments(data)
    values |= {"data_mean": mean, "data_std": std}
    # In units of the data, and to four digits, which read well in a config.
    for name, share in (("sigma_max", 8), ("sigma_min", 0.04)):
        values[name] = float(f"{share * std:.4g}")
    kept = {name: getattr(config, name) for name in values if getattr(config, name) is not None}
    return dataclasses.replace(config, **values | kept)


def _classes(config, data):
    """The number of classes that the labels have; 0 where there are no labels."""
    if data.labels is None:
        if config.classes or config.label_drop != 0.1:
            name = "classes" if config.classes else "label_drop"
            raise ValueError(f"train: {name} needs labels; {config.data} has none.")
        return 0
    least = int(data.labels.max()) + 1
    if config.classes and config.classes < least:
        raise ValueError(
            f"train: classes must be at least {least}, for the labels of {config.data}; "
            f"got {config.classes}."
        )
    return least


def _moments(data):
    """Mean and standard deviation of all values, of many samples from some spread over all."""
    n = min(len(data), _LOOKED_AT)
    x = data.read(torch.arange(n) * len(data) // n).double()
    std = float(x.std(correction=0))
    if not std > 0:
        raise ValueError("train: the data must differ; all their values are the same.")
    return float(f"{float(x.mean()):.6g}"), float(f"{std:.6g}")


def build(
    config: TrainConfig, shape: tuple[int, ...], num_classes: int | None = None
) -> tuple[nn.Module, Tensor]:
    """The network for samples of `shape`, (C, H, W) or (d,), and its ladder.

    num_classes: of a classifier.
    """
    sigmas = schedules.geometric(config.sigma_max, config.sigma_min, config.levels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.task == "classifier":
            return models.NoiseClassifier(math.prod(shape), num_classes, **_mlp(config, sigmas)), (
                sigmas
            )
        if config.network == "mlp":
            return models.ScoreMLP(math.prod(shape), **_mlp(config, sigmas)), sigmas
        if len(shape) != 3:
            raise ValueError(
                f"train: network {config.network} is for images; samples of shape "
                f"{tuple(shape)} need --network mlp."
            )
        if config.network == "ncsn":
            return models.NCSN(shape[0], config.width, sigmas, image_size=shape[2]), sigmas
        return _unet(config, shape[0]), sigmas


def _mlp(config, sigmas):
    return {"width": config.width, "depth": config.depth, "sigmas": sigmas}


def _unet(config, channels):
    return models.UNet(
        2,
        channels,
        config.width,
        multipliers=config.multipliers,
        blocks=config.blocks,
        attention=config.attention,
        patch=config.patch,
        num_classes=config.classes or None,
        data_mean=config.data_mean,
        data_std=config.data_std,
    )


def with_labels(
    config: TrainConfig,
    net: nn.Module,
    labels: Tensor | None,
    step: int,
    first_sample: int = 0,
) -> Callable[..., Tensor]:
    """The network as a score of x and σ that is told the classes of a batch, all but some.

    Which labels are dropped is a function of the seed, the step and the number of the sample in the
    whole batch: uniforms of stream CONDITION = 10 that are label_drop at most.

    Args:
        labels: int64 (B,). first_sample: number of the first in the batch of all processes.
    """
    if not config.classes:
        return net
    key = {"seed": config.seed, "step": step, "stream": CONDITION, "offset": first_sample}
    dropped = random.uniform(labels.shape, device=labels.device, **key) <= config.label_drop

    def score(x, sigma):
        return net(x, sigma, labels, dropped=dropped)

    return score
