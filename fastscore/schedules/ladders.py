"""Noise ladders, largest σ first."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastscore.messages import shown, shown_ladder
from fastscore.ops import checks
from fastscore.scalars import LEVELS
from fastscore.tensors import check_tensor, fake, home, valued


def geometric(sigma_max: float, sigma_min: float, n: int) -> Tensor:
    """Build a geometric ladder, largest σ first.

        σ_i = σ_max (σ_min / σ_max)^(i / (n - 1)),    i = 0 .. n-1

    Args:
        sigma_max, sigma_min: σ_max > σ_min > 0; n: number of levels, at least 2 (or 1 with equal
            ends).

    Returns:
        float32 (n,), descending, both ends exact.

    Raises:
        ValueError: the ends are not positive, finite and descending, or n < 2.

    Source: Song & Ermon 2019, section 4.2 (arXiv:1907.05600).

    >>> geometric(1.0, 0.01, 3)
    tensor([1.0000, 0.1000, 0.0100])
    """
    sigma_max, sigma_min, n = check_ends("geometric", sigma_max, sigma_min, n)
    high, low = math.log10(sigma_max), math.log10(sigma_min)
    return _with_ends(
        "geometric",
        torch.logspace(high, low, n, dtype=torch.float64, device=home()),
        sigma_max,
        sigma_min,
    )


def karras(sigma_max: float, sigma_min: float, n: int, rho: float = 7.0) -> Tensor:
    """Build the ladder of EDM and k-diffusion, without their closing 0.

        σ_i = (σ_max^(1/ρ) + i/(n - 1) (σ_min^(1/ρ) - σ_max^(1/ρ)))^ρ

    Args and errors: as for `geometric`; rho > 0, 1 is `linear` and ∞ is `geometric`.

    Source: Karras et al. 2022, equation 5 (arXiv:2206.00364).

    >>> karras(80.0, 0.002, 3)
    tensor([8.0000e+01, 2.5152e+00, 2.0000e-03])
    """
    sigma_max, sigma_min, n = check_ends("karras", sigma_max, sigma_min, n)
    rho = checks.number("karras", "rho", rho, above=0)
    high = math.log(sigma_max) / rho
    low = math.log(sigma_min) / rho
    # log of a sum of two exponentials: σ^(1/ρ) itself is 1 - 1e-16 for a large ρ.
    t = torch.linspace(0, 1, n, dtype=torch.float64, device=home())
    return _with_ends(
        "karras",
        (rho * (high + torch.log1p(t * math.expm1(low - high)))).exp(),
        sigma_max,
        sigma_min,
    )


def linear(sigma_max: float, sigma_min: float, n: int) -> Tensor:
    """Build an evenly spaced ladder, largest σ first. Args and errors: as for `geometric`.

    >>> linear(1.0, 0.5, 3)
    tensor([1.0000, 0.7500, 0.5000])
    """
    sigma_max, sigma_min, n = check_ends("linear", sigma_max, sigma_min, n)
    return _with_ends(
        "linear",
        torch.linspace(sigma_max, sigma_min, n, dtype=torch.float64, device=home()),
        sigma_max,
        sigma_min,
    )


def check_ends(op: str, sigma_max: float, sigma_min: float, n: int) -> tuple[float, float, int]:
    """The ends as floats that float32 holds, and the number of levels."""
    single = torch.finfo(torch.float32)
    high = checks.number(op, "sigma_max", sigma_max, most=single.max)
    low = checks.number(op, "sigma_min", sigma_min, most=single.max)
    if not single.tiny <= low < high and not (
        checks.whole(n) and n == 1 and low == high >= single.tiny
    ):
        least = f", and sigma_min >= {single.tiny:.3g}" if 0 < low < single.tiny else ""
        raise ValueError(f"{op}: sigma_max > sigma_min > 0 must hold{least}; got {high} and {low}.")
    return high, low, checks.integer(op, "n", n, 1 if low == high else 2, limit=LEVELS)


def _with_ends(op, ladder, sigma_max, sigma_min):
    """Both ends exact, then float32."""
    ladder[0], ladder[-1] = sigma_max, sigma_min
    rounded = ladder.float()
    if bool((rounded.diff() >= 0).any()):
        raise ValueError(
            f"{op}: n = {len(ladder)} levels from {sigma_max:g} to {sigma_min:g} are not apart in "
            "float32."
        )
    return rounded


def check_ladder(op: str, sigmas: Tensor | Sequence[float], wait: bool = True) -> Tensor:
    """A ladder as float32 (L,); raises unless it is 1-d, positive, finite and strictly descending.

    wait=False: a GPU's values go unread.
    """
    given = sigmas
    if isinstance(given, torch.Tensor):
        check_tensor(op, "sigmas", given)
        valued(op, "sigmas", given)
    try:
        sigmas = valued(op, "sigmas", given, torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{op}: sigmas must be a ladder of numbers; got {shown(given)}.") from None
    if sigmas.dim() != 1 or sigmas.numel() == 0:
        raise ValueError(
            f"{op}: sigmas must be a non-empty 1-d ladder; got shape {tuple(sigmas.shape)}."
        )
    if not wait and sigmas.device.type != "cpu":
        return sigmas

    if checks.readable() and not fake(sigmas):
        good = bool((sigmas.isfinite() & (sigmas > 0)).all()) and not bool(
            (sigmas.diff() >= 0).any()
        )
    elif isinstance(given, torch.Tensor):
        return sigmas   # while compiling or tracing it has no values to look at
    else:
        good = all(0 < s < math.inf for s in given) and all(
            a > b for a, b in itertools.pairwise(given)
        )
    if not good:
        values = sigmas.clone().tolist() if checks.readable() else given
        raise ValueError(
            f"{op}: sigmas must be positive, finite and strictly descending; got "
            f"{shown_ladder(values)}."
        )

    return sigmas
