"""Choosing noise levels: ladders, NCSNv2's techniques 1, 2 and 4, recipes for a budget, and the step-size conventions of others."""

from fastscore.schedules.conventions import epsilon_to_snr, snr_to_epsilon, to_epsilon, to_step_lr
from fastscore.schedules.distance import DistanceBounds, distance_bounds, max_pairwise_distance
from fastscore.schedules.ladders import check_ladder, geometric, karras, linear
from fastscore.schedules.recipes import Recipe, recipe
from fastscore.schedules.rescaled import alphas_cumprod, sigmas_of, timesteps_of, vp
from fastscore.schedules.techniques import level_overlap, number_of_levels, technique4_step_size, variance_ratio, variance_ratios

__all__ = [
    "DistanceBounds",
    "Recipe",
    "alphas_cumprod",
    "check_ladder",
    "distance_bounds",
    "epsilon_to_snr",
    "geometric",
    "karras",
    "level_overlap",
    "linear",
    "max_pairwise_distance",
    "number_of_levels",
    "recipe",
    "sigmas_of",
    "snr_to_epsilon",
    "technique4_step_size",
    "timesteps_of",
    "to_epsilon",
    "to_step_lr",
    "variance_ratio",
    "variance_ratios",
    "vp",
]
