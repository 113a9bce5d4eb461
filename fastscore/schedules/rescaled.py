"""Ladders of variance-preserving (VP) models, as the noise levels of the rescaled process.

A VP model sees x_vp = √ᾱ x₀ + √(1 - ᾱ) z. Divided by √ᾱ this is x = x₀ + σ z with σ = √((1 - ᾱ)/ᾱ):
the noise levels of the VE convention.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastscore.messages import shown
from fastscore.ops import checks
from fastscore.scalars import LEVELS, SQUARE
from fastscore.schedules.conventions import FloatOrTensor
from fastscore.schedules.ladders import check_ladder
from fastscore.tensors import home, numbers, valued

# ln σ. A float32 table that starts at ᾱ = 0.9999 knows its smallest σ to a relative 2^-25/(2·10^-4)
# = 1.5e-4.
_SLACK = 1e-3
_BETA = 170.0   # σ_1 = e^((β_min + β_max)/4), which float32 holds


def sigmas_of(alphas_cumprod: FloatOrTensor) -> FloatOrTensor:
    """σ = √((1 - ᾱ)/ᾱ), elementwise: from VP's ᾱ to the noise level of x_vp/√ᾱ.

    Reverse a DDPM table (`.flip(0)`) for a ladder.

    >>> sigmas_of(torch.tensor([0.5, 0.2]))
    tensor([1., 2.])
    """
    alphas_cumprod = checks.values("sigmas_of", "alphas_cumprod", alphas_cumprod, most=1, above=0)
    return ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5


def alphas_cumprod(sigmas: FloatOrTensor) -> FloatOrTensor:
    """ᾱ = 1/(1 + σ²), elementwise: the inverse of `sigmas_of`."""
    return 1 / (1 + checks.values("alphas_cumprod", "sigmas", sigmas, 0, SQUARE) ** 2)


def vp(n: int, *, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3) -> Tensor:
    """Build the ladder of score_sde's VP process at n evenly spaced times from 1 down to t_min.

        σ(t) = √(exp(β_min t + (β_max - β_min) t²/2) - 1)

    Returns:
        float32 (n,), descending.

    Raises:
        ValueError: n is not an int of at least 2, 0 < t_min < 1 or 0 <= β_min <= β_max, β_max > 0,
            fails.

    Source: Song et al. 2021, appendix C (arXiv:2011.13456).
    """
    n = checks.integer("vp", "n", n, 2, limit=LEVELS)
    beta_min, beta_max = (
        checks.number("vp", name, b, 0, _BETA)
        for name, b in (("beta_min", beta_min), ("beta_max", beta_max))
    )
    t_min = checks.number("vp", "t_min", t_min)
    if not (0 < t_min < 1 and beta_min <= beta_max and beta_max > 0):
        raise ValueError(
            "vp: 0 < t_min < 1 and 0 <= beta_min <= beta_max, beta_max > 0, must hold; got t_min "
            f"{t_min}, betas {beta_min} and {beta_max}."
        )

    t = torch.linspace(1, t_min, n, dtype=torch.float64, device=home())
    return check_ladder(
        "vp", torch.expm1(beta_min * t + 0.5 * (beta_max - beta_min) * t.square()).sqrt().float()
    )


def timesteps_of(sigma: float | Tensor, alphas_cumprod: Tensor | Sequence[float]) -> Tensor:
    """The (fractional) timestep at which a discrete VP model has noise level σ.

    Ln σ is interpolated between timesteps.

    Args:
        sigma: (B,) or any shape, float. alphas_cumprod: (N,), descending, of timesteps 0 .. N-1, as
            a diffusers scheduler holds it.

    Returns:
        float32, shape of sigma, in [0, N - 1].

    Raises:
        ValueError: σ lies outside the table (on the CPU; elsewhere, where looking would wait for
            the device, such a timestep is NaN), or the table does not descend within (0, 1).
    """
    sigma = numbers("timesteps_of", "sigma", sigma)
    return interpolate(sigma, check_table("timesteps_of", alphas_cumprod).to(sigma.device))


def interpolate(sigma: Tensor, log_table: Tensor) -> Tensor:
    """`timesteps_of` for what `check_table` has returned, on the device of sigma."""
    log_sigma = sigma.double().log()
    # What is outside by rounding is the end.
    outside = (
        (log_sigma < log_table[0] - _SLACK)
        | (log_sigma > log_table[-1] + _SLACK)
        | log_sigma.isnan()
    )
    if log_sigma.device.type == "cpu" and checks.readable() and bool(outside.any()):
        low, high = (log_table[i].exp().item() for i in (0, -1))
        got = shown(log_sigma.exp().tolist())
        raise ValueError(
            f"timesteps_of: sigma must lie in the model's range, {low:.4g} to {high:.4g}; got "
            f"{got}."
        )

    log_sigma = log_sigma.clamp(log_table[0], log_table[-1])
    right = torch.searchsorted(log_table, log_sigma).clamp(1, len(log_table) - 1)
    left = right - 1
    t = left + (log_sigma - log_table[left]) / (log_table[right] - log_table[left])
    return t.masked_fill(outside, math.nan).float()


def check_table(op: str, alphas_cumprod: Any) -> Tensor:
    """ln σ of a ᾱ table, float64 (N,), ascending."""
    table = valued(op, "alphas_cumprod", alphas_cumprod).detach().double()
    if (
        table.dim() != 1
        or len(table) < 2
        or not bool(((table > 0) & (table < 1)).all())
        or bool((table.diff() >= 0).any())
    ):
        found = shown(table.tolist()) if table.numel() < 9 else tuple(table.shape)
        expected = "(N,) with N >= 2, strictly descending within (0, 1)"
        raise ValueError(f"{op}: alphas_cumprod must be {expected}; got {found}.")
    return sigmas_of(table).log()
