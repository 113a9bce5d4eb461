"""From data and a budget of network calls to everything that annealed Langevin sampling needs."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from fastscore.messages import shown
from fastscore.ops import checks
from fastscore.random import check_seed
from fastscore.scalars import RUN
from fastscore.schedules.distance import distance_bounds, max_pairwise_distance
from fastscore.schedules.ladders import check_ends, geometric
from fastscore.schedules.techniques import (
    check_overlap,
    level_overlap,
    number_of_levels,
    technique4_step_size,
    variance_ratio,
    variance_ratios,
)

_EXACT = 1e12   # n²d up to which the largest distance is computed and not bounded
# NCSN's γ: in a few dimensions technique 2 asks for less (γ = 17 for D = 5) or is silent.
_SPARSEST = 100 ** (1 / 9)


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """A plan for annealed Langevin sampling.

    `fastscore.sample(score, shape=..., **recipe.options())`; str() is a table.

    sigmas: ladder, float32 (L,), descending. steps_per_level: T. step_size: ε at the smallest
        level. denoise: whether to end noise-free.
    dim: D. gamma: ratio of neighbouring levels. overlap: of neighbouring levels, technique 2.
        ratio: s_T²/σ² of one level, technique 4.
    ratios: predicted noise variance over σ_i² after each level, float64 (L,). calls: of the
        network, L T, + 1 with denoise.
    """

    sigmas: torch.Tensor
    steps_per_level: int
    step_size: float
    denoise: bool
    dim: int
    gamma: float
    overlap: float
    ratio: float
    ratios: torch.Tensor
    calls: int

    def options(self) -> dict[str, Any]:
        """The arguments of `fastscore.sample` and `sampling.annealed_langevin`."""
        return {
            name: getattr(self, name)
            for name in ("sigmas", "steps_per_level", "step_size", "denoise")
        }

    def __str__(self) -> str:
        return _table(self)


def recipe(
    data: Tensor,
    budget: int,
    *,
    sigma_max: float | None = None,
    sigma_min: float = 0.01,
    overlap: float = 0.5,
    denoise: bool = True,
    seed: int | Tensor | None = None,
) -> Recipe:
    """Choose σ_max, L, T and ε by techniques 1, 2 and 4 for a number of network calls.

        σ_max = largest pairwise distance;    L₀ = number_of_levels(D, σ_max, σ_min, overlap)
        T = max(1, ⌊(budget - 1)/L₀⌋);    L = ⌊(budget - 1)/T⌋;
        ε = technique4_step_size(ladder, T)

    The remainder densifies the ladder. From their budgets and σ_max this gives L and T of all five
    official NCSNv2 configurations. L₀ is at least that of NCSN's ratio, γ = 1.668, which decides
    below some 30 dimensions. A budget below L₀ + 1 gives T = 1 and a ladder sparser than asked; its
    `overlap` says by how much.

    Args:
        data: (n, *), float. budget: calls of the network for one batch, an int of at least 3 (2
            without denoise).
        sigma_max: σ_max; unless given technique 1, where n²d <= 1e12, else the lower bound of
            `distance_bounds` (seed is of its subset).
        sigma_min: σ_min; 0.01 is NCSN's for images in [0, 1]. overlap: asked of neighbouring
            levels. denoise: end with the noise-free step.

    Returns:
        Recipe.

    Raises:
        ValueError: budget too small, the ends of the ladder do not descend, the data are not finite
            or all equal.

    Source: Song & Ermon 2020 (arXiv:2006.09011); the rule for the remainder is ours.
    """
    checks.check_float("recipe", "data", data)
    if data.dim() < 1 or len(data) < 2 or not data[0].numel():
        raise ValueError(
            f"recipe: data must hold at least 2 samples, (n, *); got shape {tuple(data.shape)}."
        )
    if data.is_meta:
        raise ValueError("recipe: data must have values; it is on the meta device.")

    least = 2 + bool(denoise)
    if not checks.whole(budget) or not least <= budget <= RUN:
        bound = (
            f"at least {least}" if not checks.whole(budget) or budget < least else f"at most {RUN}"
        )
        raise ValueError(
            f"recipe: budget must be an int of {bound} network calls; got {shown(budget)}."
        )

    seed = check_seed("recipe", seed, data.device)
    sigma_min = checks.number("recipe", "sigma_min", sigma_min)
    if sigma_max is None:
        sigma_max = _largest_noise(data, seed)
        if sigma_max <= sigma_min:
            raise ValueError(
                f"recipe: the data's largest distance, {sigma_max:.4g}, must exceed sigma_min; got "
                f"{sigma_min}."
            )

    dim = math.prod(data.shape[1:])
    steps = checks.plain_int(budget) - bool(denoise)
    levels = _wanted_levels(dim, sigma_max, sigma_min, overlap)
    per_level = max(1, steps // levels)
    return _plan(dim, geometric(sigma_max, sigma_min, steps // per_level), per_level, denoise)


def _largest_noise(data, seed):
    exact = len(data) ** 2 * math.prod(data.shape[1:]) <= _EXACT
    return max_pairwise_distance(data) if exact else distance_bounds(data, seed=seed).lower


def _wanted_levels(dim, sigma_max, sigma_min, overlap):
    sigma_max, sigma_min, _ = check_ends("recipe", sigma_max, sigma_min, 2)
    overlap = check_overlap("recipe", dim, overlap)
    least = max(2, round(1 + (math.log(sigma_max) - math.log(sigma_min)) / math.log(_SPARSEST)))
    try:
        return max(least, number_of_levels(dim, sigma_max, sigma_min, overlap))
    except ValueError:
        if dim >= 5:
            raise
        return least


def _plan(dim, sigmas, per_level, denoise):
    step_size = technique4_step_size(sigmas, per_level)
    gamma = (sigmas[0].item() / sigmas[-1].item()) ** (1 / (len(sigmas) - 1))
    return Recipe(
        sigmas=sigmas,
        steps_per_level=per_level,
        step_size=step_size,
        denoise=bool(denoise),
        dim=dim,
        gamma=gamma,
        overlap=level_overlap(dim, gamma),
        ratio=variance_ratio(gamma, per_level, step_size / 2 / sigmas[-1].item() ** 2),
        ratios=variance_ratios(sigmas, per_level, step_size),
        calls=len(sigmas) * per_level + bool(denoise),
    )


def _table(r):
    """The recipe for people: what was chosen, and the predicted variance at up to six levels."""
    rows = [
        (
            "sigma_max",
            f"{r.sigmas[0]:.6g}",
            "technique 1: largest distance between samples found, or given",
        ),
        ("sigma_min", f"{r.sigmas[-1]:.6g}", "as given"),
        (
            "levels",
            f"{len(r.sigmas)}",
            f"technique 2: neighbours of ratio {r.gamma:.5g} overlap by {r.overlap:.3f} in {r.dim} "
            "dimensions",
        ),
        ("steps_per_level", f"{r.steps_per_level}", "what the budget allows"),
        (
            "step_size",
            f"{r.step_size:.6g}",
            f"technique 4: s_T²/σ² = {r.ratio:.4f}; NCSN's step_lr is {r.step_size / 2:.4g}",
        ),
        (
            "network calls",
            f"{r.calls}",
            "levels × steps_per_level" + (" + 1 to denoise" if r.denoise else ""),
        ),
    ]
    width = max(len(value) for _, value, _ in rows)
    lines = [f"{name:<16} {value:>{width}}   {note}" for name, value, note in rows]
    rows_shown = sorted({round(i * (len(r.sigmas) - 1) / 5) for i in range(6)})
    lines += ["", "  level       σ   predicted noise variance / σ²"]
    return "\n".join(
        lines + [f"{i + 1:7d} {r.sigmas[i]:7.4g}   {r.ratios[i]:.4f}" for i in rows_shown]
    )
