"""One module per op: the public function, its reference, its derivatives."""

from fastscore.ops.denoising_loss import denoising_loss
from fastscore.ops.group_norm_modulate import group_norm_modulate, group_norm_modulate_dual
from fastscore.ops.instance_norm_plus import (
    conditional_instance_norm_plus,
    conditional_instance_norm_plus_dual,
    instance_norm_plus,
    instance_norm_plus_dual,
)
from fastscore.ops.noisy_update import langevin_step, noisy_update, perturb

__all__ = [
    "conditional_instance_norm_plus",
    "conditional_instance_norm_plus_dual",
    "denoising_loss",
    "group_norm_modulate",
    "group_norm_modulate_dual",
    "instance_norm_plus",
    "instance_norm_plus_dual",
    "langevin_step",
    "noisy_update",
    "perturb",
]
