"""Score networks, and densities whose score is known in closed form."""

from fastscore.models.analytic import Gaussian, GaussianMixture
from fastscore.models.ncsn import NCSN
from fastscore.models.score_mlp import ScoreMLP

__all__ = ["NCSN", "Gaussian", "GaussianMixture", "ScoreMLP"]
