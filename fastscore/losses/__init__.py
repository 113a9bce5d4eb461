"""Score-matching objectives, one value per sample; mean() is what an optimiser minimises."""

from fastscore.losses.denoising import denoising
from fastscore.losses.exact import exact
from fastscore.losses.finite_difference import finite_difference_sliced
from fastscore.losses.noise_conditional import noise_conditional
from fastscore.losses.sliced import sliced
from fastscore.losses.variance import variance_report

__all__ = [
    "denoising",
    "exact",
    "finite_difference_sliced",
    "noise_conditional",
    "sliced",
    "variance_report",
]
