"""The networks of `fastscore train`: what they take from the data, and what they are told."""

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


def resolved(config: TrainConfig, data: Source, whole: Source | None = None) -> TrainConfig:
    """The options of a new run with everything that follows from its training data.

    whole: with what is held out, which may have a class that no other sample has.

    Raises:
        ValueError: labels that are asked for are not there, or more than are asked for; the network
            does not fit the data.
    """
    values = {name: getattr(config, name) for name in config.given}
    network = values.setdefault("network", config.network or network_for(data.shape))
    if config.task == "score":
        found = {"mlp": _of_mlp, "ncsn": _of_ncsn, "unet": _of_unet}[network](config, data)
        values = found | _told(config, network, whole or data) | values
    config = TrainConfig(**values)
    if network == "unet" and not config.attention:
        _check_sight(config, max(data.shape[1:]))
    return config


def _told(config, network, data):
    """What the network is told beside x and σ: classes, or contexts, or nothing.

    Raises:
        ValueError: what is asked for is not there.
    """
    contexts = _contexts(data)
    classes = config.classes
    if contexts and classes:
        raise ValueError("train: give either classes or context; the data have both.")
    if network == "unet" and classes is None:
        classes = 0 if contexts or data.labels is None else int(data.labels.max()) + 1
    if classes:
        _check_classes(config, data)
    if not classes and not contexts and config.label_drop != 0.1:
        raise ValueError(
            "train: label_drop belongs to network unet on images with labels, or to contexts."
        )
    return {"classes": classes or 0, "context": contexts}


def _contexts(data):
    """The length of the contexts of `contexts.attached`."""
    labels = data.labels
    return labels.shape[1] if labels is not None and labels.dim() == 2 else 0


def _check_classes(config, data):
    if data.labels is None:
        raise ValueError(f"train: classes needs labels; {config.data} has none.")
    least = int(data.labels.max()) + 1
    if config.classes and config.classes < least:
        raise ValueError(
            f"train: classes must be at least {least}, for the labels of {config.data}; "
            f"got {config.classes}."
        )


def network_for(shape: tuple[int, ...]) -> str:
    """The network for samples of this shape, unless it is given."""
    return "unet" if len(shape) == 3 and max(shape[1:]) >= 16 else "mlp"


