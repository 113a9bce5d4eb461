"""Step sizes: from the conventions of other code bases to ours, x + ε/2 s + √ε z, and back.

| code | one step | ours |
|---|---|---|
| Song & Ermon 2019 as printed, NCSN's toy code, toy_gradlogp | x + ε/2 s + √ε z | ε |
| NCSN, NCSNv2, CAS (`step_lr`), torchebm, the SDE dx = s dt + √2 dW | x + η s + √(2η) z | 2 η |
| score_sde, diffusers' ScoreSdeVe (`snr`) | η = 2 (r ‖z‖/‖s‖)², or 2 (r σ)² | 4 r² σ² |

`step_size_from_lr` is the second row, `step_size_from_snr` the third.
"""

import math
from typing import TypeVar

import numpy as np
from torch import Tensor

from fastscore.ops import checks
from fastscore.scalars import SQUARE

FloatOrTensor = TypeVar("FloatOrTensor", float, Tensor, np.ndarray)


def step_size_from_lr(step_lr: FloatOrTensor) -> FloatOrTensor:
    """ε = 2 η: from NCSN's x + η s + √(2η) z to our x + ε/2 s + √ε z."""
    return 2 * checks.values("step_size_from_lr", "step_lr", step_lr, 0, most=1e300)


def lr_from_step_size(step_size: FloatOrTensor) -> FloatOrTensor:
    """η = ε/2: the inverse of `step_size_from_lr`."""
    return checks.values("lr_from_step_size", "step_size", step_size, 0) / 2


def step_size_from_snr(snr: float, sigma: FloatOrTensor) -> FloatOrTensor:
    """The step size of score_sde's correctors at noise level σ.

        η = 2 (r σ)²,    ε = 2 η = 4 r² σ²

    Exact for the annealed corrector. The Langevin corrector has r ‖z‖/‖s‖, its norms averaged over
    the batch, in place of r σ: the same for a point blurred by σ, and r √(s² + σ²) for normal data
    of variance s².

    Args:
        snr: r, a float.
        sigma: σ, a float or a tensor; a ladder gives one ε for each level.

    Source: Song et al. 2021, Algorithm 4 (arXiv:2011.13456).

    >>> round(lr_from_step_size(step_size_from_snr(0.176, 0.01)), 8)   # NCSNv2's step_lr 6.2e-6
    6.2e-06
    """
    snr = checks.values("step_size_from_snr", "snr", snr, 0, 1e9)
    sigma = checks.values("step_size_from_snr", "sigma", sigma, 0, SQUARE)
    return 4 * snr**2 * sigma**2


def snr_from_step_size(step_size: float, sigma: float) -> float:
    """r = √ε/(2 σ): the inverse of `step_size_from_snr`, for floats."""
    step_size = checks.number("snr_from_step_size", "step_size", step_size, 0)
    sigma = checks.number("snr_from_step_size", "sigma", sigma, above=0, most=SQUARE)
    return math.sqrt(step_size) / (2 * sigma)
