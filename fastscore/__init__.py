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
    ops,
    random,
    sampling,
    schedules,
    training,
)
from fastscore.backend import use_backend
from fastscore.dual import FallbackWarning, jvp, rademacher_jvp
from fastscore.ops import (
    conditional_instance_norm_plus,
    denoising_loss,
    group_norm_modulate,
    instance_norm_plus,
    langevin_step,
    noisy_update,
    perturb,
)
from fastscore.sampling import sample

__version__ = "0.1.0"
__all__ = [
    "FallbackWarning",
    "conditional_instance_norm_plus",
    "conversions",
    "datasets",
    "denoising_loss",
    "distributed",
    "group_norm_modulate",
    "guidance",
    "instance_norm_plus",
    "interop",
    "jvp",
    "langevin_step",
    "likelihood",
    "losses",
    "models",
    "nn",
    "noisy_update",
    "ops",
    "perturb",
    "rademacher_jvp",
    "random",
    "sample",
    "sampling",
    "schedules",
    "training",
    "use_backend",
]
