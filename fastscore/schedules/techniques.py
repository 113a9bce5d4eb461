"""NCSNv2's techniques 2 and 4: how many levels, and how large a step.

Both follow from the radius of Gaussian noise in D dimensions.

Source of all: Song & Ermon 2020, "Improved techniques for training score-based generative models"
    (arXiv:2006.09011).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastscore.ops import checks
from fastscore.scalars import RUN, SQUARE
from fastscore.schedules.ladders import check_ends, check_ladder
from fastscore.tensors import home


def level_overlap(dim: int, gamma: float) -> float:
    """How much of a level's noise lies where the next larger level has its own.

        overlap = Φ(√(2D) (γ - 1) + 3 γ) - Φ(√(2D) (γ - 1) - 3 γ)

    Args:
        dim: D, number of values in a sample. gamma: γ = σ_i / σ_{i+1} > 1.

    Source: section 3.2.

    >>> round(level_overlap(3072, (50 / 0.01) ** (1 / 231)), 3)   # NCSNv2's ladder for CIFAR-10
    0.567
    """
    dim = checks.integer("level_overlap", "dim", dim, 1, limit=2**53)
    return _overlap(dim, checks.number("level_overlap", "gamma", gamma, 1, SQUARE))


def _overlap(dim, gamma):
    shift = math.sqrt(2 * dim) * (gamma - 1)
    # As tails: Φ(b) - Φ(a) = (erfc(a/√2) - erfc(b/√2)) / 2 keeps its digits where both are near 1.
    return 0.5 * (
        math.erfc((shift - 3 * gamma) / math.sqrt(2))
        - math.erfc((shift + 3 * gamma) / math.sqrt(2))
    )


def number_of_levels(dim: int, sigma_max: float, sigma_min: float, overlap: float = 0.5) -> int:
    """Technique 2: the length of the geometric ladder whose neighbouring levels overlap as asked.

        L = 1 + ln(σ_max / σ_min) / ln γ to the nearest integer,
        γ the root of level_overlap(D, γ) = overlap

    Args:
        dim: D, number of values in a sample. sigma_max, sigma_min: ends of the ladder, descending.
        overlap: in (0, 0.9973). The default 0.5 is the paper's rule; the official NCSNv2
            configurations are about 6 % denser, 0.567.

    Returns:
        L, an int of at least 2.

    Raises:
        ValueError: dim < 1, the ends do not descend, or overlap cannot be reached.

    Source: section 3.2, technique 2.

    >>> number_of_levels(3072, 50, 0.01), number_of_levels(3072, 50, 0.01, overlap=0.567)
    (219, 232)
    """
    op = "number_of_levels"
    sigma_max, sigma_min, _ = check_ends(op, sigma_max, sigma_min, 2)
    dim = checks.integer(op, "dim", dim, 1, limit=2**53)
    overlap = check_overlap(op, dim, overlap)
    log_gamma = _bisect(lambda u: _overlap(dim, math.exp(u)) - overlap, 0.0, _upper(dim, overlap))
    return max(2, round(1 + (math.log(sigma_max) - math.log(sigma_min)) / log_gamma))


def check_overlap(op: str, dim: int, overlap: float) -> float:
    """An overlap that some ratio of levels has in so many dimensions."""
    most = _overlap(dim, 1.0)
    overlap = checks.number(op, "overlap", overlap)
    if not 0 < overlap < most:
        raise ValueError(
            f"{op}: overlap must lie strictly between 0 and {most:.4f}; got {overlap}."
        )
    return overlap


def _upper(dim, overlap):
    """A ln γ with less than `overlap`: the shift √(2D)(γ - 1) outgrows 3γ only if √(2D) > 3."""
    u = 1e-3
    while _overlap(dim, math.exp(u)) > overlap:
        u *= 2
        if u > 300:
            raise ValueError(
                f"number_of_levels: in {dim} dimensions neighbouring levels overlap more than "
                f"{overlap} whatever the ladder."
            )
    return u


def _bisect(f, low, high):
    """The root of f, positive at low and not at high, to the last bit."""
    while True:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            return middle
        low, high = (middle, high) if f(middle) > 0 else (low, middle)


def variance_ratio(gamma: float, steps_per_level: int, eta: float, start: float = 1.0) -> float:
    """Technique 4: what T Langevin steps leave of a sample's noise variance, over the level's σ².

        s_T²/σ² = a^(2T) γ² v + 2 (1 - a^(2T)) / (1 + a),    a = 1 - η/σ_L²

    The noise of a point of the data (all of the noise variance, with the exact score) enters a
    level with v times the variance of the level before, which is γ² v σ²; each step multiplies it
    by a² and adds 2 η σ²/σ_L². The paper's form, (1 - η/σ_L²)^(2T) (γ² - k) + k, is the same with k
    = 2/(1 + a) and v = 1.

    Args:
        gamma: γ, ratio of neighbouring levels. steps_per_level: T. start: v. eta: η/σ_L², with η =
            ε/2 NCSN's step_lr.

    Source: section 3.4, proposition 3.
    """
    op = "variance_ratio"
    gamma = checks.number(op, "gamma", gamma, most=1e100, above=0)
    start = checks.number(op, "start", start, 0, 1e100)
    a = 1 - checks.number(op, "eta", eta, 0, below=2)
    keep = a ** (2 * checks.integer(op, "steps_per_level", steps_per_level, 0, limit=RUN))
    return keep * gamma**2 * start + 2 * (1 - keep) / (1 + a)


def technique4_step_size(sigmas: Tensor | Sequence[float], steps_per_level: int) -> float:
    """Technique 4: the step size that brings s_T²/σ² closest to 1 (see `variance_ratio`).

    s_T²/σ² is above 1 for every step size, and its only minimum on 0 < a < 1, a = 1 - η/σ_L², is
    the root of

        T a^(2T-1) (1 + a) (γ² (1 + a) - 2) = 1 - a^(2T),

    whose left side, where positive, increases with a while the right side falls.

    Args:
        sigmas: geometric ladder (L,), descending, L >= 2. steps_per_level: T >= 1.

    Returns:
        ε = 2 η, a float, for x + ε/2 s + √ε z at the smallest level; `lr_from_step_size` of it is
        the step_lr of NCSNv2's configurations.

    Raises:
        ValueError: sigmas is no ladder or not geometric (ratios differ by more than 1 % of their
            logarithm), or T < 1.

    Source: section 3.4, technique 4; the root is ours.

    >>> from fastscore import schedules
    >>> step_size = technique4_step_size(schedules.geometric(50, 0.01, 232), 5)
    >>> f"{schedules.lr_from_step_size(step_size):.1e}"
    '6.2e-06'
    """
    op = "technique4_step_size"
    sigmas = check_ladder(op, sigmas).double()
    steps_per_level = _check_steps(op, steps_per_level)
    if len(sigmas) < 2:
        raise ValueError(f"{op}: sigmas must hold at least 2 levels; got 1.")

    gaps = -sigmas.log().diff()
    low, high = gaps.min().item(), gaps.max().item()
    if high - low > 0.01 * high + 4 * torch.finfo(torch.float32).eps:
        raise ValueError(
            f"{op}: sigmas must be geometric; neighbouring ratios run from {math.exp(low):.4g} to "
            f"{math.exp(high):.4g}."
        )

    return 2 * _best_eta(math.exp(gaps.mean().item()), steps_per_level) * sigmas[-1].item() ** 2


def _best_eta(gamma, steps):
    """η/σ_L² at the minimum; for T = 1 it is 1 - 1/γ²."""

    def falling(eta):
        """Positive while s_T²/σ² still falls as η/σ_L² grows.

        In powers of η so that γ near 1 loses nothing.
        """
        a = 1 - eta
        rest = -math.expm1(2 * steps * math.log1p(-eta)) if eta < 1 else 1.0
        # γ²(1 + a) - 2 = (γ² - 1)(1 + a) - η
        return (
            steps * a ** (2 * steps - 1) * (1 + a) * ((gamma - 1) * (gamma + 1) * (1 + a) - eta)
            - rest
        )

    return _bisect(falling, 0.0, 1.0)


def variance_ratios(
    sigmas: Tensor | Sequence[float], steps_per_level: int, step_size: float
) -> Tensor:
    """s_T²/σ_i² after each level of a whole run (float64 (L,)), for any ladder, when the run starts
    with variance σ_1².

    `variance_ratio` level after level, each starting with what the one before has left. Args: as
    for `sampling.annealed_langevin`.
    """
    op = "variance_ratios"
    sigmas = check_ladder(op, sigmas).tolist()
    steps_per_level = _check_steps(op, steps_per_level)
    step_size = checks.number(op, "step_size", step_size)
    eta = step_size / 2 / sigmas[-1] ** 2
    ratios = []
    v = 1.0
    if not 0 <= eta < 2:
        raise ValueError(
            f"{op}: step_size must lie in [0, 4 σ_L²), {4 * sigmas[-1] ** 2:.4g}, or the chain "
            f"diverges; got {step_size}."
        )

    for before, sigma in zip(sigmas[:1] + sigmas, sigmas):
        v = variance_ratio(before / sigma, steps_per_level, eta, start=v)
        ratios.append(v)

    return torch.tensor(ratios, dtype=torch.float64, device=home())


def _check_steps(op, steps):
    return checks.integer(op, "steps_per_level", steps, 1, limit=RUN)
