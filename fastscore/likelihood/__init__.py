"""Densities from scores.

The probability-flow ODE, the line integral, and bits per dimension of images.
"""

from fastscore.likelihood.bits import bits_per_dim, dequantize
from fastscore.likelihood.density import log_density
from fastscore.likelihood.ratio import log_ratio

__all__ = ["bits_per_dim", "dequantize", "log_density", "log_ratio"]
