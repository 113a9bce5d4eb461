"""Score networks, and densities whose score is known in closed form."""

from fastscore.models.analytic import Gaussian, GaussianMixture
from fastscore.models.energy import EnergyMLP, EnergyScore
from fastscore.models.ncsn import NCSN
from fastscore.models.ncsnpp import NCSNpp
from fastscore.models.ncsnv2 import NCSNv2, NCSNv2Deeper, NCSNv2Deepest
from fastscore.models.noise_classifier import NoiseClassifier
from fastscore.models.official import load_official
from fastscore.models.score_mlp import ScoreMLP
from fastscore.models.unet import UNet

__all__ = [
    "NCSN",
    "EnergyMLP",
    "EnergyScore",
    "Gaussian",
    "GaussianMixture",
    "NCSNpp",
    "NCSNv2",
    "NCSNv2Deeper",
    "NCSNv2Deepest",
    "NoiseClassifier",
    "ScoreMLP",
    "UNet",
    "load_official",
]
