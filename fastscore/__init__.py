"""fastscore: score matching and annealed Langevin sampling in PyTorch, right and fast."""

from fastscore import random
from fastscore.backend import use_backend
from fastscore.ops import denoising_loss, langevin_step, noisy_update, perturb

__version__ = "0.1.0"
__all__ = ["denoising_loss", "langevin_step", "noisy_update", "perturb", "random", "use_backend"]
