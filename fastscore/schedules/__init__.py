"""Choosing noise levels.

Ladders, NCSNv2's techniques 1, 2 and 4, recipes for a budget, and the step-size conventions of
others.
"""

from fastscore.schedules.conventions import (
    lr_from_step_size,
    snr_from_step_size,
    step_size_from_lr,
    step_size_from_snr,
)
from fastscore.schedules.distance import distance_bounds, max_pairwise_distance
from fastscore.schedules.ladders import geometric, karras, linear
from fastscore.schedules.recipes import Recipe, recipe
from fastscore.schedules.rescaled import alphas_cumprod, sigmas_of, timesteps_of, vp
from fastscore.schedules.techniques import (
    level_overlap,
    number_of_levels,
    technique4_step_size,
    variance_ratio,
    variance_ratios,
)

__all__ = [
    "Recipe",
    "alphas_cumprod",
    "distance_bounds",
    "geometric",
    "karras",
    "level_overlap",
    "linear",
    "lr_from_step_size",
    "max_pairwise_distance",
    "number_of_levels",
    "recipe",
    "sigmas_of",
    "snr_from_step_size",
    "step_size_from_lr",
    "step_size_from_snr",
    "technique4_step_size",
    "timesteps_of",
    "variance_ratio",
    "variance_ratios",
    "vp",
]
