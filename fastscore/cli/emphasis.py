"""Which noise levels a run trains on how often, and how much each counts."""

import torch
from torch import Tensor

from fastscore import random
from fastscore.cli.config import TrainConfig
from fastscore.losses.noise_conditional import draw_labels

# Of ln(σ/d), d the standard deviation of the data.
_MEAN = -0.7
_SPREAD = 1.3
_FAR = 10   # d: two deviations more than the mean above, and a bit


def draw_levels(
    config: TrainConfig, sigmas: Tensor, n: int, *, step: int, first_sample: int = 0
) -> Tensor:
    """The noise level of each sample of a step, int64 (n,), from stream LEVEL.

    All alike where config.weighting is "even". With "edm" in `shares`: sample j of the B of a step
    has the level at quantile (j + u_j)/B, u uniform, so that each step sees levels of all sizes.

    Args:
        first_sample: number of the first in the whole batch of the step.
    """
    key = {"seed": config.seed, "step": step, "device": sigmas.device}
    if config.weighting == "even":
        return draw_labels(len(sigmas), n, first_sample=first_sample, **key)

    u = random.uniform((n,), stream=random.LEVEL, offset=first_sample, **key).double()
    place = torch.arange(first_sample, first_sample + n, device=u.device)
    quantile = (place + u) / config.batch_size
    ends = shares(config, sigmas).cumsum(0)
    # Rounding may leave the last end a little below 1.
    return torch.searchsorted(ends, quantile, right=True).clamp_(max=len(sigmas) - 1)


def shares(config: TrainConfig, sigmas: Tensor) -> Tensor:
    """The share of each level among the samples, float64 (L,): ln(σ/d) ~ N(-0.7, 1.3²).

    Where the ladder begins far beyond d, a quarter of the samples has all levels alike: the normal
    law would hardly ever see the first.

    Source: Karras et al. 2022, table 1 (arXiv:2206.00364), whose d is 1/2: there its mean is -1.4.
    """
    t = ((sigmas.double() / config.data_std).log() - _MEAN) / _SPREAD
    shares = (-t.square() / 2).softmax(0)
    if float(sigmas[0]) > _FAR * config.data_std:
        shares = 0.75 * shares + 0.25 / len(sigmas)
    return shares


def weights(config: TrainConfig, sigmas: Tensor) -> Tensor | None:
    """What the loss at each σ is multiplied by, like sigmas; None where it is 1.

    1 + σ²/d² with "edm": the network of `models.UNet`, F, then starts with the same loss at each
    level (Karras et al. 2022, table 1).
    """
    if config.weighting == "even":
        return None
    return 1 + (sigmas / config.data_std).square()
