"""fastscore: score matching and annealed Langevin sampling in PyTorch, right and fast."""

from fastscore import (
    conversions,
    datasets,
    distributed,
    guidance,
    interop,
    likelihood,
    losses,
    models,
    nn,
    random,
    sampling,
    schedules,
    training,
)
from fastscore.backend import use_backend
from fastscore.dual import FallbackWarning, jvp, rademacher_jvp
from fastscore.ops import (
    conditional_instance_norm_plus,
    conditional_instance_norm_plus_dual,
    denoising_loss,
    group_norm_modulate,
    group_norm_modulate_dual,
    instance_norm_plus,
    instance_norm_plus_dual,
    langevin_step,
    noisy_update,
    perturb,
)
from fastscore.sampling import sample

__version__ = "0.1.0"
__all__ = [
    "FallbackWarning",
    "conditional_instance_norm_plus",
    "conditional_instance_norm_plus_dual",
    "conversions",
    "datasets",
    "denoising_loss",
    "distributed",
    "group_norm_modulate",
    "group_norm_modulate_dual",
    "guidance",
    "instance_norm_plus",
    "instance_norm_plus_dual",
    "interop",
    "jvp",
    "langevin_step",
    "likelihood",
    "losses",
    "models",
    "nn",
    "noisy_update",
    "perturb",
    "rademacher_jvp",
    "random",
    "sample",
    "sampling",
    "schedules",
    "training",
    "use_backend",
]