def _of_mlp(config, data):
    dim = math.prod(data.shape)
    # What is narrower than the data cannot be the noise in all their directions.
    values: dict[str, Any] = {"width": max(256, -(-dim // 64) * 64)}
    if len(data.shape) == 3:
        return values
    x = data.read(_places(len(data), 2000))
    std = _moments(data)[1]
    # Technique 1 of NCSNv2, and four levels for one of NCSN's (γ = 100^(1/9)): with these the
    # variance that annealed Langevin dynamics gives a Gaussian is 7 % too large, and not 38 %.
    widest, narrowest = schedules.max_pairwise_distance(x), 0.01 * std
    levels = 1 + math.ceil(math.log(widest / narrowest) * 36 / math.log(100))
    values |= {"sigma_max": _rounded(widest), "sigma_min": _rounded(narrowest)}
    return values | {"levels": max(16, levels)}


def _largest_noise(data, std):
    """8 standard deviations of all values; or twice that of whole images along the direction in
    which they differ most, where it is more.

    Photographs differ most in how bright they are as a whole. Noise that does not hide it leaves
    samples as bright as the start, which knows nothing of the data.
    """
    x = data.read(_places(len(data), 1000)).flatten(1).double()
    x = x - x.mean(0)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    spread = math.sqrt(float(torch.linalg.eigvalsh(gram)[-1]) / len(x))
    return 2 * spread if spread > 8 * std else 8 * std


def _of_ncsn(config, data):
    return {}


def _of_unet(config, data):
    _check_images(config, data.shape)
    mean, std = _moments(data)
    side = max(data.shape[1:])
    levels = 2 + max(0, math.floor(math.log2(side / 40)) + 1)
    values = {
        "data_mean": mean,
        "data_std": std,
        # They cover what takes an image apart and what nobody sees (docs/command_line.md).
        "sigma_max": _rounded(_largest_noise(data, std)),
        "sigma_min": _rounded(std / 25),
        "multipliers": (1, *[2] * (levels - 1)),
        "patch": 2 if side <= 128 else 4,
    }
    if torch.cuda.is_available():
        values |= {"width": 64, "blocks": 2, "patch": values["patch"] // 2}
        values |= {"batch_size": 128, "lr": 1e-3}
    return values


def sight(multipliers: tuple[int, ...], blocks: int, patch: int) -> int:
    """How many pixels a side of what one pixel of a UNet without attention sees, by its
    convolutions."""
    radius = 2 * patch   # the first and the last
    for level in range(len(multipliers)):
        scale = patch * 2**level
        radius += 2 * scale * (2 * blocks + 1)
        if level < len(multipliers) - 1:
            radius += 2 * scale   # on the way down and up
    return 2 * (radius + 4 * scale) + 1


def _check_sight(config, side):
    seen = sight(config.multipliers, config.blocks, config.patch)
    if seen < side:
        raise ValueError(
            f"train: a pixel of this unet sees {seen} pixels a side, fewer than the {side} of an "
            "image, so that it cannot know what noise as large as an image hides; give more "
            "multipliers, blocks, a larger patch, or attention."
        )


def _moments(data):
    """Mean and standard deviation of all values, of many samples from some spread over all."""
    x = data.read(_places(len(data), _LOOKED_AT)).double()
    std = float(x.std(correction=0))
    if not std > 0:
        raise ValueError("train: the data must differ; all their values are the same.")
    return _rounded(float(x.mean()), 6), _rounded(std, 6)


def _places(n, most):
    """Of so many of n samples, spread over all."""
    count = min(n, most)
    return torch.arange(count) * n // count


def _rounded(value, digits=4):
    """To what reads well in a config."""
    return float(f"{value:.{digits}g}")


def build(
    config: TrainConfig, shape: tuple[int, ...], num_classes: int | None = None
) -> tuple[nn.Module, Tensor]:
    """The network for samples of `shape`, (C, H, W) or (d,), and its ladder.

    num_classes: of a classifier.
    """
    sigmas = schedules.geometric(config.sigma_max, config.sigma_min, config.levels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return network(config, shape, sigmas, num_classes), sigmas


def network(
    config: TrainConfig, shape: tuple[int, ...], sigmas: Tensor, num_classes: int | None = None
) -> nn.Module:
    """The network of `build`, on the default device and from torch's generator."""
    if config.task == "classifier":
        return models.NoiseClassifier(math.prod(shape), num_classes, **_mlp(config, sigmas))
    if config.network == "mlp":
        told = {"context": config.context or None}
        return models.ScoreMLP(math.prod(shape), **_mlp(config, sigmas), **told)
    _check_images(config, shape)
    if config.network == "ncsn":
        return models.NCSN(shape[0], config.width, sigmas, image_size=shape[2])
    return _unet(config, shape[0])


def _check_images(config, shape):
    if len(shape) != 3:
        raise ValueError(
            f"train: network {config.network} is for images; samples of shape {tuple(shape)} need "
            "--network mlp."
        )


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
        context=config.context or None,
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
    """The network as a score of x and σ that is told the classes or the contexts of a batch, all
    but some.

    Which are dropped is a function of the seed, the step and the number of the sample in the whole
    batch: where uniforms of stream CONDITION = 10 are label_drop at most.

    Args:
        labels: int64 (B,), or contexts (B, C). first_sample: number of the first in the batch of
            all processes.
    """
    if not config.classes and not config.context:
        return net
    key = {"seed": config.seed, "step": step, "stream": CONDITION, "offset": first_sample}
    dropped = random.uniform(labels.shape[:1], device=labels.device, **key) <= config.label_drop
    told = {"context" if config.context else "label": labels, "dropped": dropped}

    def score(x, sigma):
        return net(x, sigma, **told)

    return score
