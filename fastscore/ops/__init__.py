"""One module per op: the public function, its reference, its derivatives."""

from fastscore.ops.denoising_loss import denoising_loss
from fastscore.ops.langevin_step import langevin_step, noisy_update, perturb

__all__ = ["denoising_loss", "langevin_step", "noisy_update", "perturb"]
