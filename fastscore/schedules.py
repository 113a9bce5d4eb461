"""Noise ladders and step-size conventions."""

import math

import torch


def geometric(sigma_max, sigma_min, n):
    """Build a geometric ladder, largest σ first.

        σ_i = σ_max (σ_min / σ_max)^(i / (n - 1)),    i = 0 .. n-1

    Args:
        sigma_max, sigma_min: σ_max > σ_min > 0; n: number of levels, at least 2 (or 1 with equal ends).

    Returns:
        float32 (n,), descending, both ends exact.

    Raises:
        ValueError: the ends are not positive, finite and descending, or n < 2.

    Source: Song & Ermon 2019, section 4.2 (arXiv:1907.05600).

    >>> geometric(1.0, 0.01, 3)
    tensor([1.0000, 0.1000, 0.0100])
    """
    if not (math.isfinite(sigma_max) and 0 < sigma_min < sigma_max) and not (n == 1 and sigma_min == sigma_max > 0):
        raise ValueError(f"geometric: sigma_max > sigma_min > 0 must hold; got {sigma_max} and {sigma_min}.")
    if not isinstance(n, int) or n < 1 or (n == 1 and sigma_min != sigma_max):
        raise ValueError(f"geometric: n must be an int of at least 2; got {n!r}.")
    ladder = torch.logspace(math.log10(sigma_max), math.log10(sigma_min), n, dtype=torch.float64)
    ladder[0], ladder[-1] = sigma_max, sigma_min
    return ladder.float()


def to_epsilon(step_lr):
    """ε = 2 η: from the step size of NCSN's code, x + η s + √(2η) z, to ours, x + ε/2 s + √ε z."""
    return 2 * step_lr


def to_step_lr(epsilon):
    """η = ε / 2: the inverse of `to_epsilon`."""
    return epsilon / 2


def check_ladder(op, sigmas):
    """A ladder as float32 (L,); raises unless it is 1-d, positive, finite and strictly descending."""
    sigmas = torch.as_tensor(sigmas, dtype=torch.float32)
    if sigmas.dim() != 1 or sigmas.numel() == 0:
        raise ValueError(f"{op}: sigmas must be a non-empty 1-d ladder; got shape {tuple(sigmas.shape)}.")
    if not bool((sigmas.isfinite() & (sigmas > 0)).all()) or bool((sigmas.diff() >= 0).any()):
        raise ValueError(f"{op}: sigmas must be positive, finite and strictly descending; got {sigmas.tolist()}.")
    return sigmas
